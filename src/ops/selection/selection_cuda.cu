// The choice on CUDA: scores of some tokens at a time, then for each token its best ones by the
// digits of their scores, in ascending order of position.
#include <algorithm>

#include "ops/attention/attention_cuda.cuh"
#include "ops/latent_attention/latent_cuda.cuh"
#include "ops/selection/selection_kernels.h"

namespace cambium::cuda {
namespace selection {
namespace {

using latent::number;
using latent::odd;

constexpr int kThreads = 256;
/// Keys of a block, a thread each.
constexpr int kKeys = 128;
/// Heads whose products a thread holds at a time.
constexpr int kHeads = 4;
/// Scores held at a time.
constexpr int64_t kMostScores = int64_t{1} << 24;

constexpr size_t score_shared(int heads, int dim) {
  return sizeof(float) * static_cast<size_t>((heads + kHeads) * dim + kKeys * odd(dim));
}

/// Blocks (keys / kKeys, tokens from `first` on). Shared memory: queries (D, H padded to kHeads),
/// keys (kKeys, odd).
template <class T>
__global__ void __launch_bounds__(kKeys)
    score_kernel(ChooseTokens<T> a, attention::Layout layout, const int32_t* segments,
                 int64_t first, int64_t capacity, float* scores) {
  extern __shared__ __align__(16) float shared[];
  const auto dim = static_cast<int>(a.shape.head_dim);
  const auto heads = static_cast<int>(a.shape.heads);
  const int padded = (heads + kHeads - 1) / kHeads * kHeads;
  float* queries = shared;
  float* keys = queries + padded * dim;
  const int64_t t = first + blockIdx.y;
  const int s = segments[t];
  const int64_t own = layout.position[s] + t - layout.start[s];
  const int64_t begin = int64_t{blockIdx.x} * kKeys;
  if (begin > own || own < a.budget) {
    return;
  }
  const auto thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < padded * dim; i += kKeys) {
    const int h = i / dim;
    queries[i % dim * padded + h] = h < heads ? load(a.q.row(t, h) + i % dim) : 0.0F;
  }
  for (int r = thread / 32; r < kKeys; r += kKeys / 32) {
    const int64_t p = begin + r;
    const int64_t row = p <= own ? layout.key_row(s, static_cast<int>(p)) : -1;
    for (int d = thread % 32; d < dim; d += 32) {
      keys[r * odd(dim) + d] = row < 0 ? 0.0F : number(a.keys, row, d);
    }
  }
  __syncthreads();
  if (begin + thread > own) {
    return;
  }
  float score = 0.0F;
  for (int h = 0; h < heads; h += kHeads) {
    float dot[kHeads] = {};
    for (int d = 0; d < dim; ++d) {
      const float key = keys[thread * odd(dim) + d];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        dot[i] += queries[d * padded + h + i] * key;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (h + i < heads) {
        score += load(a.weight.row(t) + h + i) * fmaxf(dot[i], 0.0F);
      }
    }
  }
  scores[int64_t{blockIdx.y} * capacity + begin + thread] = score;
}

/// The number of set flags among the threads before this one, and of all; every thread calls.
__device__ int rank_among(bool flag, int& all) {
  __shared__ int part[kThreads / 32];
  const unsigned votes = __ballot_sync(0xffffffffU, flag);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncthreads();  // the array may still be read from an earlier call
  if (lane == 0) {
    part[threadIdx.x / 32] = __popc(votes);
  }
  __syncthreads();
  int before = __popc(votes & ((1U << lane) - 1U));
  all = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < static_cast<int>(threadIdx.x) / 32 ? part[w] : 0;
    all += part[w];
  }
  return before;
}

/// A block a token. Counts of digits are whole numbers: the order they are added in does not
/// matter.
template <class T>
__global__ void __launch_bounds__(kThreads)
    choose_kernel(ChooseTokens<T> a, attention::Layout layout, const int32_t* segments,
                  int64_t first, int64_t capacity, const float* all_scores) {
  __shared__ int counts[256];
  __shared__ uint32_t chosen_prefix;
  __shared__ int chosen_left;
  const int64_t t = first + blockIdx.x;
  const int s = segments[t];
  const auto own = static_cast<int>(layout.position[s] + t - layout.start[s]);
  int32_t* to = a.positions + t * a.budget;
  const auto thread = static_cast<int>(threadIdx.x);
  if (own < a.budget) {
    for (int p = thread; p <= own; p += kThreads) {
      to[p] = p;
    }
    return;
  }
  const float* scores = all_scores + int64_t{blockIdx.x} * capacity;
  uint32_t prefix = 0;
  int left = static_cast<int>(a.budget);
  for (int shift = 24; shift >= 0; shift -= 8) {
    counts[thread] = 0;
    __syncthreads();
    const uint32_t mask = shift == 24 ? 0U : 0xffffffffU << (shift + 8);
    for (int p = thread; p <= own; p += kThreads) {
      const uint32_t bits = ordered_bits(__float_as_uint(scores[p]));
      if ((bits & mask) == prefix) {
        atomicAdd(&counts[(bits >> shift) & 0xffU], 1);
      }
    }
    __syncthreads();
    if (thread == 0) {
      int digit = 255;
      while (counts[digit] < left) {
        left -= counts[digit];
        --digit;
      }
      chosen_prefix = prefix | (static_cast<uint32_t>(digit) << shift);
      chosen_left = left;
    }
    __syncthreads();
    prefix = chosen_prefix;
    left = chosen_left;
    __syncthreads();
  }
  int written = 0;
  int equal_before = 0;
  for (int strip = 0; strip <= own; strip += kThreads) {
    const int p = strip + thread;
    const uint32_t bits = p <= own ? ordered_bits(__float_as_uint(scores[p])) : 0U;
    const bool equal = p <= own && bits == prefix;
    int equals = 0;
    const int rank = equal_before + rank_among(equal, equals);
    const bool take = p <= own && (bits > prefix || (equal && rank < left));
    int taken = 0;
    const int place = written + rank_among(take, taken);
    if (take) {
      to[place] = p;
    }
    equal_before += equals;
    written += taken;
  }
}

template <class T>
void choose(const ChooseTokens<T>& a, const Launch& on) {
  const AttentionShape& shape = a.shape;
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const latent::Tokens tokens = latent::tokens_of(shape, on);
  // As far as the table reaches: the same for steps that follow each other.
  int64_t capacity = shape.pages_per_segment * shape.page_size;
  for (int64_t s = 0; shape.table == nullptr && s < shape.segments; ++s) {
    capacity = std::max(capacity, shape.length(s));
  }
  const int64_t all = a.q.rows.outer;
  const int64_t each = std::clamp<int64_t>(kMostScores / std::max<int64_t>(capacity, 1), 1,
                                           std::min<int64_t>(std::max<int64_t>(all, 1), 32768));
  float* scores = scratch<float>(on, each * capacity);
  for (int64_t first = 0; first < all; first += each) {
    const auto count = static_cast<unsigned>(std::min(each, all - first));
    launch(on, "choose_tokens", score_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div(capacity, kKeys)), count), dim3(kKeys),
           score_shared(static_cast<int>(shape.heads), static_cast<int>(shape.head_dim)),
           latent::for_device(a), layout.layout, tokens.segment, first, capacity, scores);
    launch(on, "choose_tokens", choose_kernel<T>, dim3(count), dim3(kThreads), 0,
           latent::for_device(a), layout.layout, tokens.segment, first, capacity, scores);
  }
}

}  // namespace
}  // namespace selection

void choose_tokens_of(const ChooseTokens<float>& a, const Launch& on) {
  selection::choose(a, on);
}
void choose_tokens_of(const ChooseTokens<bf16>& a, const Launch& on) {
  selection::choose(a, on);
}

}  // namespace cambium::cuda
