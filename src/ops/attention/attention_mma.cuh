// Tiles of bf16 in shared memory and their products on tensor cores, for attention's kernels.
#pragma once

#include "ops/attention/attention_cuda.cuh"
#include "ops/cuda_mma.cuh"

namespace cambium::cuda::attention {

/// Rows of tiles in shared memory are 16 bytes longer than kDim numbers: 8 rows of a matrix lie in
/// different banks.
constexpr int shared_row(int dim) {
  return dim + 8;
}

/// Keys and values as kernels read them: in bf16, or in fp8 with scales.
template <class E>
struct Stored {
  using Rows = View<bf16>;
};
template <>
struct Stored<f8e4m3> {
  using Rows = ScaledRows;
};

/// What scores are times before powers of two are taken; not 0, which times -inf would be NaN.
__device__ __forceinline__ float positive_scale(const Layout& layout) {
  return fmaxf(fabsf(layout.scale) * kLog2E, 1e-30F);
}

/// What a block computes.
struct Block {
  int segment;
  int kv_head;
  int start;           // row of the segment's first token
  int first_position;  // of the segment
  int rows;            // of the segment
  Tile tile;
};

__device__ __forceinline__ Block block_of(const Layout& layout, const Tile& tile, int kv_head) {
  Block b;
  b.kv_head = kv_head;
  b.tile = tile;
  b.segment = b.tile.segment;
  b.start = layout.start[b.segment];
  b.first_position = layout.position[b.segment];
  b.rows = (layout.start[b.segment + 1] - b.start) * layout.group;
  return b;
}
__device__ __forceinline__ Block find_block(const Layout& layout, const Tile* tiles) {
  return block_of(layout, tiles[blockIdx.x / layout.kv_heads],
                  static_cast<int>(blockIdx.x % layout.kv_heads));
}

/// Positions of the tile's rows, in shared memory: masks then need no division.
__device__ __forceinline__ void find_positions(const Layout& layout, const Block& b, int rows,
                                               int* positions) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < rows) {
    positions[r] = b.first_position + (b.tile.first_row + r) / layout.group;
  }
}

/// Begins to copy the rows that begin at element offset(r) of `data`, of `dim` numbers; zeros where
/// the offset is negative and up to kDim.
template <int kDim, int kThreads, class Offset>
__device__ __forceinline__ void copy_rows(bf16* to, int rows, const bf16* data, int dim,
                                          const Offset& offset) {
  constexpr int kChunks = kDim / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks; i += kThreads) {
    const int r = i / kChunks;
    const int d = i % kChunks * 8;
    const int64_t from = offset(r);
    const bool exists = from >= 0 && d < dim;
    copy_16(to + r * shared_row(kDim) + d, exists ? data + from + d : data, exists);
  }
}

/// The same for the rows [first_row, first_row + rows) of the block's segment and head, as far as
/// there are before end_row. data: of a tensor (T, H, dim).
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_queries(const Layout& layout, const Block& b, int first_row,
                                             int end_row, int rows, const bf16* data,
                                             const Rows& of, int dim, bf16* to) {
  copy_rows<kDim, kThreads>(to, rows, data, dim, [&](int r) -> int64_t {
    const int row = first_row + r;
    return row < end_row ? of.offset(b.start + row / layout.group,
                                     b.kv_head * layout.group + row % layout.group)
                         : -1;
  });
}

/// The same for keys or values, whose rows were found before (-1: none).
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_keys(const View<bf16>& from, int dim, int kv_head,
                                          const int64_t* key_rows, int keys, bf16* to) {
  copy_rows<kDim, kThreads>(to, keys, from.data, dim, [&](int r) -> int64_t {
    return key_rows[r] < 0 ? -1 : from.rows.offset(key_rows[r], kv_head);
  });
}

/// Scores of kM x 16 rows with kN x 8 keys. q: the first of the rows; keys: the first of the keys.
template <int kDim, int kM, int kN>
__device__ __forceinline__ void scores_of(const bf16* q, const bf16* keys, float (&s)[kM][kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bf16* q_row = q + lane % 16 * shared_row(kDim) + lane / 16 * 8;
  const bf16* key_row = keys + (lane % 8 + lane / 16 * 8) * shared_row(kDim) + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    uint32_t x[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      load_matrices(x[m], q_row + m * 16 * shared_row(kDim) + k);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t y[4];
      load_matrices(y, key_row + n * 8 * shared_row(kDim) + k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma(s[m][n], x[m], y[0], y[1]);
        mma(s[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

/// y += P values, for the probabilities of kM x 16 rows and kN x 8 keys.
template <int kDim, int kM, int kN>
__device__ __forceinline__ void add_values(const float (&p)[kM][kN][4], const bf16* values,
                                           float (&y)[kM][kDim / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bf16* row = values + (lane % 8 + lane / 8 % 2 * 8) * shared_row(kDim) + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t x[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      x[m][0] = pack(p[m][n][0], p[m][n][1]);
      x[m][1] = pack(p[m][n][2], p[m][n][3]);
      x[m][2] = pack(p[m][n + 1][0], p[m][n + 1][1]);
      x[m][3] = pack(p[m][n + 1][2], p[m][n + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t v[4];
      load_matrices_transposed(v, row + n * 8 * shared_row(kDim) + d);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma(y[m][d / 8], x[m], v[0], v[1]);
        mma(y[m][d / 8 + 1], x[m], v[2], v[3]);
      }
    }
  }
}

/// Scores of keys that a row does not see become -inf. positions: of the warp's rows; key: the
/// position of the warp's first key.
template <int kM, int kN>
__device__ __forceinline__ void mask(const Layout& layout, const Tile& tile, const int* positions,
                                     int key, float (&s)[kM][kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kM * 2; ++i) {
    const int position = positions[i * 8 + lane / 4];
    const int first = max(layout.reach(position), tile.first_key);
    const int last = min(position, tile.end_key - 1);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int p = key + n * 8 + lane % 4 * 2 + e;
        float& score = s[i / 2][n][i % 2 * 2 + e];
        score = (p >= first || p < layout.sinks) && p <= last ? score : -INFINITY;
      }
    }
  }
}

}  // namespace cambium::cuda::attention
