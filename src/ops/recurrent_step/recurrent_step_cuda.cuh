// Private to the operation on CUDA: what its two forms share.
//
//   recurrent_step_cuda.cu       one kernel, a block a head
//   recurrent_step_many_cuda.cu  many heads: what is before the recurrence in one kernel, then the
//                                recurrence's and the norm's own
#pragma once

#include "ops/cuda.cuh"
#include "ops/recurrent_step/recurrent_step_kernels.h"

namespace cambium::cuda {

inline constexpr int kMostStepDim = 128;

__device__ __forceinline__ float softplus(float x) {
  return x > 20.0F ? x : log1pf(expf(x));
}

/// Element `i` of a head of q or k in shared memory, turned by the angle of its pair.
__device__ __forceinline__ float turned(const float* x, int i, int half, bool interleaved,
                                        float cos, float sin) {
  const bool second = interleaved ? i % 2 != 0 : i >= half;
  const int other = interleaved ? i ^ 1 : second ? i - half : i + half;
  return second ? x[i] * cos + x[other] * sin : x[i] * cos - x[other] * sin;
}
/// The pair of element `i`, of those that turn.
__device__ __forceinline__ int pair_of(int i, int half, bool interleaved) {
  return interleaved ? i / 2 : i < half ? i : i - half;
}

/// The log decay of what a head's projection gave, its bias added; rate = exp(a_log).
template <class T>
__device__ __forceinline__ float log_decay_of(const RecurrentStep<T>& a, float rate, float raw) {
  return a.bound < 0.0F ? a.bound * sigmoid(rate * raw) : -rate * softplus(raw);
}

/// Whether a call goes the way of many heads, and that way.
template <class T>
bool has_many_heads(const RecurrentStep<T>& a);
template <class T>
void run_many_heads(const RecurrentStep<T>& a, const Launch& on);

}  // namespace cambium::cuda
