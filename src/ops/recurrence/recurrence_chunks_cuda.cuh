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
/// which have no bank conflicts; those past `rows` are zero. By threads [0, kThreads) of `thread`.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_rows(const bf16* from, int64_t from_stride, int rows,
                                          int thread, bf16* to) {
  constexpr int kPieces = kDim / 8;
  for (int x = thread; x < kC * kPieces; x += kThreads) {
    const int row = x / kPieces;
    const bool valid = row < rows;
    copy_16(to + row * (kDim + 8) + x % kPieces * 8,
            from + (valid ? row * from_stride + x % kPieces * 8 : 0), valid);
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

/// Running sums of the log decays of a chunk, one a head, by a warp: of rows 2 l and 2 l + 1 in
/// lane l.
__device__ __forceinline__ void sum_decays(const Recurrence<bf16>& a, int64_t token, int tokens,
                                           int64_t h, float (&sums)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float first = log_decay_of(a, token, tokens, 2 * lane, h);
  const float second = log_decay_of(a, token, tokens, 2 * lane + 1, h);
  float sum = first + second;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float before = __shfl_up_sync(kWholeWarp, sum, lanes);
    sum += lane >= lanes ? before : 0.0F;
  }
  sums[0] = sum - second;
  sums[1] = sum;
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
/// The left operand X to the right operand (X')', which multiplies by X.
__device__ __forceinline__ void transpose_to_right(uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = transpose_matrix(x[i]);
  }
}

/// What the kernels hand on. Per chunk and head, but queries and keys per chunk and key head where
/// a head has one decay. Shapes in tiles, then of what a tile's rows and columns are; left or
/// right.
struct ChunkTiles {
  Tile* queries;  // (4, K / 16), (tokens, key), left: q; per channel exp(G) q
  Tile* keys;     // (K / 16, 4), (key, tokens), right: k; per channel exp(G_last - G) k
  Tile* pairs;    // (4, 4), (tokens, tokens), left: P, on and below the diagonal
  Tile* reads;    // (4, K / 16), (tokens, key), right: -W, delta only
  Tile* errors;   // (V / 16, 4), (value, tokens), right: U, then e
  Tile* states;   // (V / 16, K / 16), (value, key), right: the state at the start
  float* ends;    // (kEnds + K): see below
};
// Of ends: exp(G_last - G) w (64), per channel w; exp(G) (64), with one decay only; exp(G_last)
// (K), with one decay the first.
inline constexpr int kStarts = kC;
inline constexpr int kEnds = 2 * kC;

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

/// What of W and U a block of 4 warps finds from x = A (64, 64), strictly lower, rows kInversePad
/// apart, of which each warp has just written its 16 rows up to the diagonal block. With
/// T = (I + x)^-1:
///
///   reads = -T diag(scale) k (scale null: T k, k is negated and scaled)     errors = (T v)'
///
/// v may still be on its way. T is found by rows, T_ij = -(sum of T_im x_mj, j < m <= i) T_jj: the
/// row of tiles of a warp never leaves its registers.
template <int kKey, int kDim>
__device__ __forceinline__ void solve_tiles(float* x, const float* scale, const bf16* k,
                                            const bf16* v, Tile* reads, Tile* errors) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  __syncwarp();
  invert_block(x + 16 * warp * (kInversePad + 1));
  wait_for_copies<0>();
  __syncthreads();
  float t[kRowTiles][2][4];
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
  uint32_t left[kRowTiles][4];
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
      round_left(t[j], left[j]);
    }
  }
#pragma unroll 2
  for (int m = 0; m < kDim / 16; ++m) {
    float u[2][4] = {};
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t b[4];
        load_right(v + 16 * j * (kDim + 8) + 16 * m, kDim + 8, b);
        multiply_tiles(u, left[j], b);
      }
    }
    uint32_t tile[4];
    round_left(u, tile);
    transpose_to_right(tile);
    store_tile(errors + m * kRowTiles + warp, tile);
  }
  if (scale != nullptr) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            t[j][n][e] *= -scale[16 * j + tile_column(n, e)];
          }
        }
        round_left(t[j], left[j]);
      }
    }
  }
#pragma unroll 2
  for (int m = 0; m < kKey / 16; ++m) {
    float w[2][4] = {};
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t b[4];
        load_right(k + 16 * j * (kKey + 8) + 16 * m, kKey + 8, b);
        multiply_tiles(w, left[j], b);
      }
    }
    uint32_t tile[4];
    round_right(w, tile);
    store_tile(reads + warp * (kKey / 16) + m, tile);
  }
}

/// The first kernel of a call with a decay per channel (recurrence_chunks_channel_cuda.cu).
void prepare_channels(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                      const ChunkTiles& parts, const Launch& on);
/// Through the chunks of each segment in turn: states, and e (recurrence_chunks_state_cuda.cu).
void pass_states(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const ChunkTiles& parts, const Launch& on);
/// The whole of a call with one decay a head and no delta rule (recurrence_chunks_scan_cuda.cu).
void scan_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const Launch& on);

}  // namespace cambium::cuda
