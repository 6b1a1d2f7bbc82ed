// A thread takes kN elements: of the result in the forward kernel; in the backward one of a's
// gradient, or of b's with what all heads give it.
#include "ops/cuda.cuh"
#include "ops/join_heads/join_heads_kernels.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;

template <int kN, class T>
__global__ void __launch_bounds__(kThreads) join_forward(JoinHeads<T> j, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  await_inputs();
  if (i >= count) {
    return;
  }
  const int64_t chunks = j.y.channels / kN;
  const int64_t row = i / chunks;
  const int64_t c = i % chunks * kN;
  const int64_t t = row / j.heads();
  const int64_t h = row % j.heads();
  const T* from =
      c < j.a.channels ? j.a.row(t, h) + c : j.b.row(t, j.shared() ? 0 : h) + (c - j.a.channels);
  *reinterpret_cast<Packed<kN, T>*>(j.y.row(t, h) + c) =
      *reinterpret_cast<const Packed<kN, T>*>(from);
}

template <int kN, class T>
__device__ void add_n(T* to, const T* from, int64_t rows, int64_t stride) {
  float sum[kN];
  load_n<kN>(to, sum);
  for (int64_t r = 0; r < rows; ++r) {
    float x[kN];
    load_n<kN>(from + r * stride, x);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      sum[i] += x[i];
    }
  }
  store_n<kN>(to, sum);
}

template <int kN, class T>
__global__ void __launch_bounds__(kThreads)
    join_backward(JoinHeads<T> j, int64_t of_a, int64_t of_b) {
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < of_a) {
    const int64_t chunks = j.a.channels / kN;
    const int64_t c = i % chunks * kN;
    const int64_t t = i / chunks / j.heads();
    const int64_t h = i / chunks % j.heads();
    add_n<kN>(j.a.grad_row(t, h) + c, j.y.grad_row(t, h) + c, 1, 0);
    return;
  }
  i -= of_a;
  if (i < of_b) {
    const int64_t chunks = j.b.channels / kN;
    const int64_t c = i % chunks * kN;
    const int64_t t = i / chunks / j.b.rows.inner;
    const int64_t h = i / chunks % j.b.rows.inner;
    add_n<kN>(j.b.grad_row(t, h) + c, j.y.grad_row(t, h) + j.a.channels + c,
              j.shared() ? j.heads() : 1, j.y.channels);
  }
}

/// Whether every row of x and of its gradient can be taken kN elements at a time.
template <int kN, class T>
bool in_vectors(const JoinHeads<T>& j) {
  return aligned(j.a, kN) && aligned(j.b, kN) && aligned(j.y, kN);
}

template <class T>
void forward(const JoinHeads<T>& j, const Launch& on) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = in_vectors<kWide>(j);
  const int64_t count = j.y.count() * j.y.channels / (wide ? kWide : 1);
  launch_ahead(on, "join_heads", wide ? join_forward<kWide, T> : join_forward<1, T>,
               static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, j, count);
}

template <class T>
void backward(const JoinHeads<T>& j, const Launch& on) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = in_vectors<kWide>(j);
  const auto threads = [&](const View<T>& x) {
    return x.grad == nullptr ? 0 : x.count() * x.channels / (wide ? kWide : 1);
  };
  launch(on, "join_heads's gradient", wide ? join_backward<kWide, T> : join_backward<1, T>,
         static_cast<unsigned>(ceil_div(threads(j.a) + threads(j.b), kThreads)), kThreads, 0, j,
         threads(j.a), threads(j.b));
}

}  // namespace

void join_heads_forward(const JoinHeads<float>& j, const Launch& on) {
  forward(j, on);
}
void join_heads_forward(const JoinHeads<bf16>& j, const Launch& on) {
  forward(j, on);
}
void join_heads_backward(const JoinHeads<float>& j, const Launch& on) {
  backward(j, on);
}
void join_heads_backward(const JoinHeads<bf16>& j, const Launch& on) {
  backward(j, on);
}

}  // namespace cambium::cuda
