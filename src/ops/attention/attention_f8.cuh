// Keys and values in fp8 for attention's kernel of many rows on tensor cores: copied as bf16.
#pragma once

#include "ops/attention/attention_mma.cuh"

namespace cambium::cuda::attention {

/// Copies the rows of keys or values (-1: none, zeros) to shared memory as bf16: what copy_keys()
/// does of bf16 pages, but that it is done on return.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_keys(const ScaledRows& from, int dim, int kv_head,
                                          const int64_t* key_rows, int keys, bf16* to) {
  constexpr int kChunks = kDim / 16;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < keys * kChunks; i += kThreads) {
    const int r = i / kChunks;
    const int d = i % kChunks * 16;
    const int64_t row = key_rows[r];
    uint4 codes = make_uint4(0, 0, 0, 0);
    uint32_t factor = 0;
    if (row >= 0 && d < dim) {
      codes = *reinterpret_cast<const uint4*>(from.rows.row(row, kv_head) + d);
      factor = factor_of(*from.scale(row, kv_head));
    }
    const uint2 x[4] = {widen_four(codes.x, factor), widen_four(codes.y, factor),
                        widen_four(codes.z, factor), widen_four(codes.w, factor)};
    auto* out = reinterpret_cast<uint4*>(to + r * shared_row(kDim) + d);
    out[0] = make_uint4(x[0].x, x[0].y, x[1].x, x[1].y);
    out[1] = make_uint4(x[2].x, x[2].y, x[3].x, x[3].y);
  }
}

}  // namespace cambium::cuda::attention
