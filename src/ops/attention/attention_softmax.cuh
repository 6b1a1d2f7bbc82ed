// The running softmax of rows whose scores a warp has from tensor cores.
#pragma once

#include "ops/attention/attention_mma.cuh"

namespace cambium::cuda::attention {

/// The running softmax of a warp's kM x 16 rows: number m 2 + half is of row 16 m + 8 half + l / 4.
template <int kDim, int kM>
struct Softmax {
  float largest[kM * 2];  // before the scale
  float sum[kM * 2];      // of this lane's columns
  float y[kM][kDim / 8][4];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      largest[2 * m] = largest[2 * m + 1] = -INFINITY;
      sum[2 * m] = sum[2 * m + 1] = 0.0F;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          y[m][n][e] = 0.0F;
        }
      }
    }
  }
  /// Scores become probabilities, and what was summed is taken relative to the new largest score.
  /// scale: positive, for powers of two.
  template <int kN>
  __device__ __forceinline__ void add_scores(float scale, float (&s)[kM][kN][4]) {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2;
      const int e = i % 2 * 2;
      float most = largest[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        most = fmaxf(most, fmaxf(s[m][n][e], s[m][n][e + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
      // Nothing seen yet: any finite number keeps exp2 from -inf - -inf.
      const float base = most == -INFINITY ? 0.0F : most * scale;
      const float shrink = fast_exp2(fmaf(largest[i], scale, -base));
      largest[i] = most;
      float added = 0.0F;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        s[m][n][e] = fast_exp2(fmaf(s[m][n][e], scale, -base));
        s[m][n][e + 1] = fast_exp2(fmaf(s[m][n][e + 1], scale, -base));
        added += s[m][n][e] + s[m][n][e + 1];
      }
      sum[i] = fmaf(sum[i], shrink, added);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        y[m][n][e] *= shrink;
        y[m][n][e + 1] *= shrink;
      }
    }
  }
  /// The sums of whole rows, in every lane of a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 2);
    }
  }
};

}  // namespace cambium::cuda::attention
