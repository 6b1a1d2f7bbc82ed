// Forward a thread takes kN elements of a head. Backward a block takes a head over a chunk of
// tokens, so that the sum over a head's chunks, a warp's, has a fixed order.
#include "ops/cuda.cuh"
#include "ops/scale_heads/scale_heads_kernels.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunks = 64;  // of tokens: a constant, as the order of sums depends on it

template <int kN, class T>
__global__ void __launch_bounds__(kThreads) scale_forward(ScaleHeads<T> a, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  await_inputs();
  if (i >= count) {
    return;
  }
  const int64_t chunks = a.x.channels / kN;
  const int64_t row = i / chunks;
  const int64_t c = i % chunks * kN;
  const int64_t h = row % a.heads();
  float x[kN];
  load_n<kN>(a.x.row(row / a.heads(), h) + c, x);
  const float factor = a.factor.data[h];
#pragma unroll
  for (float& v : x) {
    v *= factor;
  }
  store_n<kN>(a.y.row(row) + c, x);
}

/// partial (H, chunks): sums of x dy, or null where they are not wanted.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_backward(ScaleHeads<T> a, int64_t chunks, int64_t chunk, float* partial) {
  const int64_t h = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * chunk;
  const int64_t tokens = first + chunk < a.tokens() ? chunk : a.tokens() - first;
  const float factor = a.factor.data[h];
  float sum = 0.0F;
  for (int64_t i = threadIdx.x; i < tokens * a.x.channels; i += kThreads) {
    const int64_t t = first + i / a.x.channels;
    const int64_t c = i % a.x.channels;
    const float dy = load(a.y.grad_row(t, h) + c);
    sum = fmaf(load(a.x.row(t, h) + c), dy, sum);
    if (a.x.grad != nullptr) {
      add_to(a.x.grad_row(t, h) + c, factor * dy);
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0 && partial != nullptr) {
    partial[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(32) add_chunks(const float* partial, int64_t chunks, float* to) {
  float sum = 0.0F;
  for (int64_t i = threadIdx.x; i < chunks; i += 32) {
    sum += partial[blockIdx.x * chunks + i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) {
    to[blockIdx.x] += sum;
  }
}

template <class T>
void forward(const ScaleHeads<T>& a, const Launch& on) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = aligned(a.x, kWide) && aligned(a.y, kWide);
  const int64_t count = a.y.count() * a.y.channels / (wide ? kWide : 1);
  launch_ahead(on, "scale_heads", wide ? scale_forward<kWide, T> : scale_forward<1, T>,
               static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, a, count);
}

template <class T>
void backward(const ScaleHeads<T>& a, const Launch& on) {
  if (a.tokens() == 0) {
    return;
  }
  const char* name = "scale_heads's gradient";
  const int64_t chunk = ceil_div(a.tokens(), kChunks);
  const int64_t chunks = ceil_div(a.tokens(), chunk);
  const auto heads = static_cast<unsigned>(a.heads());
  float* partial = a.factor.grad == nullptr ? nullptr : scratch<float>(on, a.heads() * chunks);
  launch(on, name, scale_backward<T>, heads * static_cast<unsigned>(chunks), kThreads, 0, a, chunks,
         chunk, partial);
  if (partial != nullptr) {
    launch(on, name, add_chunks, heads, 32, 0, partial, chunks, a.factor.grad);
  }
}

}  // namespace

void scale_heads_forward(const ScaleHeads<float>& a, const Launch& on) {
  forward(a, on);
}
void scale_heads_forward(const ScaleHeads<bf16>& a, const Launch& on) {
  forward(a, on);
}
void scale_heads_backward(const ScaleHeads<float>& a, const Launch& on) {
  backward(a, on);
}
void scale_heads_backward(const ScaleHeads<bf16>& a, const Launch& on) {
  backward(a, on);
}

}  // namespace cambium::cuda
