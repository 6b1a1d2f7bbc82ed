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

template <class Y>
struct StreamProduct {
  const bf16* weight;
  const float* bias;
  Y* y;
  int64_t y_stride;
  int32_t first_row;  // of all products' rows
  int32_t accumulate;
};
template <class Y>
struct StreamRows {
  const bf16* x;
  int64_t x_stride;
  int32_t rows;  // of all weights
  int32_t k;
  int32_t count;      // of products
  int32_t team_bits;  // a row's warps are 1 << team_bits
  int32_t stages;
  int32_t before_inputs;  // whether weights may be read before the kernels before this one are done
  int32_t dealt;          // of the rows: evenly, before it begins; blocks may draw the others
  int32_t drawn;          // at once
  int32_t last_draw;      // the number of the last one that blocks make, in vain
  int32_t ahead;          // stages that may be on their way when the next rows are drawn
  StreamProduct<Y> each[kMaxMatmuls];
};

/// As many rows as there are teams at most, of one weight; none: there is nothing left.
struct TileRows {
  int row, rows, product;
};

/// The tiles of rows that lie together.
struct Tile : TileRows {
  /// Of this block's share of the first `dealt` rows: they are dealt evenly.
  template <class Y>
  __device__ Tile(const StreamRows<Y>& a, int dealt) {
    product = 0;
    take(a, static_cast<int>(int64_t{dealt} * blockIdx.x / gridDim.x),
         static_cast<int>(int64_t{dealt} * (blockIdx.x + 1) / gridDim.x));
  }
  __device__ bool exists() const { return rows > 0; }
  template <class Y>
  __device__ void next(const StreamRows<Y>& a) {
    take(a, row + rows, end);
  }
  /// Goes on with other rows, behind those before.
  template <class Y>
  __device__ void take(const StreamRows<Y>& a, int first, int last) {
    row = first;
    end = last;
    while (product + 1 < a.count && row >= a.each[product + 1].first_row) {
      ++product;
    }
    const int here = product + 1 < a.count ? min(end, a.each[product + 1].first_row) : end;
    rows = max(0, min(here - row, kStreamWarps >> a.team_bits));
  }

  int end;
};

/// Multiplies three to eight rows of x by tensor cores. False, and nothing done, where the widths
/// do not suit it. `a` is filled but for team_bits and stages.
template <class Y>
bool stream_by_tensor_cores(StreamRows<Y> a, int64_t x_rows, const Launch& on);

}  // namespace cambium::cuda
