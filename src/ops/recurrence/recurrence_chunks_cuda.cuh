// Private to the chunk form on CUDA: what its kernels hand on to each other, and what the preparing
// kernels share.
#pragma once

#include "ops/recurrence/recurrence_cuda.cuh"
#include "ops/recurrence/recurrence_mma.cuh"

namespace cambium::cuda {

inline constexpr int kC = kChunkTokens;
inline constexpr int kPairPad = kC + 8;  // row stride in shared memory: no bank conflicts
inline constexpr int kStateColumns = 32;
inline constexpr int kStages = 3;

// Decays below are zero in fp32 in any case, and infinities have no differences.
inline constexpr float kLowestLogDecay = -120.0F;

// Between the kernels, each (chunks, heads, ...), bf16.
struct ChunkParts {
  bf16* pairs;   // (64, 64) P
  bf16* errors;  // (V, 64) U transposed, then e
  bf16* reads;   // (64, K) -W, delta only
  bf16* states;  // (V, K) the state at the start, transposed
  float* ends;   // (64 + K) fp32: exp(G_last - G) w, then exp(G_last). Per channel w, then
                 // exp(G_last); with one decay only the first of K counts
  // With a decay per channel only; else q and k are read anew.
  bf16* queries = nullptr;  // (64, K) exp(G) q
  bf16* keys = nullptr;     // (64, K) exp(G_last - G) k
};

__device__ __forceinline__ bool in_chunks(const SegmentWalk& segments, int64_t segment) {
  return segments.length(segment) >= kLeastChunked;
}

// Running sums of the log decays of a chunk, by the first warp; rows past its tokens add nothing.
__device__ __forceinline__ void sum_decays(const Recurrence<bf16>& a, int64_t token, int tokens,
                                           int64_t h, float* sums) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 32) {
    return;
  }
  float x[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * lane + i;
    x[i] = row < tokens ? fmaxf(*a.log_decay.at(token + row, h), kLowestLogDecay) : 0.0F;
  }
  float sum = x[0] + x[1];
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float before = __shfl_up_sync(0xffffffffU, sum, lanes);
    sum += lane >= lanes ? before : 0.0F;
  }
  sums[2 * lane] = sum - x[1];
  sums[2 * lane + 1] = sum;
}

// Rows [0, 64) of `kDim` elements, `from_stride` apart, to rows of kDim + 8; those past `rows` are
// zero.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_rows(const bf16* from, int64_t from_stride, int rows,
                                          int count, bf16* to) {
  constexpr int kPieces = kDim / 8;
  for (int x = static_cast<int>(threadIdx.x); x < count * kPieces; x += kThreads) {
    const int row = x / kPieces;
    const bool valid = row < rows;
    copy_16(to + row * (kDim + 8) + x % kPieces * 8,
            from + (valid ? row * from_stride + x % kPieces * 8 : 0), valid);
  }
}

// x (64, 64) strictly lower, row stride kInversePad: (I + x)^-1 in its place, without the diagonal.
// Blocks of 16 by substitution, then twice the blocks of two on the diagonal: the part below is
// -T22 x21 T11.
inline constexpr int kInversePad = kC + 4;
__device__ __forceinline__ void multiply_blocks(int size, bool unit_left, const float* left,
                                                bool unit_right, const float* right, float sign,
                                                float* to, int to_stride, int part, int threads) {
  for (int x = part; x < size * size; x += threads) {
    const int i = x / size;
    const int j = x % size;
    float sum = 0.0F;
    if (unit_left) {
      sum = right[i * kInversePad + j];  // right is full
      for (int m = 0; m < i; ++m) {
        sum = fmaf(left[i * kInversePad + m], right[m * kInversePad + j], sum);
      }
    } else if (unit_right) {
      sum = left[i * kInversePad + j];
      for (int m = j + 1; m < size; ++m) {
        sum = fmaf(left[i * kInversePad + m], right[m * kInversePad + j], sum);
      }
    }
    to[i * to_stride + j] = sign * sum;
  }
}
__device__ __forceinline__ void invert(float* x, float* part) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kC) {  // a column of a diagonal block each
    float* block = x + (thread / 16 * 16) * (kInversePad + 1);
    const int j = thread % 16;
    float column[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = i > j ? -block[i * kInversePad + j] : 0.0F;
#pragma unroll
      for (int m = 0; m < i; ++m) {
        sum = m > j ? fmaf(-block[i * kInversePad + m], column[m], sum) : sum;
      }
      column[i] = sum;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i > j) {
        block[i * kInversePad + j] = column[i];
      }
    }
  }
  __syncthreads();
  for (int size = 16; size < kC; size *= 2) {
    const int pairs = kC / (2 * size);
    const int threads = 128 / pairs;
    float* first = x + thread / threads * 2 * size * (kInversePad + 1);
    float* below = first + size * kInversePad;
    float* product = part + thread / threads * size * kInversePad;
    multiply_blocks(size, false, below, true, first, 1.0F, product, kInversePad, thread % threads,
                    threads);
    __syncthreads();
    multiply_blocks(size, true, below + size, false, product, -1.0F, below, kInversePad,
                    thread % threads, threads);
    __syncthreads();
  }
}

/// errors (kDim, 64) = v' solve', 16 columns of the value at a time; a block of 4 warps.
template <int kDim>
__device__ __forceinline__ void solve_values(const bf16* v, const bf16* solve, bf16* errors) {
  constexpr int kDimStride = kDim + 8;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int m = warp; m < kDim / 16; m += 4) {
    float u[kC / 8][4] = {};
#pragma unroll
    for (int c = 0; c < kC; c += 16) {
      uint32_t value[4];
      load_left_transposed(v + c * kDimStride + 16 * m, kDimStride, value);
#pragma unroll
      for (int n = c / 16; n < kC / 16; ++n) {
        uint32_t b[4];
        load_right_of_rows(solve + 16 * n * kPairPad + c, kPairPad, b);
        mma(u[2 * n], value, b[0], b[1]);
        mma(u[2 * n + 1], value, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kC / 8; ++n) {
      bf16* to = errors + (16 * m + lane / 4) * kC + 8 * n + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = pack(u[n][0], u[n][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * kC) = pack(u[n][2], u[n][3]);
    }
  }
}
/// reads (64, kKey) = solve k; a warp of 4 has 16 tokens.
template <int kKey>
__device__ __forceinline__ void solve_keys(const bf16* k, const bf16* solve, bf16* reads) {
  constexpr int kKeyStride = kKey + 8;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = 16 * warp + lane / 4;
  float w[kKey / 8][4] = {};
#pragma unroll
  for (int c = 0; c < kC; c += 16) {
    if (c <= 16 * warp) {
      uint32_t left[4];
      load_left(solve + 16 * warp * kPairPad + c, kPairPad, left);
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        uint32_t b[4];
        load_right(k + c * kKeyStride + 16 * n, kKeyStride, b);
        mma(w[2 * n], left, b[0], b[1]);
        mma(w[2 * n + 1], left, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kKey / 8; ++n) {
    bf16* to = reads + row * kKey + 8 * n + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(to) = pack(w[n][0], w[n][1]);
    *reinterpret_cast<uint32_t*>(to + 8 * kKey) = pack(w[n][2], w[n][3]);
  }
}

/// The first kernel of a call with a decay per channel (recurrence_chunks_channel_cuda.cu).
void prepare_channels(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                      const ChunkParts& parts, const Launch& on);

}  // namespace cambium::cuda
