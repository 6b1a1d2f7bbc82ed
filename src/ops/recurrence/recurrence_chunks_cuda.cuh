// Private to the chunk form on CUDA: what its kernels share, and what they hand on to each other in
// tiles of 16 x 16 bf16.
//
// A tile X lies in memory as lanes hold it in registers for a product, 16 bytes each: as the left
// operand X or as the right operand X', which differ in the order of two registers. Either is also
// what two accumulators side by side round to, so a kernel's results are operands of the next
// without a way through shared memory, and every access of a warp is of 512 bytes together.
#pragma once

#include "ops/recurrence/recurrence_cuda.cuh"
#include "ops/recurrence/recurrence_mma.cuh"

namespace cambium::cuda {

inline constexpr int kC = kChunkTokens;
inline constexpr int kRowTiles = kC / 16;
inline constexpr int kInversePad = kC + 4;  // row stride of fp32 (64, 64): no bank conflicts
// Shared memory that a block of these kernels may take; devices with less walk token by token.
inline constexpr size_t kForwardShared = 163 * 1024;

// The tiles of pairs on and below the diagonal.
inline constexpr int kPairTiles = kRowTiles * (kRowTiles + 1) / 2;
constexpr int pair_tile(int i, int j) {
  return i * (i + 1) / 2 + j;
}

// Decays below are zero in fp32 in any case, and infinities have no differences.
inline constexpr float kLowestLogDecay = -120.0F;
inline constexpr float kLog2E = 1.44269504F;
inline constexpr unsigned kWholeWarp = 0xffffffffU;

__device__ __forceinline__ bool in_chunks(const SegmentWalk& segments, int64_t segment) {
  return segments.length(segment) >= kLeastChunked;
}

/// The chunk of a block where every chunk has `heads` of them, the last first: the pass over chunks
/// then finds its first ones in L2, and what follows it finds the last.
__device__ __forceinline__ int64_t last_first(int64_t heads) {
  return (gridDim.x - 1 - blockIdx.x) / heads;
}

/// Rows [0, 64) of `kDim` elements, `from_stride` apart, in the background to rows of kDim + 8,
/// which have no bank conflicts; those past `rows` are zero, and so are elements from `columns` on.
/// By threads [0, kThreads) of `thread`.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_rows(const bf16* from, int64_t from_stride, int rows,
                                          int thread, bf16* to, int columns = kDim) {
  constexpr int kPieces = kDim / 8;
  constexpr int kStep = kThreads / kPieces;  // rows at a time
  static_assert(kThreads % kPieces == 0 && kC % kStep == 0);
  const int first = thread / kPieces;
  const int column = thread % kPieces * 8;
  const bool exists = column < columns;
  const bf16* row = from + first * from_stride + column;
  to += first * (kDim + 8) + column;
#pragma unroll
  for (int i = 0; i < kC; i += kStep) {
    const bool valid = exists && first + i < rows;
    copy_16(to + i * (kDim + 8), valid ? row : from, valid);
    row += kStep * from_stride;
  }
}

/// Log decay of a row of a chunk; rows past its tokens decay nothing.
__device__ __forceinline__ float log_decay_of(const Recurrence<bf16>& a, int64_t token, int tokens,
                                              int row, int64_t offset) {
  return row < tokens ? fmaxf(*a.log_decay.at(token + row, offset), kLowestLogDecay) : 0.0F;
}
/// What a row of a chunk writes; those past its tokens nothing.
__device__ __forceinline__ float weight_of(const Recurrence<bf16>& a, int64_t token, int tokens,
                                           int row, int64_t h) {
  return row >= tokens ? 0.0F : a.weight.defined() ? *a.weight.at(token + row, h) : 1.0F;
}

/// Running sums by a warp, of elements 2 l and 2 l + 1 in lane l.
__device__ __forceinline__ void sum_decays(float (&x)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float second = x[1];
  float sum = x[0] + second;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float before = __shfl_up_sync(kWholeWarp, sum, lanes);
    sum += lane >= lanes ? before : 0.0F;
  }
  x[0] = sum - second;
  x[1] = sum;
}

__device__ __forceinline__ void sync_threads(int id, int count) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(count) : "memory");
}
/// Barrier of a half, 128 threads, of a block; each has a number that the compiler knows.
__device__ __forceinline__ void sync_half(int half) {
  if (half == 0) {
    sync_threads(1, 128);
  } else {
    sync_threads(2, 128);
  }
}

struct Tile {
  uint4 lane[32];
};

__device__ __forceinline__ void load_tile(const Tile* from, uint32_t (&x)[4]) {
  const uint4 part = from->lane[threadIdx.x % 32];
  x[0] = part.x;
  x[1] = part.y;
  x[2] = part.z;
  x[3] = part.w;
}
__device__ __forceinline__ void store_tile(Tile* to, const uint32_t (&x)[4]) {
  to->lane[threadIdx.x % 32] = make_uint4(x[0], x[1], x[2], x[3]);
}

// Accumulators c[n] hold columns [8 n, 8 n + 8) of a tile: element x of lane l is that of row
// l / 4 + x / 2 * 8 and column 8 n + 2 (l % 4) + x % 2.
__device__ __forceinline__ int tile_row(int x) {
  return static_cast<int>(threadIdx.x) % 32 / 4 + x / 2 * 8;
}
__device__ __forceinline__ int tile_column(int n, int x) {
  return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + x % 2;
}

/// c += left right'
__device__ __forceinline__ void multiply_tiles(float (&c)[2][4], const uint32_t (&left)[4],
                                               const uint32_t (&right)[4]) {
  mma(c[0], left, right[0], right[1]);
  mma(c[1], left, right[2], right[3]);
}
/// c *= factor
__device__ __forceinline__ void scale_tile(float (&c)[2][4], float factor) {
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    c[x / 4][x % 4] *= factor;
  }
}
__device__ __forceinline__ void round_left(const float (&c)[2][4], uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = pack(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
  }
}
__device__ __forceinline__ void round_right(const float (&c)[2][4], uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = pack(c[i % 2][i / 2 * 2], c[i % 2][i / 2 * 2 + 1]);
  }
}
__device__ __forceinline__ void widen_left(const uint32_t (&x)[4], float (&c)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c[i / 2][i % 2 * 2] = __uint_as_float(x[i] << 16);
    c[i / 2][i % 2 * 2 + 1] = __uint_as_float(x[i] & 0xffff0000U);
  }
}
__device__ __forceinline__ void widen_right(const uint32_t (&x)[4], float (&c)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c[i % 2][i / 2 * 2] = __uint_as_float(x[i] << 16);
    c[i % 2][i / 2 * 2 + 1] = __uint_as_float(x[i] & 0xffff0000U);
  }
}
/// The left operand X to the right operand X'.
__device__ __forceinline__ void left_to_right(uint32_t (&x)[4]) {
  const uint32_t second = x[1];
  x[1] = x[2];
  x[2] = second;
}
/// The left operand X to the right operand (X')', which multiplies by X.
__device__ __forceinline__ void transpose_to_right(uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = transpose_matrix(x[i]);
  }
}

/// Exchanges x[j] of lane i of every four with x[i] of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x % 2 != 0;
  const bool upper = threadIdx.x % 4 >= 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t sent = __shfl_xor_sync(kWholeWarp, odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = sent;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t sent = __shfl_xor_sync(kWholeWarp, upper ? x[i] : x[i + 2], 2);
    (upper ? x[i] : x[i + 2]) = sent;
  }
}

/// y of a chunk and head, 16 kOwn columns from `column` on, and what the skip adds to it.
template <int kOwn>
__device__ __forceinline__ void store_results(const Recurrence<bf16>& a, int64_t token, int tokens,
                                              int64_t h, int64_t column,
                                              const float (&y)[kRowTiles][kOwn][2][4]) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  const int row = tile_row(0) + quad / 2 * 8;
  bf16* to = a.y.at(token + row, column + quad % 2 * 8);
  const bool skips = a.skip.defined();
  const float skip = skips ? a.skip.data[h] : 0.0F;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      uint32_t part[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {  // the lane's pairs by row, then by columns
        float out[2] = {y[i][n][x % 2][x / 2 * 2], y[i][n][x % 2][x / 2 * 2 + 1]};
        const int from = 16 * i + tile_row(x / 2 * 2);
        if (skips && from < tokens) {
          float v[2];
          load_n<2>(a.v.at(token + from, column + 16 * n + tile_column(x % 2, 0)), v);
          out[0] = fmaf(skip, v[0], out[0]);
          out[1] = fmaf(skip, v[1], out[1]);
        }
        part[x] = pack(out[0], out[1]);
      }
      transpose_quad(part);
      if (16 * i + row < tokens) {
        *reinterpret_cast<uint4*>(to + 16 * n) = make_uint4(part[0], part[1], part[2], part[3]);
      }
    }
    to += 16 * a.y.rows.outer_stride;
  }
}

/// c += left b: left (16, 16) in accumulators, b (16, 16) fp32 in shared memory, rows kInversePad
/// apart, both rounded to tf32. What the instruction takes as columns l % 4 and l % 4 + 4 of the
/// left are columns 2 (l % 4) and the next here, and rows of b likewise.
__device__ __forceinline__ void multiply_fine(float (&c)[2][4], const float (&left)[2][4],
                                              const float* b) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint32_t x[4] = {to_tf32(left[m][0]), to_tf32(left[m][2]), to_tf32(left[m][1]),
                           to_tf32(left[m][3])};
    const float* row = b + (8 * m + lane % 4 * 2) * kInversePad + lane / 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma_tf32(c[n], x, to_tf32(row[8 * n]), to_tf32(row[kInversePad + 8 * n]));
    }
  }
}

/// A 16 x 16 block I + x, x strictly lower, rows kInversePad apart in shared memory: its inverse in
/// its place, by a warp, in fp32.
__device__ __forceinline__ void invert_block(float* block) {
  const int column = static_cast<int>(threadIdx.x) % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum = i == column ? 1.0F : 0.0F;
#pragma unroll
    for (int m = 0; m < i; ++m) {
      sum = fmaf(-block[i * kInversePad + m], x[m], sum);
    }
    x[i] = sum;
  }
  __syncwarp();
  if (threadIdx.x % 32 < 16) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      block[i * kInversePad + column] = x[i];
    }
  }
}

/// By 4 warps, a block or that half of it, from x = A (64, 64), strictly lower, rows kInversePad
/// apart, of which each warp has just written its 16 rows up to the diagonal block: t = the warp's
/// rows of (I + x)^-1, up to the diagonal tile. They are found by t_ij = -(sum of t_im x_mj, j < m
/// <= i) t_jj, so that they never leave the warp's registers. The barrier in it also ends copies of
/// the caller's.
__device__ __forceinline__ void invert_tiles(float* x, float (&t)[kRowTiles][2][4], int half = 0) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
  __syncwarp();
  invert_block(x + 16 * warp * (kInversePad + 1));
  wait_for_copies<0>();
  sync_half(half);
#pragma unroll
  for (int j = kRowTiles - 1; j >= 0; --j) {
    if (j == warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          t[j][n][e] = x[(16 * j + tile_row(e)) * kInversePad + 16 * j + tile_column(n, e)];
        }
      }
    } else if (j < warp) {
      float sum[2][4] = {};
#pragma unroll
      for (int m = j + 1; m < kRowTiles; ++m) {
        if (m <= warp) {
          multiply_fine(sum, t[m], x + 16 * m * kInversePad + 16 * j);
        }
      }
      float found[2][4] = {};
      multiply_fine(found, sum, x + 16 * j * (kInversePad + 1));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          t[j][n][e] = -found[n][e];
        }
      }
    }
  }
}

/// The whole of a call with one decay a head and without the delta rule
/// (recurrence_chunks_scan_cuda.cu), which serves more dims than the others.
bool scan_has_chunks(const Recurrence<bf16>& a);
void scan_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const Launch& on);

// --- With a decay per channel.
/// What the kernels hand on, per chunk and head. Shapes in tiles, then of what a tile's rows and
/// columns are; left or right.
struct ChunkTiles {
  Tile* queries;  // (4, K / 16), (tokens, key), left: exp(G) q
  Tile* keys;     // (K / 16, 4), (key, tokens), right: exp(G_last - G) k
  Tile* pairs;    // (4, 4), (tokens, tokens), left: P, on and below the diagonal
  Tile* reads;    // (4, K / 16), (tokens, key), right: -W, delta only
  Tile* errors;   // (V / 16, 4), (value, tokens), right: U, then e
  Tile* states;   // (V / 16, K / 16), (value, key), right: the state at the start
  float* ends;    // (kEnds + K): w (64), exp(G_last) (K)
};
inline constexpr int kEnds = kC;

/// The first kernel (recurrence_chunks_channel_cuda.cu).
void prepare_channels(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                      const ChunkTiles& parts, const Launch& on);
/// Through the chunks of each segment in turn: states, and e (recurrence_chunks_state_cuda.cu).
void pass_states(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const ChunkTiles& parts, const Launch& on);

}  // namespace cambium::cuda
