// What the streamed products share (matmul_stream_cuda.cu, matmul_stream_tensor_cuda.cu).
#pragma once

#include <cstdint>

#include "ops/cuda.cuh"
#include "ops/cuda_bulk.cuh"
#include "ops/matmul/matmul_cuda.cuh"

namespace cambium::cuda {

inline constexpr int kStreamWarps = 16;  // that multiply
inline constexpr int kBringer = kStreamWarps;
inline constexpr int kFinisher = kStreamWarps + 1;
inline constexpr int kStreamThreads = (kStreamWarps + 2) * 32;
inline constexpr int kVector = 8;  // columns of 16 bytes

struct StreamProduct {
  const bf16* weight;
  const float* bias;
  bf16* y;
  int64_t y_stride;
  int32_t first_row;  // of all products' rows
  int32_t accumulate;
};
struct StreamRows {
  const bf16* x;
  int64_t x_stride;
  int32_t rows;  // of all weights
  int32_t k;
  int32_t count;      // of products
  int32_t team_bits;  // a row's warps are 1 << team_bits
  int32_t stages;
  int32_t before_inputs;  // whether weights may be read before the kernels before this one are done
  StreamProduct each[kMaxMatmuls];
};

/// Tiles of a block's share: as many rows as there are teams, of one weight.
struct Tile {
  int row;
  int end;
  int product = 0;
  int rows = 0;

  /// The share of this block: rows are dealt evenly.
  __device__ explicit Tile(const StreamRows& a)
      : row(static_cast<int>(int64_t{a.rows} * blockIdx.x / gridDim.x)),
        end(static_cast<int>(int64_t{a.rows} * (blockIdx.x + 1) / gridDim.x)) {
    find(a);
  }
  __device__ bool exists() const { return rows > 0; }
  __device__ void next(const StreamRows& a) {
    row += rows;
    find(a);
  }

 private:
  __device__ void find(const StreamRows& a) {
    while (product + 1 < a.count && row >= a.each[product + 1].first_row) {
      ++product;
    }
    const int last = product + 1 < a.count ? min(end, a.each[product + 1].first_row) : end;
    rows = max(0, min(last - row, kStreamWarps >> a.team_bits));
  }
};

/// Multiplies three to eight rows of x by tensor cores. False, and nothing done, where the widths
/// do not suit it. `a` is filled but for team_bits and stages.
bool stream_by_tensor_cores(StreamRows a, int64_t x_rows, const Launch& on);

}  // namespace cambium::cuda
