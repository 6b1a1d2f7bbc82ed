// The last kernel of the gradients in chunks: for a chunk and head, from the state S at its start
// and the errors e that forward kept, du, and dS at its end:
//
//   dP_ij  = w_j dy_i . e_j, j <= i          dR_ij = -w_i w_j du_i . e_j, j < i
//   dq_i   = exp(G_i) S dy_i + sum_j dP_ij exp(G_i - G_j) k_j
//   row_i  = -w_i exp(G_i) S du_i + sum_j dR_ij exp(G_i - G_j) k_j
//   col_j  = w_j exp(G_last - G_j) dS e_j + sum_i exp(G_i - G_j) (dP_ij q_i + dR_ij k_i)
//   dk     = row + col       dv = w du + skip dy        dweight_i = du_i . e_i
//
// and the gradient by the log decay of token t, channel by channel, or summed over channels:
//
//   dg_t = sum_(i >= t) (q_i dq_i + k_i (row_i - col_i)) + sum_j k_j (the part of col_j by dS)
//          + exp(G_last) (S . dS)
//
// A warp has a block of 16 tokens and half of the channels. With a decay per channel the sums over
// blocks are taken block by block, from the far one to the near one, and decay on the way
// (recurrence_backward_cuda.cuh). With one decay per head dP and dR are multiplied by exp(G_i -
// G_j): then a pair's parts of q dq and of k col are the same number, and cancel where they must.
// Shared memory is used over and over; what lives from one phase to the next is in registers.
#include "ops/recurrence/recurrence_backward_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr const char* kName = "recurrence (backward)";
constexpr int kThreads = 256;

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
    float rows[kKey / 4][kThreads];        // row_i, a place for each number of each thread
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
    uint32_t before[kKey / 16];
#pragma unroll
    for (int n = 0; n < kKey / 16; ++n) {
      before[n] = *reinterpret_cast<const uint32_t*>(grad + 8 * n);
    }
#pragma unroll
    for (int n = 0; n < kKey / 16; ++n) {
      *reinterpret_cast<uint32_t*>(grad + 8 * n) =
          pack(first_of(before[n]) + x[n][2 * half], second_of(before[n]) + x[n][2 * half + 1]);
    }
  }
}

// kRows fp32 rows of kDim elements, `from_stride` apart, as bf16; those from `valid` on are zero.
template <int kRows, int kDim>
__device__ __forceinline__ void round_rows(const float* from, int64_t from_stride, int valid,
                                           bf16* to) {
  constexpr int kPieces = kDim / 4;
  constexpr int kEach = kRows * kPieces / kThreads;  // pieces of a thread
  constexpr int kBatch = kEach % 8 == 0 ? 8 : kEach % 6 == 0 ? 6 : kEach;
  static_assert(kRows * kPieces % kThreads == 0);
#pragma unroll
  for (int first = 0; first < kEach; first += kBatch) {
    float4 piece[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int x = static_cast<int>(threadIdx.x) + (first + n) * kThreads;
      const int row = x / kPieces;
      piece[n] = float4{0.0F, 0.0F, 0.0F, 0.0F};
      if (row < valid) {
        piece[n] = *reinterpret_cast<const float4*>(from + row * from_stride + x % kPieces * 4);
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int x = static_cast<int>(threadIdx.x) + (first + n) * kThreads;
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

// x *= a number per channel.
template <int kTiles>
__device__ __forceinline__ void scale_channels(const float* by, float (&x)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float2 f = *reinterpret_cast<const float2*>(by + 8 * n);
    x[n][0] *= f.x;
    x[n][1] *= f.y;
    x[n][2] *= f.x;
    x[n][3] *= f.y;
  }
}
template <int kTiles>
__device__ __forceinline__ void scale_rows(float upper, float lower, float (&x)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    x[n][0] *= upper;
    x[n][1] *= upper;
    x[n][2] *= lower;
    x[n][3] *= lower;
  }
}

// The parts of dq and row by the tokens of their own block, pair by pair.
template <int kKey, int kDim>
__device__ __forceinline__ void add_rows_inside(const Recurrence<bf16>& a,
                                                const InsidePlace<kKey>& at,
                                                const InsideShared<kKey, kDim>& s,
                                                float (&dq)[kKey / 16][4],
                                                float (&row)[kKey / 16][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = at.row + 8 * half;
#pragma unroll 1
    for (int j = at.block * kBlockTokens; j <= i; ++j) {
      const float by_query = load(s.pairs + i * kPairRow + j);
      const float by_key = a.delta ? load(s.read_pairs + i * kPairRow + j) : 0.0F;
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        const int c = at.column + 8 * n;
        const float2 sum = at.sums_at(i, c);
        const float2 before = at.sums_at(j, c);
        const float2 key = at.two_keys(a.k, j, c);
        const float k0 = fast_exp2(sum.x - before.x) * key.x;
        const float k1 = fast_exp2(sum.y - before.y) * key.y;
        dq[n][2 * half] = fmaf(by_query, k0, dq[n][2 * half]);
        dq[n][2 * half + 1] = fmaf(by_query, k1, dq[n][2 * half + 1]);
        row[n][2 * half] = fmaf(by_key, k0, row[n][2 * half]);
        row[n][2 * half + 1] = fmaf(by_key, k1, row[n][2 * half + 1]);
      }
    }
  }
}

// dq and row of the warp's tokens, which come as S dy and -w S du, times exp(G) for one decay per
// head.
template <int kKey, int kDim, bool kPerChannel>
__device__ __forceinline__ void add_rows(const Recurrence<bf16>& a, const InsidePlace<kKey>& at,
                                         const InsideShared<kKey, kDim>& s,
                                         float (&dq)[kKey / 16][4], float (&row)[kKey / 16][4]) {
  constexpr int kKeyRow = kKey + 8;
  const int first = at.block * kBlockTokens;
  const bool strong = kPerChannel && s.strong[at.block] != 0;
#pragma unroll 1
  for (int m = 0; m < (strong ? at.block : at.block + 1); ++m) {
    if constexpr (kPerChannel) {
      scale_channels(&s.decay[m][at.column], dq);
      scale_channels(&s.decay[m][at.column], row);
    }
    uint32_t by_query[4];
    uint32_t by_key[4];
    load_left(s.pairs + first * kPairRow + m * kBlockTokens, kPairRow, by_query);
    if (a.delta) {
      load_left(s.read_pairs + first * kPairRow + m * kBlockTokens, kPairRow, by_key);
    }
#pragma unroll
    for (int n = 0; n < kKey / 32; ++n) {
      uint32_t b[4];
      load_right(s.k_after + m * kBlockTokens * kKeyRow + at.warp_column + 16 * n, kKeyRow, b);
      mma(dq[2 * n], by_query, b[0], b[1]);
      mma(dq[2 * n + 1], by_query, b[2], b[3]);
      if (a.delta) {
        mma(row[2 * n], by_key, b[0], b[1]);
        mma(row[2 * n + 1], by_key, b[2], b[3]);
      }
    }
  }
  if constexpr (kPerChannel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* sums = at.sums + (at.row + 8 * half) * kKey + at.column;
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        const float2 sum = *reinterpret_cast<const float2*>(sums + 8 * n);
        const float2 base =
            *reinterpret_cast<const float2*>(&s.block_sums[at.block][at.column + 8 * n]);
        const float decay0 = fast_exp2(strong ? sum.x : sum.x - base.x);
        const float decay1 = fast_exp2(strong ? sum.y : sum.y - base.y);
        dq[n][2 * half] *= decay0;
        dq[n][2 * half + 1] *= decay1;
        row[n][2 * half] *= decay0;
        row[n][2 * half + 1] *= decay1;
      }
    }
    if (strong) {
      add_rows_inside(a, at, s, dq, row);
    }
  }
}

// The part of col by the tokens of its own block, pair by pair.
template <int kKey, int kDim>
__device__ __forceinline__ void add_columns_inside(const Recurrence<bf16>& a,
                                                   const InsidePlace<kKey>& at,
                                                   const InsideShared<kKey, kDim>& s,
                                                   float (&col)[kKey / 16][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = at.row + 8 * half;
#pragma unroll 1
    for (int i = j; i < (at.block + 1) * kBlockTokens; ++i) {
      const float by_query = load(s.pairs + i * kPairRow + j);
      const float by_key = a.delta ? load(s.read_pairs + i * kPairRow + j) : 0.0F;
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        const int c = at.column + 8 * n;
        const float2 sum = at.sums_at(j, c);
        const float2 after = at.sums_at(i, c);
        const float2 query = at.two_keys(a.q, i, c);
        const float2 key = at.two_keys(a.k, i, c);
        col[n][2 * half] =
            fmaf(fast_exp2(after.x - sum.x), by_query * query.x + by_key * key.x, col[n][2 * half]);
        col[n][2 * half + 1] = fmaf(fast_exp2(after.y - sum.y), by_query * query.y + by_key * key.y,
                                    col[n][2 * half + 1]);
      }
    }
  }
}

// col of the warp's tokens, which comes as w dS e, times exp(G_last - G) for one decay per head.
template <int kKey, int kDim, bool kPerChannel>
__device__ __forceinline__ void add_columns(const Recurrence<bf16>& a, const InsidePlace<kKey>& at,
                                            const InsideShared<kKey, kDim>& s,
                                            float (&col)[kKey / 16][4]) {
  constexpr int kKeyRow = kKey + 8;
  const int first = at.block * kBlockTokens;
  const bool strong = kPerChannel && s.strong[at.block] != 0;
#pragma unroll 1
  for (int m = kChunkBlocks - 1; m >= (strong ? at.block + 1 : at.block); --m) {
    if constexpr (kPerChannel) {
      scale_channels(&s.decay[m][at.column], col);
    }
    uint32_t by_query[4];
    uint32_t by_key[4];
    load_left_transposed(s.pairs + m * kBlockTokens * kPairRow + first, kPairRow, by_query);
    if (a.delta) {
      load_left_transposed(s.read_pairs + m * kBlockTokens * kPairRow + first, kPairRow, by_key);
    }
#pragma unroll
    for (int n = 0; n < kKey / 32; ++n) {
      const int from = m * kBlockTokens * kKeyRow + at.warp_column + 16 * n;
      uint32_t b[4];
      load_right(s.q + from, kKeyRow, b);
      mma(col[2 * n], by_query, b[0], b[1]);
      mma(col[2 * n + 1], by_query, b[2], b[3]);
      if (a.delta) {
        load_right(s.k + from, kKeyRow, b);
        mma(col[2 * n], by_key, b[0], b[1]);
        mma(col[2 * n + 1], by_key, b[2], b[3]);
      }
    }
  }
  if constexpr (kPerChannel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* sums = at.sums + (at.row + 8 * half) * kKey + at.column;
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        const float2 sum = *reinterpret_cast<const float2*>(sums + 8 * n);
        const float2 base =
            *reinterpret_cast<const float2*>(&s.block_sums[at.block][at.column + 8 * n]);
        col[n][2 * half] *= fast_exp2(strong ? base.x - sum.x : -sum.x);
        col[n][2 * half + 1] *= fast_exp2(strong ? base.y - sum.y : -sum.y);
      }
    }
    if (strong) {
      add_columns_inside(a, at, s, col);
    }
  }
}

// The sums over k col, where col has its part by dS only.
template <int kKey, int kDim, bool kPerChannel>
__device__ __forceinline__ void sum_by_end(const Recurrence<bf16>& a, const InsidePlace<kKey>& at,
                                           InsideShared<kKey, kDim>& s,
                                           const float (&col)[kKey / 16][4]) {
#pragma unroll
  for (int n = 0; n < kKey / 16; ++n) {
    const int c = at.column + 8 * n;
    float sum0 = 0.0F;
    float sum1 = 0.0F;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = at.row + 8 * half;
      float2 key = at.two_keys(a.k, j, c);
      if constexpr (kPerChannel) {
        const float2 base = *reinterpret_cast<const float2*>(&s.block_sums[at.block][c]);
        const float2 sum = at.sums_at(j, c);
        key.x *= fast_exp2(base.x - sum.x);
        key.y *= fast_exp2(base.y - sum.y);
      }
      sum0 = fmaf(key.x, col[n][2 * half], sum0);
      sum1 = fmaf(key.y, col[n][2 * half + 1], sum1);
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      sum0 += __shfl_xor_sync(0xffffffffU, sum0, lanes);
      sum1 += __shfl_xor_sync(0xffffffffU, sum1, lanes);
    }
    if (at.lane < 4) {
      for (int m = at.block + 1; kPerChannel && m < kChunkBlocks; ++m) {
        sum0 *= s.decay[m][c];
        sum1 *= s.decay[m][c + 1];
      }
      s.by_end[at.block][c] = sum0;
      s.by_end[at.block][c + 1] = sum1;
    }
  }
}

// The sum that runs from the end of the chunk, channel by channel; half of the tokens each.
template <int kKey, int kDim>
__device__ __forceinline__ void channel_decay_gradients(const Recurrence<bf16>& a,
                                                        const InsidePlace<kKey>& at,
                                                        const InsideShared<kKey, kDim>& s) {
  constexpr int kHalf = kChunkTokens / 2;
  constexpr int kBatch = 16;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= 2 * kKey) {
    return;
  }
  const int c = thread % kKey;
  const int first = thread / kKey * kHalf;
  float sum = s.last[c];
#pragma unroll
  for (int b = 0; b < kChunkBlocks; ++b) {
    sum += s.by_end[b][c];
  }
  if (first == 0) {
#pragma unroll 8
    for (int i = kChunkTokens - 1; i >= kHalf; --i) {
      sum += s.change[i * (kKey + 8) + c];
    }
  }
  float* grad = a.log_decay.grad_at(at.token, at.h * kKey + c);
  const int64_t stride = a.log_decay.rows.outer_stride;
#pragma unroll 1
  for (int last = first + kHalf - 1; last > first; last -= kBatch) {
    float before[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      before[n] = last - n < at.tokens ? grad[(last - n) * stride] : 0.0F;
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      sum += s.change[(last - n) * (kKey + 8) + c];
      if (last - n < at.tokens) {
        grad[(last - n) * stride] = before[n] + sum;
      }
    }
  }
}

// The same summed over channels, by the first warp: change_part has the tokens' sums.
template <int kKey, int kDim>
__device__ __forceinline__ void head_decay_gradients(const Recurrence<bf16>& a,
                                                     const InsidePlace<kKey>& at,
                                                     const InsideShared<kKey, kDim>& s) {
  if (at.warp != 0) {
    return;
  }
  float end = 0.0F;
  for (int c = at.lane; c < kKey; c += 32) {
    end += s.last[c];
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      end += s.by_end[b][c];
    }
  }
  end = warp_sum(end);
  const int i = 2 * at.lane;
  const float late = s.change_part[0][i + 1] + s.change_part[1][i + 1];
  const float both = s.change_part[0][i] + s.change_part[1][i] + late;
  float sum = both;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float after = __shfl_down_sync(0xffffffffU, sum, lanes);
    sum += at.lane + lanes < 32 ? after : 0.0F;
  }
  if (i < at.tokens) {
    *a.log_decay.grad_at(at.token + i, at.h) += end + sum;
  }
  if (i + 1 < at.tokens) {
    *a.log_decay.grad_at(at.token + i + 1, at.h) += end + (sum - both + late);
  }
}

// q or k of the chunk times exp(l), or exp(l_last - l) with kToEnd; as they are with one decay per
// head.
template <int kKey, int kDim, bool kPerChannel, bool kToEnd>
__device__ __forceinline__ void stage_keys(const View<bf16>& x, const InsidePlace<kKey>& at,
                                           const InsideShared<kKey, kDim>& s, bf16* to) {
  constexpr int kKeyRow = kKey + 8;
  if constexpr (!kPerChannel) {
    copy_rows_to<kKey, kThreads>(x.at(at.token, at.key_offset), x.rows.outer_stride, at.tokens,
                                 kChunkTokens, to, kKeyRow);
  } else {
#pragma unroll 2
    for (int n = 0; n < kKey / 32; ++n) {
      const int index = static_cast<int>(threadIdx.x) + n * kThreads;
      const int i = index / (kKey / 8);
      const int c = index % (kKey / 8) * 8;
      float out[8] = {};
      if (i < at.tokens) {
        float sum[8];
        load_n<8>(x.at(at.token + i, at.key_offset + c), out);
        load_all<8>(at.sums + i * kKey + c, sum);
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          const float last = kToEnd ? s.block_sums[i / kBlockTokens][c + m] : 0.0F;
          out[m] *= fast_exp2(kToEnd ? last - sum[m] : sum[m]);
        }
      }
      store_n<8>(to + i * kKeyRow + c, out);
    }
  }
}

template <int kKey, int kDim, bool kPerChannel>
__global__ void __launch_bounds__(kThreads, 2)
    inside_kernel(Recurrence<bf16> a, const ChunkSpan* spans, RecurrenceKept kept,
                  BackwardParts parts) {
  extern __shared__ float4 shared[];
  using Shared = InsideShared<kKey, kDim>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kKeyRow = Shared::kKeyRow;
  constexpr int kDimRow = Shared::kDimRow;
  constexpr int kTiles = kKey / 16;  // of 8 channels, in a warp
  const int thread = static_cast<int>(threadIdx.x);
  const ChunkHead head(a);
  const ChunkSpan span = spans[head.chunk];
  const int64_t part = blockIdx.x;
  InsidePlace<kKey> at;
  at.token = span.token;
  at.tokens = span.tokens;
  at.h = head.head;
  at.key_offset = head.key_head * kKey;
  at.sums = parts.sums + part * kChunkTokens * (kPerChannel ? kKey : 1);
  at.warp = thread / 32;
  at.lane = thread % 32;
  at.block = at.warp % kChunkBlocks;
  at.row = at.block * kBlockTokens + at.lane / 4;
  at.warp_column = at.warp / kChunkBlocks * (kKey / 2);
  at.column = at.warp_column + at.lane % 4 * 2;

  copy_rows_to<kDim, kThreads>(a.y.grad_at(at.token, at.h * kDim), a.heads * kDim, at.tokens,
                               kChunkTokens, s.dy, kDimRow);
  copy_rows_to<kChunkTokens, kThreads>(parts.du + part * kDim * kChunkTokens, kChunkTokens, kDim,
                                       kDim, s.du, kPairRow);
  if (!a.delta) {
    copy_rows_to<kDim, kThreads>(a.v.at(at.token, at.h * kDim), a.v.rows.outer_stride, at.tokens,
                                 kChunkTokens, s.errors, kDimRow);
  }
  commit_copies();
  if (thread < kChunkTokens) {
    s.weight[thread] = thread >= at.tokens  ? 0.0F
                       : a.weight.defined() ? *a.weight.at(at.token + thread, at.h)
                                            : 1.0F;
    if constexpr (!kPerChannel) {
      float sum = at.sums[thread];
      for (int m = kBlockTokens - 1; m < thread / kBlockTokens * kBlockTokens; m += kBlockTokens) {
        sum += at.sums[m];
      }
      s.sums[thread] = sum;
    }
  }
  if (thread < kChunkBlocks) {
    s.strong[thread] = 0;
  }
  round_rows<kKey, kDim>(kept.states + part * kKey * kDim, kDim, kKey, s.state);
  if (a.delta) {
    round_rows<kChunkTokens, kDim>(kept.errors + (at.token * a.heads + at.h) * kDim, a.heads * kDim,
                                   at.tokens, s.errors);
  }
  wait_for_copies<0>();
  __syncthreads();
  if constexpr (kPerChannel) {
    for (int x = thread; x < kChunkBlocks * kKey; x += kThreads) {
      const int b = x / kKey;
      const int c = x % kKey;
      const float sum = at.sums[(b * kBlockTokens + kBlockTokens - 1) * kKey + c];
      s.block_sums[b][c] = sum;
      s.decay[b][c] = fast_exp2(sum);
      if (sum < -kStrongDecay) {
        s.strong[b] = 1;
      }
    }
  }

  pair_gradients<kKey, kDim, kPerChannel>(a, at, s);
  if (a.v.grad != nullptr) {
    value_gradients(a, at, s);
  }
  if (a.log_decay.grad != nullptr) {
    state_changes(parts, at, s);
  }
  float dq[kTiles][4] = {};
  float row[kTiles][4] = {};
#pragma unroll 2
  for (int c = 0; c < kDim; c += 16) {
    uint32_t dy[4];
    uint32_t du[4];
    load_left(s.dy + at.block * kBlockTokens * kDimRow + c, kDimRow, dy);
    load_left_transposed(s.du + c * kPairRow + at.block * kBlockTokens, kPairRow, du);
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t b[4];
      load_right_of_rows(s.state + (at.warp_column + 16 * n) * kDimRow + c, kDimRow, b);
      mma(dq[2 * n], dy, b[0], b[1]);
      mma(dq[2 * n + 1], dy, b[2], b[3]);
      if (a.delta) {
        mma(row[2 * n], du, b[0], b[1]);
        mma(row[2 * n + 1], du, b[2], b[3]);
      }
    }
  }
  {
    float upper = 1.0F;
    float lower = 1.0F;
    if constexpr (!kPerChannel) {
      upper = fast_exp2(s.sums[at.row]);
      lower = fast_exp2(s.sums[at.row + 8]);
      scale_rows(upper, lower, dq);
    }
    scale_rows(-s.weight[at.row] * upper, -s.weight[at.row + 8] * lower, row);
  }
  __syncthreads();  // dy, du and the state are done with

  copy_rows_to<kKey, kThreads>(parts.states + part * kDim * kKey, kKey, kDim, kDim, s.dstate,
                               kKeyRow);
  stage_keys<kKey, kDim, kPerChannel, true>(a.k, at, s, s.k_after);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  add_rows<kKey, kDim, kPerChannel>(a, at, s, dq, row);
  add_keys(a, a.q, parts.dq_heads, at, dq);
  float(&change)[kTiles][4] = dq;  // in its place
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t query[kTiles];
    uint32_t key[kTiles];
    load_keys(a.q, at, half, query);
    load_keys(a.k, at, half, key);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int x = 2 * half;
      change[n][x] = first_of(query[n]) * dq[n][x] + first_of(key[n]) * row[n][x];
      change[n][x + 1] = second_of(query[n]) * dq[n][x + 1] + second_of(key[n]) * row[n][x + 1];
    }
  }
  __syncthreads();  // k_after is done with
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      s.rows[4 * n + x][thread] = row[n][x];
    }
  }

  float col[kTiles][4] = {};
#pragma unroll 2
  for (int c = 0; c < kDim; c += 16) {
    uint32_t error[4];
    load_left(s.errors + at.block * kBlockTokens * kDimRow + c, kDimRow, error);
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t b[4];
      load_right(s.dstate + c * kKeyRow + at.warp_column + 16 * n, kKeyRow, b);
      mma(col[2 * n], error, b[0], b[1]);
      mma(col[2 * n + 1], error, b[2], b[3]);
    }
  }
  {
    float upper = s.weight[at.row];
    float lower = s.weight[at.row + 8];
    if constexpr (!kPerChannel) {
      upper *= fast_exp2(s.sums[kChunkTokens - 1] - s.sums[at.row]);
      lower *= fast_exp2(s.sums[kChunkTokens - 1] - s.sums[at.row + 8]);
    }
    scale_rows(upper, lower, col);
  }
  if (a.log_decay.grad != nullptr) {
    sum_by_end<kKey, kDim, kPerChannel>(a, at, s, col);
  }
  __syncthreads();  // dS is done with
  stage_keys<kKey, kDim, kPerChannel, false>(a.q, at, s, s.q);
  stage_keys<kKey, kDim, kPerChannel, false>(a.k, at, s, s.k);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  add_columns<kKey, kDim, kPerChannel>(a, at, s, col);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t key[kTiles];
    load_keys(a.k, at, half, key);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      change[n][2 * half] -= first_of(key[n]) * col[n][2 * half];
      change[n][2 * half + 1] -= second_of(key[n]) * col[n][2 * half + 1];
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      col[n][x] += s.rows[4 * n + x][thread];
    }
  }
  add_keys(a, a.k, parts.dk_heads, at, col);
  if (a.log_decay.grad == nullptr) {
    return;
  }
  if constexpr (kPerChannel) {
    __syncthreads();  // q and k are done with
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(s.change + (at.row + 8 * half) * kKeyRow + at.column + 8 * n) =
            make_float2(change[n][2 * half], change[n][2 * half + 1]);
      }
    }
    __syncthreads();
    channel_decay_gradients(a, at, s);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0F;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        sum += change[n][2 * half] + change[n][2 * half + 1];
      }
      sum += __shfl_xor_sync(0xffffffffU, sum, 1);
      sum += __shfl_xor_sync(0xffffffffU, sum, 2);
      if (at.lane % 4 == 0) {
        s.change_part[at.warp / kChunkBlocks][at.row + 8 * half] = sum;
      }
    }
    __syncthreads();
    head_decay_gradients(a, at, s);
  }
}

}  // namespace

void recurrence_backward_inside(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                                const BackwardParts& parts, const Launch& on) {
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  with_head_dims(a.key_dim, a.dim, [&]<int kKey, int kDim>() {
    const auto blocks = static_cast<unsigned>(chunks.count * a.heads);
    constexpr size_t kShared = sizeof(InsideShared<kKey, kDim>);
    static_assert(kShared <= kBackwardShared);
    static_assert(kShared <= (228 / 2 - 1) * 1024, "two blocks on a multiprocessor");
    if (a.decay_per_channel) {
      launch(on, kName, inside_kernel<kKey, kDim, true>, blocks, kThreads, kShared, a, chunks.span,
             kept, parts);
    } else {
      launch(on, kName, inside_kernel<kKey, kDim, false>, blocks, kThreads, kShared, a, chunks.span,
             kept, parts);
    }
  });
}

}  // namespace cambium::cuda
