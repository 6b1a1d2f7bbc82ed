// Rows of logits are cut into slices of kSlice, one a block, so that a few wide rows fill the GPU
// too. A slice is read once into registers; its exponentials are taken relative to its own largest
// logits, and what it leaves (SliceSums) is put together in slice order, in double precision, by a
// warp a row. Where a gradient is wanted a third kernel reads the logits again, from the L2 where
// the chunk fits, and writes it in their place.
#include "ops/cuda.cuh"
#include "ops/loss/loss_kernels.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 16;  // logits of a row a thread holds
constexpr int kSlice = kThreads * kElements;
constexpr int kWarps = 4;  // rows a block of combine_slices
constexpr unsigned kAll = 0xffffffffU;

/// e^x; for bf16 the hardware's, whose error is far below that of the logits.
template <class T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 2 ? __expf(x) : expf(x);
}

/// The largest logit and where it first stands, in one number that compares: the order of floats in
/// the upper half, then the lower index.
__device__ __forceinline__ uint64_t pack_largest(float value, int32_t index) {
  const uint32_t bits = __float_as_uint(value + 0.0F);  // no negative zero
  const uint32_t order = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return static_cast<uint64_t>(order) << 32 | static_cast<uint32_t>(~index);
}
__device__ __forceinline__ float largest_value(uint64_t packed) {
  const auto order = static_cast<uint32_t>(packed >> 32);
  return __uint_as_float((order >> 31) != 0 ? order & 0x7fffffffU : ~order);
}
__device__ __forceinline__ int32_t largest_index(uint64_t packed) {
  return ~static_cast<int32_t>(static_cast<uint32_t>(packed));
}
__device__ __forceinline__ uint64_t warp_largest(uint64_t x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint64_t other = __shfl_xor_sync(kAll, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}
__device__ __forceinline__ uint64_t block_largest(uint64_t x) {
  __shared__ uint64_t part[kThreads / 32];
  x = warp_largest(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    part[threadIdx.x / 32] = x;
  }
  __syncthreads();
  x = part[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) {
    x = part[i] > x ? part[i] : x;
  }
  return x;
}

/// What a slice leaves: sums of exponentials relative to its largest logits, and of those times the
/// difference of the scaled logits, each less its largest.
struct SliceSums {
  uint64_t student_largest;
  uint64_t teacher_largest;
  float plain;    // of the student at temperature 1
  float student;  // at the temperature
  float teacher;
  float teacher_difference;
  float student_difference;
};

/// What the gradient of a row takes.
struct RowFactors {
  float student_largest, teacher_largest;
  float plain, forward_q, forward_p, reverse;
  float offset;
  int32_t label;
};

/// The logits of a thread: kElements of the slice, V at a time, neighbouring threads side by side.
template <class T, int V>
struct Piece {
  float value[kElements / V][V];

  __device__ __forceinline__ static int64_t at(int64_t slice, int i) {
    return slice * kSlice + (static_cast<int64_t>(i) * kThreads + threadIdx.x) * V;
  }
  __device__ __forceinline__ void load(const T* row, int64_t slice, int64_t n) {
#pragma unroll
    for (int i = 0; i < kElements / V; ++i) {
      if (at(slice, i) < n) {
        load_n<V>(row + at(slice, i), value[i]);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          value[i][v] = -INFINITY;
        }
      }
    }
  }
  __device__ __forceinline__ uint64_t largest(int64_t slice) const {
    float best = value[0][0];
    auto where = static_cast<int32_t>(at(slice, 0));
#pragma unroll
    for (int i = 0; i < kElements / V; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (value[i][v] > best) {
          best = value[i][v];
          where = static_cast<int32_t>(at(slice, i)) + v;
        }
      }
    }
    return block_largest(pack_largest(best, where));
  }
};

template <class T, int V, bool kTeacher>
__global__ void __launch_bounds__(kThreads)
    sum_slices(LossRows<T> a, int64_t slices, SliceSums* sums) {
  const int64_t row = blockIdx.x / slices;
  const int64_t slice = blockIdx.x % slices;
  const int64_t n = a.vocabulary();
  const auto inverse = static_cast<float>(1.0 / a.temperature);
  const bool warm = kTeacher && a.temperature != 1.0;
  Piece<T, V> student;
  Piece<T, V> teacher;
  student.load(a.student.row(row), slice, n);
  if constexpr (kTeacher) {
    teacher.load(a.teacher.row(row), slice, n);
  }
  SliceSums out{};
  out.student_largest = student.largest(slice);
  float s_max = largest_value(out.student_largest);
  s_max = s_max == -INFINITY ? 0.0F : s_max;
  float t_max = 0.0F;
  if constexpr (kTeacher) {
    out.teacher_largest = teacher.largest(slice);
    t_max = largest_value(out.teacher_largest);
    t_max = t_max == -INFINITY ? 0.0F : t_max;
  }
#pragma unroll
  for (int i = 0; i < kElements / V; ++i) {
    if (Piece<T, V>::at(slice, i) < n) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float sx = student.value[i][v] - s_max;
        const float es = exponential<T>(kTeacher ? sx * inverse : sx);
        out.student += es;
        if (warm) {
          out.plain += exponential<T>(sx);
        }
        if constexpr (kTeacher) {
          const float tx = teacher.value[i][v] - t_max;
          const float et = exponential<T>(tx * inverse);
          const float difference = (sx - tx) * inverse;
          out.teacher += et;
          out.teacher_difference = fmaf(et, difference, out.teacher_difference);
          out.student_difference = fmaf(es, difference, out.student_difference);
        }
      }
    }
  }
  out.student = block_sum<kThreads>(out.student);
  out.plain = warm ? block_sum<kThreads>(out.plain) : out.student;
  if constexpr (kTeacher) {
    out.teacher = block_sum<kThreads>(out.teacher);
    out.teacher_difference = block_sum<kThreads>(out.teacher_difference);
    out.student_difference = block_sum<kThreads>(out.student_difference);
  }
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = out;
  }
}

__device__ __forceinline__ double warp_total(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x += __shfl_xor_sync(kAll, x, lanes);
  }
  return x;
}

/// A row a warp: its sums from those of its slices.
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    combine_slices(LossRows<T> a, int64_t slices, const SliceSums* sums, RowFactors* factors) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= a.student.count()) {
    return;
  }
  const bool has_teacher = a.teacher.defined();
  sums += row * slices;
  uint64_t student_largest = 0;
  uint64_t teacher_largest = 0;
  for (int64_t i = lane; i < slices; i += 32) {
    student_largest = max(student_largest, sums[i].student_largest);
    teacher_largest = max(teacher_largest, sums[i].teacher_largest);
  }
  student_largest = warp_largest(student_largest);
  teacher_largest = warp_largest(teacher_largest);
  const double s_max = largest_value(student_largest);
  const double t_max = has_teacher ? largest_value(teacher_largest) : 0.0F;
  const double inverse = has_teacher ? 1.0 / a.temperature : 1.0;
  double plain = 0.0;
  double student = 0.0;
  double teacher = 0.0;
  double teacher_difference = 0.0;
  double student_difference = 0.0;
  for (int64_t i = lane; i < slices; i += 32) {
    const SliceSums part = sums[i];
    // A slice of nothing but -infinity took 0 for its largest; its sums are 0.
    double s_down = static_cast<double>(largest_value(part.student_largest)) - s_max;
    s_down = isinf(s_down) ? 0.0 : s_down;
    const double s_share = exp(s_down * inverse);
    student += s_share * static_cast<double>(part.student);
    plain += exp(s_down) * static_cast<double>(part.plain);
    if (has_teacher) {
      double t_down = static_cast<double>(largest_value(part.teacher_largest)) - t_max;
      t_down = isinf(t_down) ? 0.0 : t_down;
      const double t_share = exp(t_down * inverse);
      const double moved = (s_down - t_down) * inverse;
      teacher += t_share * static_cast<double>(part.teacher);
      teacher_difference += t_share * (static_cast<double>(part.teacher_difference) +
                                       static_cast<double>(part.teacher) * moved);
      student_difference += s_share * (static_cast<double>(part.student_difference) +
                                       static_cast<double>(part.student) * moved);
    }
  }
  plain = warp_total(plain);
  student = warp_total(student);
  teacher = warp_total(teacher);
  teacher_difference = warp_total(teacher_difference);
  student_difference = warp_total(student_difference);
  if (lane != 0) {
    return;
  }
  const int32_t label = a.label[row];
  const auto label_logit = static_cast<double>(load(a.student.row(row) + label));
  LossRow result{};
  result.cross_entropy = log(plain) - (label_logit - s_max);
  result.correct = largest_index(student_largest) == label;
  double offset = 0.0;
  if (has_teacher) {
    // log q - log p = difference - normaliser
    const double normaliser = log(student) - log(teacher);
    result.agreement = largest_index(student_largest) == largest_index(teacher_largest);
    result.forward_kl = normaliser - teacher_difference / teacher;
    result.reverse_kl = student_difference / student - normaliser;
    offset = -normaliser - result.reverse_kl;
  }
  a.result[row] = result;
  if (factors != nullptr) {
    factors[row] = {.student_largest = static_cast<float>(s_max),
                    .teacher_largest = static_cast<float>(t_max),
                    .plain = static_cast<float>(a.cross_entropy / plain),
                    .forward_q = static_cast<float>(a.forward_kl / student),
                    .forward_p = has_teacher ? static_cast<float>(a.forward_kl / teacher) : 0.0F,
                    .reverse = static_cast<float>(a.reverse_kl / student),
                    .offset = static_cast<float>(offset),
                    .label = label};
  }
}

/// dL/dlogit = ce (q1 - onehot) + forward (q - p) + reverse q (log q - log p - KL), in place of the
/// student's logits.
template <class T, int V, bool kTeacher>
__global__ void __launch_bounds__(kThreads)
    write_gradient(LossRows<T> a, int64_t slices, const RowFactors* factors) {
  const int64_t row = blockIdx.x / slices;
  const int64_t slice = blockIdx.x % slices;
  const int64_t n = a.vocabulary();
  const auto inverse = static_cast<float>(1.0 / a.temperature);
  const bool plain_too = kTeacher && a.cross_entropy != 0.0 && a.temperature != 1.0;
  T* s = a.student.row(row);
  Piece<T, V> student;
  Piece<T, V> teacher;
  student.load(s, slice, n);
  if constexpr (kTeacher) {
    teacher.load(a.teacher.row(row), slice, n);
  }
  const RowFactors f = factors[row];
  const auto cross_entropy = static_cast<float>(a.cross_entropy);
#pragma unroll
  for (int i = 0; i < kElements / V; ++i) {
    const int64_t at = Piece<T, V>::at(slice, i);
    if (at < n) {
      float gradient[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float sx = student.value[i][v] - f.student_largest;
        float g;
        if constexpr (kTeacher) {
          const float tx = teacher.value[i][v] - f.teacher_largest;
          const float es = exponential<T>(sx * inverse);
          g = f.plain * (plain_too ? exponential<T>(sx) : es);
          g = fmaf(f.forward_q, es, g);
          if (a.forward_kl != 0.0) {
            g = fmaf(-f.forward_p, exponential<T>(tx * inverse), g);
          }
          g = fmaf(f.reverse * es, fmaf(sx - tx, inverse, f.offset), g);
        } else {
          g = f.plain * exponential<T>(sx);
        }
        gradient[v] = at + v == f.label ? g - cross_entropy : g;
      }
      store_n<V>(s + at, gradient);
    }
  }
}

/// A row a block: the logits of its k tokens are taken out of it (-infinity stands for them), so
/// that what is left is the rest, whose gradient is its exponentials times one number.
template <class T>
__global__ void __launch_bounds__(kThreads) stored_loss(StoredLossRows<T> a) {
  const int64_t row = blockIdx.x;
  const int64_t n = a.vocabulary();
  const int64_t k = a.k;
  const auto thread = static_cast<int64_t>(threadIdx.x);
  T* s = a.student.row(row);
  const int32_t* token = a.token + row * k;
  const float* log_p = a.log_p + row * (k + 1);
  float* logit = a.logit + row * k;
  const int32_t label = a.label[row];
  const float label_logit = load(s + label);
  const auto find_largest = [&] {
    uint64_t best = 0;
    for (int64_t v = thread; v < n; v += kThreads) {
      best = max(best, pack_largest(load(s + v), static_cast<int32_t>(v)));
    }
    return block_largest(best);
  };
  const uint64_t choice = find_largest();
  const float largest = largest_value(choice);
  float head = 0.0F;
  for (int64_t i = thread; i < k; i += kThreads) {
    logit[i] = load(s + token[i]);
    head += exponential<T>(logit[i] - largest);
  }
  double total = block_sum<kThreads>(head);
  for (int64_t i = thread; i < k; i += kThreads) {
    store(s + token[i], -INFINITY);
  }
  __syncthreads();
  const bool rest = k < n;
  float rest_largest = 0.0F;
  double rest_sum = 1.0;
  double log_rest = -1e30;
  if (rest) {
    rest_largest = largest_value(find_largest());
    float sum = 0.0F;
    for (int64_t v = thread; v < n; v += kThreads) {
      sum += exponential<T>(load(s + v) - rest_largest);
    }
    rest_sum = block_sum<kThreads>(sum);
    log_rest = static_cast<double>(rest_largest - largest) + log(rest_sum);
    total += exp(log_rest);
  }
  const double log_total = log(total);
  float forward_part = 0.0F;
  float reverse_part = 0.0F;
  for (int64_t c = thread; c < (rest ? k + 1 : k); c += kThreads) {
    const double log_q = (c < k ? static_cast<double>(logit[c] - largest) : log_rest) - log_total;
    const auto p = static_cast<double>(log_p[c]);
    forward_part += static_cast<float>(exp(p) * (p - log_q));
    reverse_part += static_cast<float>(exp(log_q) * (log_q - p));
  }
  const double forward = block_sum<kThreads>(forward_part);
  const double reverse = block_sum<kThreads>(reverse_part);
  if (thread == 0) {
    LossRow result{};
    result.cross_entropy = log_total - static_cast<double>(label_logit - largest);
    result.forward_kl = forward;
    result.reverse_kl = reverse;
    result.agreement = largest_index(choice) == token[0];
    result.correct = largest_index(choice) == label;
    a.result[row] = result;
  }
  if (!a.gradient) {
    return;
  }
  const auto by_logits = [&](double log_q, double p) {
    const double q = exp(log_q);
    return a.cross_entropy * q + a.forward_kl * (q - exp(p)) +
           a.reverse_kl * q * (log_q - p - reverse);
  };
  if (rest) {
    const auto factor = static_cast<float>(
        by_logits(log_rest - log_total, static_cast<double>(log_p[k])) / rest_sum);
    for (int64_t v = thread; v < n; v += kThreads) {
      const float e = exponential<T>(load(s + v) - rest_largest);
      store(s + v, factor * e - (v == label ? static_cast<float>(a.cross_entropy) : 0.0F));
    }
  }
  __syncthreads();
  for (int64_t i = thread; i < k; i += kThreads) {
    const double g = by_logits(static_cast<double>(logit[i] - largest) - log_total,
                               static_cast<double>(log_p[i]));
    store(s + token[i], static_cast<float>(token[i] == label ? g - a.cross_entropy : g));
  }
}

/// A row a block.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) align(AlignRows<T> a) {
  const int64_t i = blockIdx.x;
  __shared__ int64_t shared_row;
  if (threadIdx.x == 0) {
    shared_row = a.row[i];
  }
  __syncthreads();
  const int64_t row = shared_row;
  const T* out = a.out.row(row);
  const T* target = a.target.row(row);
  const int64_t n = a.out.channels;
  float sum = 0.0F;
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < n; c += kThreads * V) {
    float x[V];
    float y[V];
    load_n<V>(out + c, x);
    load_n<V>(target + c, y);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float d = x[v] - y[v];
      sum = fmaf(d, d, sum);
    }
  }
  const double square = block_sum<kThreads>(sum);
  const auto channels = static_cast<double>(n);
  const double norm = sqrt(square * channels);
  if (threadIdx.x == 0) {
    a.result[i] = a.squared ? square / channels : norm / channels;
  }
  if (a.out.grad == nullptr) {
    return;
  }
  const double factor = a.squared ? 2.0 / channels : (norm > 0.0 ? 1.0 / norm : 0.0);
  const auto scale = static_cast<float>(a.scale * factor);
  T* grad = a.out.grad_row(row);
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < n; c += kThreads * V) {
    float x[V];
    float y[V];
    float g[V];
    load_n<V>(out + c, x);
    load_n<V>(target + c, y);
    load_n<V>(grad + c, g);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      g[v] = fmaf(scale, x[v] - y[v], g[v]);
    }
    store_n<V>(grad + c, g);
  }
}

template <class T, int V, bool kTeacher>
void run_loss(const LossRows<T>& a, const Launch& on) {
  const int64_t rows = a.student.count();
  const int64_t slices = ceil_div(a.vocabulary(), kSlice);
  auto* sums = scratch<SliceSums>(on, rows * slices);
  auto* factors = a.gradient ? scratch<RowFactors>(on, rows) : nullptr;
  const auto blocks = static_cast<unsigned>(rows * slices);
  launch(on, "loss_rows", sum_slices<T, V, kTeacher>, blocks, kThreads, 0, a, slices, sums);
  launch(on, "loss_rows", combine_slices<T>, static_cast<unsigned>(ceil_div(rows, kWarps)),
         kWarps * 32, 0, a, slices, sums, factors);
  if (a.gradient) {
    launch(on, "loss_rows", write_gradient<T, V, kTeacher>, blocks, kThreads, 0, a, slices,
           factors);
  }
}

template <class T>
void run_loss(const LossRows<T>& a, const Launch& on) {
  constexpr int kWidth = 16 / sizeof(T);
  if (a.teacher.defined()) {
    aligned(a.student) && aligned(a.teacher) ? run_loss<T, kWidth, true>(a, on)
                                             : run_loss<T, 1, true>(a, on);
  } else {
    aligned(a.student) ? run_loss<T, kWidth, false>(a, on) : run_loss<T, 1, false>(a, on);
  }
}

template <class T>
void run_align(const AlignRows<T>& a, const Launch& on) {
  const auto blocks = static_cast<unsigned>(a.rows);
  if (aligned(a.out) && aligned(a.target)) {
    launch(on, "align_rows", align<T, 16 / sizeof(T)>, blocks, kThreads, 0, a);
  } else {
    launch(on, "align_rows", align<T, 1>, blocks, kThreads, 0, a);
  }
}

}  // namespace

void loss_rows(const LossRows<float>& a, const Launch& on) {
  run_loss(a, on);
}
void loss_rows(const LossRows<bf16>& a, const Launch& on) {
  run_loss(a, on);
}

void stored_loss_rows(const StoredLossRows<float>& a, const Launch& on) {
  launch(on, "stored_loss_rows", stored_loss<float>, static_cast<unsigned>(a.student.count()),
         kThreads, 0, a);
}
void stored_loss_rows(const StoredLossRows<bf16>& a, const Launch& on) {
  launch(on, "stored_loss_rows", stored_loss<bf16>, static_cast<unsigned>(a.student.count()),
         kThreads, 0, a);
}

void align_rows(const AlignRows<float>& a, const Launch& on) {
  run_align(a, on);
}
void align_rows(const AlignRows<bf16>& a, const Launch& on) {
  run_align(a, on);
}

}  // namespace cambium::cuda
