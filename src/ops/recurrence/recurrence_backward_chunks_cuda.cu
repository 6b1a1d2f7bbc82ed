// The gradients in chunks of 64 tokens on tensor cores, in the notation of chunk.h and of
// recurrence_backward_cuda.cuh. With dS the gradient by the state after a chunk and R the pairs of
// the delta rule's reads (zero without it):
//
//   du = (I + R' w)^-1 (P' dy + kb dS) = values + keys dS       dv = w du (+ skip dy)
//   dS before the chunk = exp(G_last) dS + (exp(G) q)' dy - (w exp(G) k)' du
//
// 1. prepare_kernel, for all chunks and heads at once: keys and values. The inverse is that of
//    I + w R, transposed: blocks of 16 by substitution in fp32, the others as products of numbers
//    split into two of bf16, which lose nothing that fp32 would keep of a gradient.
// 2. recurrence_backward_state_cuda.cu, over the chunks of a segment from its end: du and dS.
// 3. recurrence_backward_keys_cuda.cu, for all chunks and heads at once: everything else, from the
//    states and errors that forward kept.
//
// Rows past the tokens of a chunk are zero, which is exact.
#include "ops/recurrence/recurrence_backward_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr const char* kName = "recurrence (backward)";
constexpr int kThreads = 128;  // of prepare_kernel: a warp per block of 16 tokens

template <int kKey, int kDim>
struct PrepareShared {
  static constexpr int kRow = kKey + 8;
  bf16 q[kChunkTokens * kRow];      // exp(l) q
  bf16 k[kChunkTokens * kRow];      // exp(l) k
  bf16 after[kChunkTokens * kRow];  // exp(l_last - l) k, then exp(G_last - G) k
  bf16 dy[kChunkTokens * (kDim + 8)];
  bf16 pairs[kChunkTokens * kPairRow];  // P
  // w R, its blocks on the diagonal replaced by the inverses of I + them; as a sum of two.
  bf16 high[kChunkTokens * kPairRow];
  bf16 low[kChunkTokens * kPairRow];
  float diagonal[kChunkBlocks][kBlockTokens][kBlockTokens + 1];
  float bases[kChunkBlocks + 1][kKey];  // B
  float weight[kChunkTokens];
  float sums[kChunkTokens];  // l of one decay per head
  int strong[kChunkBlocks];
};

// l, and what it makes of q and k. A thread has a channel.
template <int kKey, int kDim>
__device__ __forceinline__ void apply_channel_decays(const Recurrence<bf16>& a,
                                                     const ChunkSpan& span, int h, float* sums,
                                                     float* totals, PrepareShared<kKey, kDim>& s) {
  constexpr int kRow = kKey + 8;
  const int c = static_cast<int>(threadIdx.x);
  float g[kChunkTokens];
#pragma unroll
  for (int i = 0; i < kChunkTokens; ++i) {
    g[i] = c < kKey && i < span.tokens ? log2_decay(a.log_decay.at(span.token + i, h * kKey + c))
                                       : 0.0F;
  }
  wait_for_copies<1>();
  __syncthreads();
  if (c >= kKey) {
    return;
  }
  float base = 0.0F;
#pragma unroll
  for (int b = 0; b < kChunkBlocks; ++b) {
    s.bases[b][c] = base;
    float sum = 0.0F;
#pragma unroll
    for (int i = kBlockTokens * b; i < kBlockTokens * (b + 1); ++i) {
      sum += g[i];
      g[i] = sum;
      sums[i * kKey + c] = sum;
    }
#pragma unroll
    for (int i = kBlockTokens * b; i < kBlockTokens * (b + 1); ++i) {
      const float decay = fast_exp2(g[i]);
      const float k = load(s.k + i * kRow + c);
      store(s.q + i * kRow + c, load(s.q + i * kRow + c) * decay);
      store(s.k + i * kRow + c, k * decay);
      store(s.after + i * kRow + c, k * fast_exp2(sum - g[i]));
    }
    base += sum;
    if (sum < -kStrongDecay) {
      s.strong[b] = 1;
    }
  }
  s.bases[kChunkBlocks][c] = base;
  totals[c] = fast_exp2(base);
}

template <int kKey, int kDim>
__device__ __forceinline__ void apply_head_decays(const Recurrence<bf16>& a, const ChunkSpan& span,
                                                  int h, float* sums, float* totals,
                                                  PrepareShared<kKey, kDim>& s) {
  constexpr int kRow = kKey + 8;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kChunkTokens) {
    float sum = thread < span.tokens ? log2_decay(a.log_decay.at(span.token + thread, h)) : 0.0F;
#pragma unroll
    for (int lanes = 1; lanes < kBlockTokens; lanes *= 2) {
      const float before = __shfl_up_sync(0xffffffffU, sum, lanes);
      sum += thread % kBlockTokens >= lanes ? before : 0.0F;
    }
    s.sums[thread] = sum;
    sums[thread] = sum;
    if (thread % kBlockTokens == kBlockTokens - 1 && sum < -kStrongDecay) {
      s.strong[thread / kBlockTokens] = 1;
    }
  }
  wait_for_copies<1>();
  __syncthreads();
  if (thread < kKey) {
    float base = 0.0F;
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      s.bases[b][thread] = base;
      base += s.sums[kBlockTokens * (b + 1) - 1];
    }
    s.bases[kChunkBlocks][thread] = base;
    totals[thread] = fast_exp2(base);
  }
  for (int x = thread; x < kChunkTokens * kKey / 8; x += kThreads) {
    const int i = x / (kKey / 8);
    const int at = i * kRow + x % (kKey / 8) * 8;
    const float decay = fast_exp2(s.sums[i]);
    const float to_end = fast_exp2(s.sums[i / kBlockTokens * kBlockTokens + 15] - s.sums[i]);
    float q[8];
    float k[8];
    float after[8];
    load_n<8>(s.q + at, q);
    load_n<8>(s.k + at, k);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      q[c] *= decay;
      after[c] = k[c] * to_end;
      k[c] *= decay;
    }
    store_n<8>(s.q + at, q);
    store_n<8>(s.k + at, k);
    store_n<8>(s.after + at, after);
  }
}

__device__ __forceinline__ void store_split(float first, float second, bf16* high, bf16* low) {
  const uint32_t rounded = pack(first, second);
  *reinterpret_cast<uint32_t*>(high) = rounded;
  *reinterpret_cast<uint32_t*>(low) = pack(first - first_of(rounded), second - second_of(rounded));
}
// An accumulator of 16 x 16 as a left operand, rounded, and what the rounding lost.
__device__ __forceinline__ void split_left(const float (&x)[2][4], float sign, uint32_t (&high)[4],
                                           uint32_t (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float first = sign * x[i / 2][i % 2 * 2];
    const float second = sign * x[i / 2][i % 2 * 2 + 1];
    high[i] = pack(first, second);
    low[i] = pack(first - first_of(high[i]), second - second_of(high[i]));
  }
}
// c += a x' for x (16, 16) with rows of kPairRow.
__device__ __forceinline__ void multiply_split(float (&c)[2][4], const uint32_t (&a_high)[4],
                                               const uint32_t (&a_low)[4], const bf16* x_high,
                                               const bf16* x_low) {
  uint32_t high[4];
  uint32_t low[4];
  load_right_of_rows(x_high, kPairRow, high);
  load_right_of_rows(x_low, kPairRow, low);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    mma(c[n], a_high, low[2 * n], low[2 * n + 1]);
    mma(c[n], a_low, high[2 * n], high[2 * n + 1]);
    mma(c[n], a_high, high[2 * n], high[2 * n + 1]);
  }
}

// P and w R of the pairs inside a block, one by one; q and k as they came.
template <int kKey, int kDim>
__device__ __forceinline__ void pairs_inside(const Recurrence<bf16>& a, const ChunkSpan& span,
                                             int h, const float* sums,
                                             PrepareShared<kKey, kDim>& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first = warp * kBlockTokens;
  const int64_t offset = a.key_head(h) * kKey;
  const auto sum_at = [&](int i, int c) { return sums[a.decay_per_channel ? i * kKey + c : i]; };
  for (int i = first; i < first + kBlockTokens; ++i) {
    for (int j = first; j < first + kBlockTokens; ++j) {
      float p = 0.0F;
      float r = 0.0F;
      if (j <= i && i < span.tokens) {
        for (int c = lane; c < kKey; c += 32) {
          const float x =
              load(a.k.at(span.token + j, offset + c)) * fast_exp2(sum_at(i, c) - sum_at(j, c));
          p = fmaf(load(a.q.at(span.token + i, offset + c)), x, p);
          r = fmaf(load(a.k.at(span.token + i, offset + c)), x, r);
        }
      }
      p = warp_sum(p);
      r = warp_sum(r);
      if (lane == 0) {
        store(s.pairs + i * kPairRow + j, p);
        s.diagonal[warp][i - first][j - first] = j < i ? s.weight[i] * r : 0.0F;
      }
    }
  }
}

// P and w R. A warp has a block of rows.
template <int kKey, int kDim>
__device__ __forceinline__ void make_pairs(const Recurrence<bf16>& a, const ChunkSpan& span, int h,
                                           const float* sums, PrepareShared<kKey, kDim>& s) {
  constexpr int kRow = kKey + 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int m = 0; m <= warp; ++m) {
    if (m == warp && s.strong[warp] != 0) {
      pairs_inside(a, span, h, sums, s);
      continue;
    }
    float p[2][4] = {};
    float r[2][4] = {};
#pragma unroll
    for (int c = 0; c < kKey; c += 16) {
      uint32_t query[4];
      uint32_t key[4];
      uint32_t b[4];
      load_left(s.q + warp * kBlockTokens * kRow + c, kRow, query);
      load_left(s.k + warp * kBlockTokens * kRow + c, kRow, key);
      load_right_of_rows(s.after + m * kBlockTokens * kRow + c, kRow, b);
      if (m + 1 != warp) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = c + 8 * i + lane % 4 * 2;
          const float f0 = fast_exp2(s.bases[warp][at] - s.bases[m + 1][at]);
          const float f1 = fast_exp2(s.bases[warp][at + 1] - s.bases[m + 1][at + 1]);
          query[2 * i] = scale_pair(query[2 * i], f0, f1);
          query[2 * i + 1] = scale_pair(query[2 * i + 1], f0, f1);
          key[2 * i] = scale_pair(key[2 * i], f0, f1);
          key[2 * i + 1] = scale_pair(key[2 * i + 1], f0, f1);
        }
      }
      mma(p[0], query, b[0], b[1]);
      mma(p[1], query, b[2], b[3]);
      if (a.delta) {
        mma(r[0], key, b[0], b[1]);
        mma(r[1], key, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = warp * kBlockTokens + lane / 4 + 8 * half;
        const int j = m * kBlockTokens + 8 * n + lane % 4 * 2;
        const float w = s.weight[i];
        *reinterpret_cast<uint32_t*>(s.pairs + i * kPairRow + j) =
            pack(j <= i ? p[n][2 * half] : 0.0F, j + 1 <= i ? p[n][2 * half + 1] : 0.0F);
        const float r0 = j < i ? w * r[n][2 * half] : 0.0F;
        const float r1 = j + 1 < i ? w * r[n][2 * half + 1] : 0.0F;
        if (m == warp) {
          s.diagonal[warp][i % kBlockTokens][j % kBlockTokens] = r0;
          s.diagonal[warp][i % kBlockTokens][j % kBlockTokens + 1] = r1;
        } else {
          store_split(r0, r1, s.high + i * kPairRow + j, s.low + i * kPairRow + j);
        }
      }
    }
  }
}

// The inverse of I + the warp's block on the diagonal: a lane has a column.
template <int kKey, int kDim>
__device__ __forceinline__ void invert_diagonal(PrepareShared<kKey, kDim>& s) {
  const int j = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  __syncwarp();
  if (j >= kBlockTokens) {
    return;
  }
  float column[kBlockTokens];
#pragma unroll
  for (int i = 0; i < kBlockTokens; ++i) {
    float x = i == j ? 1.0F : 0.0F;
#pragma unroll
    for (int m = 0; m < i; ++m) {
      x = fmaf(-s.diagonal[warp][i][m], column[m], x);
    }
    column[i] = i < j ? 0.0F : x;
    const int at = (warp * kBlockTokens + i) * kPairRow + warp * kBlockTokens + j;
    store(s.high + at, column[i]);
    store(s.low + at, column[i] - load(s.high + at));
  }
}

template <int kKey, int kDim>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(Recurrence<bf16> a, const ChunkSpan* spans, BackwardParts parts) {
  extern __shared__ float4 shared[];
  using Shared = PrepareShared<kKey, kDim>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kRow = Shared::kRow;
  constexpr int kDimRow = kDim + 8;
  const ChunkHead head(a);
  const ChunkSpan span = spans[head.chunk];
  const int h = head.head;
  const int offset = head.key_head * kKey;
  const int64_t part = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  copy_rows_to<kKey, kThreads>(a.q.at(span.token, offset), a.q.rows.outer_stride, span.tokens,
                               kChunkTokens, s.q, kRow);
  copy_rows_to<kKey, kThreads>(a.k.at(span.token, offset), a.k.rows.outer_stride, span.tokens,
                               kChunkTokens, s.k, kRow);
  commit_copies();
  copy_rows_to<kDim, kThreads>(a.y.grad_at(span.token, h * kDim), a.heads * kDim, span.tokens,
                               kChunkTokens, s.dy, kDimRow);
  commit_copies();
  if (thread < kChunkTokens) {
    s.weight[thread] = thread >= span.tokens ? 0.0F
                       : a.weight.defined()  ? *a.weight.at(span.token + thread, h)
                                             : 1.0F;
  }
  if (thread < kChunkBlocks) {
    s.strong[thread] = 0;
  }
  __syncthreads();
  float* totals = parts.totals + part * kKey;
  float* sums = parts.sums + part * kChunkTokens * (a.decay_per_channel ? kKey : 1);
  if (a.decay_per_channel) {
    apply_channel_decays(a, span, h, sums, totals, s);
  } else {
    apply_head_decays(a, span, h, sums, totals, s);
  }
  __syncthreads();
  make_pairs(a, span, h, sums, s);
  if (a.delta) {
    invert_diagonal(s);
  }
  wait_for_copies<0>();
  __syncthreads();

  for (int x = thread; x < kChunkTokens * kKey / 8; x += kThreads) {
    const int i = x / (kKey / 8);
    const int c = x % (kKey / 8) * 8;
    const int block = i / kBlockTokens;
    const int64_t to = (part * kChunkTokens + i) * kKey + c;
    float rows[8];
    float start[8];
    load_n<8>(s.q + i * kRow + c, rows);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      start[n] = fast_exp2(s.bases[block][c + n]);
      rows[n] *= start[n];
    }
    store_n<8>(parts.queries + to, rows);
    if (a.delta) {
      load_n<8>(s.k + i * kRow + c, rows);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        rows[n] *= -s.weight[i] * start[n];
      }
      store_n<8>(parts.reads + to, rows);
    }
    load_n<8>(s.after + i * kRow + c, rows);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      rows[n] *= fast_exp2(s.bases[kChunkBlocks][c + n] - s.bases[block + 1][c + n]);
    }
    store_n<8>(a.delta ? s.after + i * kRow + c : parts.keys + to, rows);
  }
  __syncthreads();

  // A warp has the rows of its block of the transposed inverse, of (P inverse)', keys and values.
  uint32_t read[kChunkBlocks][4];
  if (a.delta) {
    uint32_t high[kChunkBlocks][4];
    uint32_t low[kChunkBlocks][4];
#pragma unroll
    for (int m = 0; m < kChunkBlocks; ++m) {
      const int diagonal = m * kBlockTokens * (kPairRow + 1);
      if (m == warp) {
        load_left_transposed(s.high + diagonal, kPairRow, high[m]);
        load_left_transposed(s.low + diagonal, kPairRow, low[m]);
      } else if (m > warp) {
        float sum[2][4] = {};
#pragma unroll
        for (int n = 0; n < m; ++n) {
          if (n >= warp) {
            const int at = m * kBlockTokens * kPairRow + n * kBlockTokens;
            multiply_split(sum, high[n], low[n], s.high + at, s.low + at);
          }
        }
        uint32_t left_high[4];
        uint32_t left_low[4];
        split_left(sum, -1.0F, left_high, left_low);
        float x[2][4] = {};
        multiply_split(x, left_high, left_low, s.high + diagonal, s.low + diagonal);
        split_left(x, 1.0F, high[m], low[m]);
      }
    }
#pragma unroll
    for (int i = 0; i < kChunkBlocks; ++i) {
      if (i >= warp) {
        float sum[2][4] = {};
#pragma unroll
        for (int m = 0; m <= i; ++m) {
          if (m >= warp) {
            uint32_t b[4];
            load_right_of_rows(s.pairs + i * kBlockTokens * kPairRow + m * kBlockTokens, kPairRow,
                               b);
            mma(sum[0], high[m], b[0], b[1]);
            mma(sum[1], high[m], b[2], b[3]);
          }
        }
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          read[i][x] = pack(sum[x / 2][x % 2 * 2], sum[x / 2][x % 2 * 2 + 1]);
        }
      }
    }
    float keys[kKey / 8][4] = {};
#pragma unroll
    for (int m = 0; m < kChunkBlocks; ++m) {
      if (m >= warp) {
#pragma unroll
        for (int n = 0; n < kKey / 16; ++n) {
          uint32_t b[4];
          load_right(s.after + m * kBlockTokens * kRow + 16 * n, kRow, b);
          mma(keys[2 * n], high[m], b[0], b[1]);
          mma(keys[2 * n + 1], high[m], b[2], b[3]);
        }
      }
    }
    bf16* to =
        parts.keys + (part * kChunkTokens + warp * kBlockTokens + lane / 4) * kKey + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKey / 8; ++n) {
      *reinterpret_cast<uint32_t*>(to + 8 * n) = pack(keys[n][0], keys[n][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * kKey + 8 * n) = pack(keys[n][2], keys[n][3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunkBlocks; ++i) {
      if (i >= warp) {
        load_left_transposed(s.pairs + i * kBlockTokens * kPairRow + warp * kBlockTokens, kPairRow,
                             read[i]);
      }
    }
  }
  float values[kDim / 8][4] = {};
#pragma unroll
  for (int i = 0; i < kChunkBlocks; ++i) {
    if (i >= warp) {
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        load_right(s.dy + i * kBlockTokens * kDimRow + 16 * n, kDimRow, b);
        mma(values[2 * n], read[i], b[0], b[1]);
        mma(values[2 * n + 1], read[i], b[2], b[3]);
      }
    }
  }
  bf16* to =
      parts.values + (part * kChunkTokens + warp * kBlockTokens + lane / 4) * kDim + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    *reinterpret_cast<uint32_t*>(to + 8 * n) = pack(values[n][0], values[n][1]);
    *reinterpret_cast<uint32_t*>(to + 8 * kDim + 8 * n) = pack(values[n][2], values[n][3]);
  }
}

// Sums the parts (T, key heads, sharing, K) of the gradients by q and k, in order. A thread has two
// channels; q and k may be one tensor.
__global__ void __launch_bounds__(256)
    sum_parts_kernel(Recurrence<bf16> a, int64_t sharing, const float* dq_parts,
                     const float* dk_parts) {
  const int64_t index = 2 * (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x);
  const int64_t row = a.key_heads * a.key_dim;
  if (index >= a.y.rows.outer * row) {
    return;
  }
  const int64_t t = index / row;
  const int64_t offset = index % row;
  const auto add = [&](const View<bf16>& to, const float* parts) {
    if (to.grad == nullptr) {
      return;
    }
    const float* from =
        parts + (t * a.key_heads + offset / a.key_dim) * sharing * a.key_dim + offset % a.key_dim;
    float sum[2];
    load_n<2>(to.grad_at(t, offset), sum);
    for (int64_t i = 0; i < sharing; ++i) {
      float part[2];
      load_n<2>(from + i * a.key_dim, part);
      sum[0] += part[0];
      sum[1] += part[1];
    }
    store_n<2>(to.grad_at(t, offset), sum);
  };
  add(a.q, dq_parts);
  add(a.k, dk_parts);
}

void sum_parts(const Recurrence<bf16>& a, int64_t sharing, const float* dq_parts,
               const float* dk_parts, const Launch& on) {
  if (a.q.grad != nullptr || a.k.grad != nullptr) {
    launch(on, kName, sum_parts_kernel,
           static_cast<unsigned>(ceil_div(a.y.rows.outer * a.key_heads * a.key_dim / 2, 256)), 256,
           0, a, sharing, dq_parts, dk_parts);
  }
}

template <int kKey, int kDim>
void solve(const Recurrence<bf16>& a, const DeviceChunks& chunks, const BackwardParts& parts,
           const Launch& on) {
  constexpr size_t kShared = sizeof(PrepareShared<kKey, kDim>);
  static_assert(kShared <= kBackwardShared);
  launch(on, kName, prepare_kernel<kKey, kDim>, static_cast<unsigned>(chunks.count * a.heads),
         kThreads, kShared, a, chunks.span, parts);
}

bool rows_aligned(const View<bf16>& x) {
  return aligned(x.data) && aligned(x.grad) && x.rows.outer_stride % 8 == 0;
}

}  // namespace

bool recurrence_has_backward_chunks(const Recurrence<bf16>& a) {
  const auto fits = [](int64_t dim) { return dim == 64 || dim == 96 || dim == 128; };
  // One input's gradient is added to by one thread an element, but for two inputs that are one
  // tensor: q and k may be.
  const bool apart = (a.v.grad == nullptr || (a.v.grad != a.q.grad && a.v.grad != a.k.grad)) &&
                     (a.weight.grad == nullptr || a.weight.grad != a.log_decay.grad);
  // Segments of a few tokens would be mostly padding.
  const bool long_enough = a.segments.tokens() >= count_chunks(a.segments) * (kChunkTokens / 4);
  // Without the delta rule the gradient of a decay per channel is a small difference of large sums,
  // of which factors in bf16 leave too little (3 % off at decays about exp(-3)).
  const bool exact_enough = a.delta || a.decay_dim() == 1;
  return fits(a.key_dim) && fits(a.dim) && exact_enough && apart && long_enough &&
         rows_aligned(a.q) && rows_aligned(a.k) && rows_aligned(a.v) && aligned(a.y.grad) &&
         aligned(a.kept) && most_shared() >= kBackwardShared;
}

void recurrence_backward_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                                const Launch& on) {
  if (recurrence_has_backward_scan(a)) {
    const int64_t shares = recurrence_backward_shares(a, chunks);
    const int64_t parts = a.y.rows.outer * a.key_heads * shares * a.key_dim;
    auto* dq_parts = shares > 1 ? scratch<float>(on, parts) : nullptr;
    auto* dk_parts = shares > 1 ? scratch<float>(on, parts) : nullptr;
    recurrence_backward_scan(a, chunks, shares, dq_parts, dk_parts, on);
    if (shares > 1) {
      sum_parts(a, shares, dq_parts, dk_parts, on);
    }
    return;
  }
  const int64_t count = chunks.count * a.heads;
  const bool shared_keys = a.heads != a.key_heads;
  const int64_t keys = count * kChunkTokens * a.key_dim;
  const int64_t values = count * kChunkTokens * a.dim;
  const int64_t by_heads = a.y.rows.outer * a.heads * a.key_dim;
  const BackwardParts parts{
      .sums = scratch<float>(on, count * kChunkTokens * a.decay_dim()),
      .queries = scratch<bf16>(on, keys),
      .reads = a.delta ? scratch<bf16>(on, keys) : nullptr,
      .keys = scratch<bf16>(on, keys),
      .values = scratch<bf16>(on, values),
      .totals = scratch<float>(on, count * a.key_dim),
      .du = scratch<bf16>(on, values),
      .states = scratch<bf16>(on, count * a.key_dim * a.dim),
      .dq_heads = shared_keys ? scratch<float>(on, by_heads) : nullptr,
      .dk_heads = shared_keys ? scratch<float>(on, by_heads) : nullptr,
  };
  with_head_dims(a.key_dim, a.dim,
                 [&]<int kKey, int kDim>() { solve<kKey, kDim>(a, chunks, parts, on); });
  recurrence_backward_walk(a, chunks, parts, on);
  recurrence_backward_inside(a, chunks, parts, on);
  if (shared_keys) {
    sum_parts(a, a.heads / a.key_heads, parts.dq_heads, parts.dk_heads, on);
  }
}

}  // namespace cambium::cuda
