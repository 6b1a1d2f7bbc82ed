// Private to the last kernel of the gradients in chunks (recurrence_backward_keys_cuda.cu): what
// its block has in shared memory, and what it makes before it comes to q and k: the pairs'
// gradients, those by v and weight, and exp(G_last) (S . dS).
#pragma once

#include "ops/recurrence/recurrence_backward_cuda.cuh"

namespace cambium::cuda {

inline constexpr int kInsideThreads = 256;

template <int kKey, int kDim>
struct InsideShared {
  static constexpr int kKeyRow = kKey + 8;
  static constexpr int kDimRow = kDim + 8;
  union {
    struct {
      bf16 dy[kChunkTokens * kDimRow];
      bf16 du[kDim * kPairRow];  // transposed
    };
    bf16 k_after[kChunkTokens * kKeyRow];  // exp(l_last - l) k, or k with one decay per head
    float rows[kKey / 4][kInsideThreads];  // row_i, a place for each number of each thread
  };
  bf16 errors[kChunkTokens * kDimRow];
  union {
    bf16 state[kKey * kDimRow];   // S
    bf16 dstate[kDim * kKeyRow];  // dS transposed
    struct {
      bf16 q[kChunkTokens * kKeyRow];  // exp(l) q, or q with one decay per head
      bf16 k[kChunkTokens * kKeyRow];  // the same of k
    };
    float change[kChunkTokens * kKeyRow];  // q dq + k (row - col)
  };
  bf16 pairs[kChunkTokens * kPairRow];       // dP, with exp(G_i - G_j) for one decay per head
  bf16 read_pairs[kChunkTokens * kPairRow];  // the same of dR
  float weight[kChunkTokens];
  float sums[kChunkTokens];              // G of one decay per head
  float block_sums[kChunkBlocks][kKey];  // l_last of the blocks
  float decay[kChunkBlocks][kKey];       // exp(l_last)
  float by_end[kChunkBlocks][kKey];      // sums over the blocks' k col by dS
  float last[kKey];                      // exp(G_last) (S . dS)
  float change_part[2][kChunkTokens];
  int strong[kChunkBlocks];
};

// A block's place: what all phases know.
template <int kKey>
struct InsidePlace {
  int64_t token;
  int tokens;
  int h;
  int key_offset;
  const float* sums;
  int warp, lane;
  int block;   // of 16 tokens
  int row;     // the first of the lane's two in the chunk, the other is 8 below
  int column;  // the first of the lane's channels, two in every 8 of kKey / 2
  int warp_column;

  // l of a decay per channel, for channels c and c + 1.
  __device__ __forceinline__ float2 sums_at(int i, int c) const {
    return *reinterpret_cast<const float2*>(sums + i * kKey + c);
  }
  // Channels c and c + 1 of a token, zero past the chunk's.
  __device__ __forceinline__ float2 two_keys(const View<bf16>& x, int i, int c) const {
    if (i >= tokens) {
      return make_float2(0.0F, 0.0F);
    }
    float out[2];
    load_n<2>(x.at(token + i, key_offset + c), out);
    return make_float2(out[0], out[1]);
  }
};

// q or k of the lane's first or second row, zero past the chunk's tokens.
template <int kKey>
__device__ __forceinline__ void load_keys(const View<bf16>& x, const InsidePlace<kKey>& at,
                                          int half, uint32_t (&out)[kKey / 16]) {
  const int i = at.row + 8 * half;
  const bf16* from = x.at(at.token + i, at.key_offset + at.column);
#pragma unroll
  for (int n = 0; n < kKey / 16; ++n) {
    out[n] = i < at.tokens ? *reinterpret_cast<const uint32_t*>(from + 8 * n) : 0;
  }
}

// Adds the warp's part of the gradient by q or k, or leaves it to the sum over heads.
template <int kKey>
__device__ __forceinline__ void add_keys(const Recurrence<bf16>& a, const View<bf16>& to,
                                         float* heads, const InsidePlace<kKey>& at,
                                         const float (&x)[kKey / 16][4]) {
  if (to.grad == nullptr) {
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = at.row + 8 * half;
    if (i >= at.tokens) {
      continue;
    }
    if (heads != nullptr) {
      float* part = heads + ((at.token + i) * a.heads + at.h) * kKey + at.column;
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        *reinterpret_cast<float2*>(part + 8 * n) = make_float2(x[n][2 * half], x[n][2 * half + 1]);
      }
      continue;
    }
    bf16* grad = to.grad_at(at.token + i, at.key_offset + at.column);
    add_pairs<kKey / 16>(grad,
                         [&](int n) { return make_float2(x[n][2 * half], x[n][2 * half + 1]); });
  }
}

// kRows fp32 rows of kDim elements, `from_stride` apart, as bf16; those from `valid` on are zero.
template <int kRows, int kDim>
__device__ __forceinline__ void round_rows(const float* from, int64_t from_stride, int valid,
                                           bf16* to) {
  constexpr int kPieces = kDim / 4;
  constexpr int kEach = kRows * kPieces / kInsideThreads;  // pieces of a thread
  constexpr int kBatch = kEach % 8 == 0 ? 8 : kEach % 6 == 0 ? 6 : kEach;
  static_assert(kRows * kPieces % kInsideThreads == 0);
#pragma unroll
  for (int first = 0; first < kEach; first += kBatch) {
    float4 piece[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int x = static_cast<int>(threadIdx.x) + (first + n) * kInsideThreads;
      const int row = x / kPieces;
      piece[n] = float4{0.0F, 0.0F, 0.0F, 0.0F};
      if (row < valid) {
        piece[n] = *reinterpret_cast<const float4*>(from + row * from_stride + x % kPieces * 4);
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int x = static_cast<int>(threadIdx.x) + (first + n) * kInsideThreads;
      *reinterpret_cast<uint2*>(to + x / kPieces * (kDim + 8) + x % kPieces * 4) =
          make_uint2(pack(piece[n].x, piece[n].y), pack(piece[n].z, piece[n].w));
    }
  }
}

// dP, dR and dweight: half of the warps have dy . e, the others du . e.
template <int kKey, int kDim, bool kPerChannel>
__device__ __forceinline__ void pair_gradients(const Recurrence<bf16>& a,
                                               const InsidePlace<kKey>& at,
                                               InsideShared<kKey, kDim>& s) {
  constexpr int kDimRow = kDim + 8;
  const bool reads = at.warp >= kChunkBlocks;
  float x[kChunkBlocks][2][4] = {};
#pragma unroll 2
  for (int c = 0; c < kDim; c += 16) {
    uint32_t left[4];
    if (reads) {
      load_left_transposed(s.du + c * kPairRow + at.block * kBlockTokens, kPairRow, left);
    } else {
      load_left(s.dy + at.block * kBlockTokens * kDimRow + c, kDimRow, left);
    }
#pragma unroll
    for (int m = 0; m < kChunkBlocks; ++m) {
      if (m <= at.block && (m == at.block || a.delta || !reads)) {
        uint32_t b[4];
        load_right_of_rows(s.errors + m * kBlockTokens * kDimRow + c, kDimRow, b);
        mma(x[m][0], left, b[0], b[1]);
        mma(x[m][1], left, b[2], b[3]);
      }
    }
  }
  float dweight[2] = {};
#pragma unroll
  for (int m = 0; m < kChunkBlocks; ++m) {
    if (m > at.block) {
      continue;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = at.row + 8 * half;
        const int j = m * kBlockTokens + 8 * n + at.lane % 4 * 2;
        const float x0 = x[m][n][2 * half];
        const float x1 = x[m][n][2 * half + 1];
        float w0 = s.weight[j];
        float w1 = s.weight[j + 1];
        if constexpr (!kPerChannel) {
          w0 *= fast_exp2(s.sums[i] - s.sums[j]);
          w1 *= fast_exp2(s.sums[i] - s.sums[j + 1]);
        }
        if (!reads) {
          *reinterpret_cast<uint32_t*>(s.pairs + i * kPairRow + j) =
              pack(j <= i ? w0 * x0 : 0.0F, j + 1 <= i ? w1 * x1 : 0.0F);
          continue;
        }
        const float w = -s.weight[i];
        *reinterpret_cast<uint32_t*>(s.read_pairs + i * kPairRow + j) =
            pack(j < i ? w * w0 * x0 : 0.0F, j + 1 < i ? w * w1 * x1 : 0.0F);
        if (n == half && m == at.block) {
          dweight[half] = i == j ? x0 : x1;
        }
      }
    }
  }
  // The lane whose two columns have the diagonal of its rows.
  if (reads && a.weight.grad != nullptr && at.lane / 4 / 2 == at.lane % 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = at.row + 8 * half;
      if (i < at.tokens) {
        *a.weight.grad_at(at.token + i, at.h) += dweight[half];
      }
    }
  }
}

// Each half of the warps has every other 16 columns.
template <int kKey, int kDim>
__device__ __forceinline__ void value_gradients(const Recurrence<bf16>& a,
                                                const InsidePlace<kKey>& at,
                                                const InsideShared<kKey, kDim>& s) {
  constexpr int kDimRow = kDim + 8;
  const float skip = a.skip.defined() ? a.skip.data[at.h] : 0.0F;
  const int first = at.warp / kChunkBlocks * 16;
  bf16* grad = a.v.grad_at(at.token, at.h * kDim + first + at.lane % 4 * 2);
  const auto row_of = [&](int x) { return at.row + x % 2 * 8; };
  const auto place = [&](int c, int x) {
    return reinterpret_cast<uint32_t*>(grad + row_of(x) * a.v.rows.outer_stride + c + x / 2 * 8);
  };
  uint32_t before[kDim / 32][4];
#pragma unroll
  for (int c = 0; c < kDim; c += 32) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      before[c / 32][x] = row_of(x) < at.tokens ? *place(c, x) : 0;
    }
  }
#pragma unroll
  for (int c = 0; c < kDim; c += 32) {
    uint32_t du[4];
    uint32_t dy[4];
    load_left_transposed(s.du + (c + first) * kPairRow + at.block * kBlockTokens, kPairRow, du);
    load_left(s.dy + at.block * kBlockTokens * kDimRow + c + first, kDimRow, dy);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      if (row_of(x) < at.tokens) {
        const float w = s.weight[row_of(x)];
        *place(c, x) = pack(
            fmaf(skip, first_of(dy[x]), fmaf(w, first_of(du[x]), first_of(before[c / 32][x]))),
            fmaf(skip, second_of(dy[x]), fmaf(w, second_of(du[x]), second_of(before[c / 32][x]))));
      }
    }
  }
}

// exp(G_last) (S . dS), over columns of the value. 16 lanes have 8 channels.
template <int kKey, int kDim>
__device__ __forceinline__ void state_changes(const BackwardParts& parts,
                                              const InsidePlace<kKey>& at,
                                              InsideShared<kKey, kDim>& s) {
  constexpr int kDimRow = kDim + 8;
  for (int group = at.warp * 2; group < kKey / 8; group += 16) {
    const int c = (group + at.lane / 16) * 8;
    float sum[8] = {};
#pragma unroll
    for (int v = 0; v < kDim; v += 16) {
      const int column = v + at.lane % 16;
      float ds[8];
      load_n<8>(parts.states + (static_cast<int64_t>(blockIdx.x) * kDim + column) * kKey + c, ds);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        sum[n] = fmaf(load(s.state + (c + n) * kDimRow + column), ds[n], sum[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) {
        sum[n] += __shfl_xor_sync(0xffffffffU, sum[n], lanes);
      }
      if (at.lane % 16 == 0) {
        s.last[c + n] = parts.totals[static_cast<int64_t>(blockIdx.x) * kKey + c + n] * sum[n];
      }
    }
  }
}

}  // namespace cambium::cuda
