// Routing, and rows to experts and back. A warp chooses for a token.
#include "ops/experts/experts_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffU;
constexpr int kWarpsOfTokens = 2;
constexpr int kThreads = 128;

/// The numbers of a warp's token.
struct TokenScores {
  float score[kMaxRoutedExperts];
  float choice[kMaxRoutedExperts];
  float group[kMaxRoutedExperts];
};

/// The scores of token t's experts, for all lanes after __syncwarp().
template <class T>
__device__ void scores_of(const Route<T>& a, int64_t t, float* score) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int experts = static_cast<int>(a.lists.experts);
  const T* logits = a.logits.row(t);
  if (a.config.score == RouterScore::kSigmoid) {
    for (int e = lane; e < experts; e += 32) {
      score[e] = sigmoid(load(logits + e));
    }
    __syncwarp();
    return;
  }
  float largest = load(logits);
  for (int e = lane; e < experts; e += 32) {
    largest = fmaxf(largest, load(logits + e));
  }
  largest = warp_max(largest);
  float sum = 0.0F;
  for (int e = lane; e < experts; e += 32) {
    score[e] = expf(load(logits + e) - largest);
    sum += score[e];
  }
  const float inverse = 1.0F / warp_sum(sum);
  for (int e = lane; e < experts; e += 32) {
    score[e] *= inverse;
  }
  __syncwarp();
}

/// Makes the choices of groups that do not stay NaN, which is never chosen.
__device__ void leave_groups(const RouterConfig& config, int experts, TokenScores& token) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int groups = static_cast<int>(config.groups);
  const int size = experts / groups;
  for (int g = lane; g < groups; g += 32) {
    float first = -INFINITY;
    float second = -INFINITY;
    for (int i = g * size; i < (g + 1) * size; ++i) {
      const float value = token.choice[i];
      second = value > first ? first : fmaxf(second, value);
      first = fmaxf(first, value);
    }
    token.group[g] = size > 1 ? first + second : first;
  }
  __syncwarp();
  for (int g = lane; g < groups; g += 32) {
    int above = 0;
    for (int h = 0; h < groups; ++h) {
      above += token.group[h] > token.group[g] || (token.group[h] == token.group[g] && h < g);
    }
    for (int i = g * size; above >= config.group_top && i < (g + 1) * size; ++i) {
      token.choice[i] = NAN;
    }
  }
  __syncwarp();
}

/// A number that grows with the choice, 0 for NaN alone.
__device__ __forceinline__ unsigned order_of(float choice) {
  if (choice != choice) {
    return 0;
  }
  const unsigned bits = __float_as_uint(choice + 0.0F);  // zeros are equal
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000U;
}

/// The best of a lane's experts, every 32nd, and its order; the lower of equals.
__device__ __forceinline__ void best_of_lane(const float* choice, int experts, unsigned& order,
                                             int& best) {
  order = 0;
  best = experts;
#pragma unroll 4
  for (int e = static_cast<int>(threadIdx.x % 32); e < experts; e += 32) {
    const unsigned own = order_of(choice[e]);
    best = own > order ? e : best;
    order = max(order, own);
  }
}

/// Whether one block both chooses and orders.
constexpr int64_t kOrderedAtOnce = 64;  // slots
bool orders_at_once(const ExpertLists& lists) {
  return lists.tokens <= kWarpsOfTokens && lists.rows() <= kOrderedAtOnce;
}

/// The same as order_rows, by a block that has all slots: a thread compares one with all others.
__device__ void order_few(const ExpertLists& lists, const int* expert) {
  const int slots = static_cast<int>(lists.rows());
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < slots) {
    const int own = expert[thread];
    int row = 0;
    for (int s = 0; s < slots; ++s) {
      row += expert[s] < own || (expert[s] == own && s < thread) ? 1 : 0;
    }
    lists.row[thread] = row;
    lists.slot[row] = thread;
  }
  for (int e = thread; e <= lists.experts; e += kWarpsOfTokens * 32) {
    int below = 0;
    for (int s = 0; s < slots; ++s) {
      below += expert[s] < e ? 1 : 0;
    }
    lists.start[e] = below;
  }
}

template <class T, bool kOrder>
__global__ void __launch_bounds__(kWarpsOfTokens * 32) choose_experts(Route<T> a) {
  __shared__ TokenScores tokens[kWarpsOfTokens];
  __shared__ int chosen[kOrder ? kOrderedAtOnce : 1];
  await_inputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsOfTokens + threadIdx.x / 32;
  if (t < a.lists.tokens) {
    TokenScores& token = tokens[threadIdx.x / 32];
    const int experts = static_cast<int>(a.lists.experts);
    const int top = static_cast<int>(a.lists.top);
    scores_of(a, t, token.score);
    for (int e = lane; e < experts; e += 32) {
      const float value = token.score[e] + (a.choice_bias.defined() ? a.choice_bias.data[e] : 0.0F);
      token.choice[e] = value == value ? value : -INFINITY;
    }
    __syncwarp();
    if (a.config.groups > 1) {
      leave_groups(a.config, experts, token);
    }
    int32_t* expert = a.lists.expert + t * top;
    float* weight = a.weight.row(t);
    float sum = 0.0F;
    unsigned order = 0;
    int own = 0;
    best_of_lane(token.choice, experts, order, own);
    for (int k = 0; k < top; ++k) {
      const unsigned highest = __reduce_max_sync(kAll, order);
      const auto best = static_cast<int>(
          __reduce_min_sync(kAll, static_cast<unsigned>(order == highest ? own : experts)));
      sum += token.score[best];
      if (lane == 0) {
        expert[k] = best;
        weight[k] = token.score[best];
        if constexpr (kOrder) {
          chosen[t * top + k] = best;
        }
      }
      if (lane == best % 32) {
        token.choice[best] = NAN;
        best_of_lane(token.choice, experts, order, own);
      }
    }
    __syncwarp();
    const float factor =
        a.config.renormalise ? a.config.scale / (sum + a.config.eps) : a.config.scale;
    for (int k = lane; k < top; k += 32) {
      weight[k] *= factor;
    }
  }
  if constexpr (kOrder) {
    __syncthreads();
    order_few(a.lists, chosen);
  }
}

// With the scores s, w = scale s [/ S], S = sum + eps:
//   ds = scale (dw - [sum over the chosen of dw s / S]) [/ S];
//   sigmoid: dx += ds s (1 - s);   softmax: dx += s (ds - sum ds s)
template <class T>
__global__ void __launch_bounds__(kWarpsOfTokens * 32) route_grad(Route<T> a) {
  __shared__ TokenScores tokens[kWarpsOfTokens];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsOfTokens + threadIdx.x / 32;
  if (t >= a.lists.tokens) {
    return;
  }
  TokenScores& token = tokens[threadIdx.x / 32];
  float* score = token.score;
  float* dscore = token.choice;
  const int experts = static_cast<int>(a.lists.experts);
  const int top = static_cast<int>(a.lists.top);
  const int32_t* expert = a.lists.expert + t * top;
  const float* dw = a.weight.grad_row(t);
  scores_of(a, t, score);
  for (int e = lane; e < experts; e += 32) {
    dscore[e] = 0.0F;
  }
  __syncwarp();
  float sum = 0.0F;
  float weighted = 0.0F;
  for (int k = lane; k < top; k += 32) {
    sum += score[expert[k]];
    weighted += dw[k] * score[expert[k]];
  }
  sum = warp_sum(sum) + a.config.eps;
  weighted = warp_sum(weighted);
  float mean = 0.0F;
  for (int k = lane; k < top; k += 32) {
    const float own = a.config.renormalise ? (dw[k] - weighted / sum) / sum : dw[k];
    dscore[expert[k]] = a.config.scale * own;
    mean += a.config.scale * own * score[expert[k]];
  }
  mean = warp_sum(mean);
  __syncwarp();
  T* dlogits = a.logits.grad_row(t);
  const bool is_sigmoid = a.config.score == RouterScore::kSigmoid;
  for (int e = lane; e < experts; e += 32) {
    add_to(dlogits + e, score[e] * (is_sigmoid ? dscore[e] * (1.0F - score[e]) : dscore[e] - mean));
  }
}

/// The first of a thread's kVec columns.
template <int kVec>
__device__ __forceinline__ int64_t first_column() {
  return (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVec;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) dispatch_rows(Dispatch<T> a) {
  await_inputs();
  const int64_t r = blockIdx.x;
  const int64_t c = first_column<kVec>();
  if (c < a.x.channels) {
    float x[kVec];
    load_n<kVec>(a.x.row(a.lists.slot[r] / a.lists.top) + c, x);
    store_n<kVec>(a.y.row(r) + c, x);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) dispatch_grad(Dispatch<T> a) {
  const int64_t t = blockIdx.x;
  const int64_t c = first_column<kVec>();
  if (c >= a.x.channels) {
    return;
  }
  float sum[kVec];
  load_n<kVec>(a.x.grad_row(t) + c, sum);
  for (int64_t k = 0; k < a.lists.top; ++k) {
    float d[kVec];
    load_n<kVec>(a.y.grad_row(a.lists.row[t * a.lists.top + k]) + c, d);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      sum[j] += d[j];
    }
  }
  store_n<kVec>(a.x.grad_row(t) + c, sum);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) combine_rows(Combine<T> a) {
  await_inputs();
  const int64_t t = blockIdx.x;
  const int64_t c = first_column<kVec>();
  if (c >= a.y.channels) {
    return;
  }
  // What is loaded for several slots is on its way together.
  constexpr int kAtOnce = 8;
  const int top = static_cast<int>(a.lists.top);
  const int32_t* rows = a.lists.row + t * top;
  const float* weights = a.weight.data + t * top;
  float sum[kVec] = {};
  if (a.added.defined()) {
    load_n<kVec>(a.added.row(t) + c, sum);
    const float share = a.gate.defined() ? sigmoid(load(a.gate.row(t))) : 1.0F;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      sum[j] *= share;
    }
  }
  for (int first = 0; first < top; first += kAtOnce) {
    int row[kAtOnce] = {};
    float weight[kAtOnce] = {};
    Packed<kVec, T> x[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k < top) {
        row[k] = rows[first + k];
        weight[k] = weights[first + k];
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k < top) {
        x[k] = *reinterpret_cast<const Packed<kVec, T>*>(a.x.row(row[k]) + c);
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k < top) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          sum[j] += weight[k] * load(&x[k].value[j]);
        }
      }
    }
  }
  store_n<kVec>(a.y.row(t) + c, sum);
}

/// A block for a slot: dx = w dy of its row, dw = dy . x.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) combine_grad(Combine<T> a) {
  const int64_t s = blockIdx.x;
  const int64_t row = a.lists.row[s];
  const T* x_row = a.x.row(row);
  const T* dy_row = a.y.grad_row(s / a.lists.top);
  T* dx_row = a.x.grad == nullptr ? nullptr : a.x.grad_row(row);
  const float weight = a.weight.data[s];
  float dot = 0.0F;
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kVec; c < a.y.channels;
       c += kThreads * kVec) {
    float x[kVec];
    float dy[kVec];
    load_n<kVec>(x_row + c, x);
    load_n<kVec>(dy_row + c, dy);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      dot += dy[j] * x[j];
    }
    if (dx_row != nullptr) {
      float dx[kVec];
      load_n<kVec>(dx_row + c, dx);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        dx[j] += weight * dy[j];
      }
      store_n<kVec>(dx_row + c, dx);
    }
  }
  dot = block_sum<kThreads>(dot);
  if (threadIdx.x == 0 && a.weight.grad != nullptr) {
    a.weight.grad[s] += dot;
  }
}

/// Blocks of kThreads threads over `rows` rows, each thread kVec columns.
template <int kVec>
dim3 row_blocks(int64_t rows, int64_t channels) {
  return {static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(channels, kThreads * kVec)),
          1};
}

/// Calls f with the width that the views can be taken in: 16 bytes or one element.
template <class T, class F>
void with_width(const View<T>& x, const View<T>& y, const F& f) {
  if (aligned(x) && aligned(y)) {
    f.template operator()<static_cast<int>(16 / sizeof(T))>();
  } else {
    f.template operator()<1>();
  }
}

unsigned token_blocks(const ExpertLists& lists) {
  return static_cast<unsigned>(ceil_div(lists.tokens, kWarpsOfTokens));
}

template <class T>
void run_route_forward(const Route<T>& a, const Launch& on) {
  const bool at_once = orders_at_once(a.lists);
  launch_ahead(on, "route", at_once ? choose_experts<T, true> : choose_experts<T, false>,
               at_once ? 1U : token_blocks(a.lists), kWarpsOfTokens * 32, 0, a);
  if (!at_once) {
    order_rows(a.lists, on);
  }
}

template <class T>
void run_route_backward(const Route<T>& a, const Launch& on) {
  launch(on, "route's gradient", route_grad<T>, token_blocks(a.lists), kWarpsOfTokens * 32, 0, a);
}

template <class T>
void run_dispatch_forward(const Dispatch<T>& a, const Launch& on) {
  with_width(a.x, a.y, [&]<int kVec>() {
    launch_ahead(on, "dispatch", dispatch_rows<T, kVec>,
                 row_blocks<kVec>(a.lists.rows(), a.x.channels), kThreads, 0, a);
  });
}

template <class T>
void run_dispatch_backward(const Dispatch<T>& a, const Launch& on) {
  with_width(a.x, a.y, [&]<int kVec>() {
    launch(on, "dispatch's gradient", dispatch_grad<T, kVec>,
           row_blocks<kVec>(a.lists.tokens, a.x.channels), kThreads, 0, a);
  });
}

template <class T>
void run_combine_forward(const Combine<T>& a, const Launch& on) {
  // Of one width: what is added too.
  const View<T>& other = a.added.defined() && !aligned(a.added) ? a.added : a.y;
  with_width(a.x, other, [&]<int kVec>() {
    launch_ahead(on, "combine", combine_rows<T, kVec>,
                 row_blocks<kVec>(a.lists.tokens, a.y.channels), kThreads, 0, a);
  });
}

template <class T>
void run_combine_backward(const Combine<T>& a, const Launch& on) {
  with_width(a.x, a.y, [&]<int kVec>() {
    launch(on, "combine's gradient", combine_grad<T, kVec>, static_cast<unsigned>(a.lists.rows()),
           kThreads, 0, a);
  });
}

}  // namespace

void route_forward(const Route<float>& a, const Launch& on) {
  run_route_forward(a, on);
}
void route_forward(const Route<bf16>& a, const Launch& on) {
  run_route_forward(a, on);
}
void route_backward(const Route<float>& a, const Launch& on) {
  run_route_backward(a, on);
}
void route_backward(const Route<bf16>& a, const Launch& on) {
  run_route_backward(a, on);
}
void dispatch_forward(const Dispatch<float>& a, const Launch& on) {
  run_dispatch_forward(a, on);
}
void dispatch_forward(const Dispatch<bf16>& a, const Launch& on) {
  run_dispatch_forward(a, on);
}
void dispatch_backward(const Dispatch<float>& a, const Launch& on) {
  run_dispatch_backward(a, on);
}
void dispatch_backward(const Dispatch<bf16>& a, const Launch& on) {
  run_dispatch_backward(a, on);
}
void combine_forward(const Combine<float>& a, const Launch& on) {
  run_combine_forward(a, on);
}
void combine_forward(const Combine<bf16>& a, const Launch& on) {
  run_combine_forward(a, on);
}
void combine_backward(const Combine<float>& a, const Launch& on) {
  run_combine_backward(a, on);
}
void combine_backward(const Combine<bf16>& a, const Launch& on) {
  run_combine_backward(a, on);
}

}  // namespace cambium::cuda
