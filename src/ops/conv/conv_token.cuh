// The convolution of one token of one channel in a thread's registers, as part of another kernel.
// The bias and the taps are added in the order of conv_cuda.cu.
#pragma once

#include "ops/cuda.cuh"

namespace cambium::cuda {

/// Fewer taps than four are the last ones.
struct ConvChannel {
  static constexpr int kMostTaps = 4;

  float weight[kMostTaps];
  float past[kMostTaps - 1];
  float bias;

  __device__ __forceinline__ static int tap_of(int j, int taps) { return j - (kMostTaps - taps); }

  /// weights (C, taps), biases (C) or null.
  __device__ __forceinline__ void load_weights(const float* weights, const float* biases, int taps,
                                               int64_t c) {
#pragma unroll
    for (int j = 0; j < kMostTaps; ++j) {
      const int tap = tap_of(j, taps);
      weight[j] = tap >= 0 ? weights[c * taps + tap] : 0.0F;
    }
    bias = biases != nullptr ? biases[c] : 0.0F;
  }
  /// The inputs before the token, (C, taps - 1); none where the sequence begins.
  __device__ __forceinline__ void load_past(const float* inputs, int taps, int64_t c,
                                            bool continues) {
#pragma unroll
    for (int j = 0; j + 1 < kMostTaps; ++j) {
      const int tap = tap_of(j, taps);
      past[j] = tap >= 0 && continues ? inputs[c * (taps - 1) + tap] : 0.0F;
    }
  }
  /// silu of the sum, in a kernel of elements T.
  template <class T>
  __device__ __forceinline__ float activated(float x) const {
    float sum = bias;
#pragma unroll
    for (int j = 0; j + 1 < kMostTaps; ++j) {
      sum = fmaf(weight[j], past[j], sum);
    }
    return silu_of<T>(fmaf(weight[kMostTaps - 1], x, sum));
  }
  /// Leaves the inputs before the next token.
  __device__ __forceinline__ void leave_past(float* inputs, int taps, int64_t c, float x) const {
#pragma unroll
    for (int j = 0; j + 1 < kMostTaps; ++j) {
      const int tap = tap_of(j, taps);
      if (tap >= 0) {
        inputs[c * (taps - 1) + tap] = j + 2 < kMostTaps ? past[(j + 1) % (kMostTaps - 1)] : x;
      }
    }
  }
};

}  // namespace cambium::cuda
