// Chunks with a decay per channel of the key (Kimi Delta Attention): what recurrence_chunks_cuda.cu
// takes of q, k and the decays alone, for all chunks and heads at once.
//
//   P_ij = sum_c q_ic exp(G_ic - G_jc) k_jc w_j,  j <= i     A_ij with k_i for q_i,  j < i
//
// exp(G_i - G_j) does not factor into exp(G_i) exp(-G_j), which overflows. Rows are taken in blocks
// of 16, a warp each, from their first row r: exp(G_i - G_r), at most 1, times exp(G_r - G_j),
// which is at most 1 for columns before the block and bounded for those inside it unless the block
// decays as good as wholly (kMostDecay): then its pairs are taken one by one, in fp32.
//
// Factors are made in the registers in which tensor cores take them; G is in units of log 2.
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr float kMostDecay = 90.0F;  // of exponents of 2, which bf16 and fp32 have up to 127

template <int kKey, int kDim>
struct ChannelShared {
  static constexpr int kRow = kKey + 8;
  union {
    bf16 q[kC * kRow];
    float x[kC * kInversePad];  // A, when q is used up
  };
  bf16 k[kC * kRow];  // then -exp(G) k
  union {
    float sums[kC * kRow];    // G
    bf16 v[kC * (kDim + 8)];  // when G is used up
  };
  float weight[kC];
};

// Elements of a tile of G at `p`, rows kRow apart, in the order of accumulators.
template <int kRow>
__device__ __forceinline__ void load_sums(const float* p, float (&g)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float pair[2];
      load_n<2>(p + tile_row(2 * half) * kRow + tile_column(n, 0), pair);
      g[n][2 * half] = pair[0];
      g[n][2 * half + 1] = pair[1];
    }
  }
}

__device__ __forceinline__ void scale(float (&x)[2][4], const float (&factor)[2][4]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    x[e / 4][e % 4] *= factor[e / 4][e % 4];
  }
}
/// x * factor, rounded: of a left operand, and of a right one.
__device__ __forceinline__ void scale_left(const uint32_t (&x)[4], const float (&factor)[2][4],
                                           uint32_t (&to)[4]) {
  float wide[2][4];
  widen_left(x, wide);
  scale(wide, factor);
  round_left(wide, to);
}
__device__ __forceinline__ void scale_right(const uint32_t (&x)[4], const float (&factor)[2][4],
                                            uint32_t (&to)[4]) {
  float wide[2][4];
  widen_right(x, wide);
  scale(wide, factor);
  round_right(wide, to);
}

template <int kKey, int kDim, bool kDelta>
__global__ void __launch_bounds__(128, 3)
    prepare_channels_kernel(Recurrence<bf16> a, const ChunkSpan* spans, ChunkTiles parts) {
  extern __shared__ float4 shared[];
  using Shared = ChannelShared<kKey, kDim>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kRow = Shared::kRow;
  constexpr int kKeyTiles = kKey / 16;
  constexpr int kDimTiles = kDim / 16;
  const int64_t chunk = last_first(a.heads);
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int64_t part = chunk * a.heads + h;
  const int64_t key_offset = a.key_head(h) * kKey;
  copy_rows<kKey, 128>(a.q.at(span.token, key_offset), a.q.rows.outer_stride, span.tokens, thread,
                       s.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_offset), a.k.rows.outer_stride, span.tokens, thread,
                       s.k);
  commit_copies();
  float* ends = parts.ends + part * (kEnds + kKey);
  if (thread < kC) {
    const float weight = weight_of(a, span.token, span.tokens, thread, h);
    s.weight[thread] = weight;
    ends[thread] = weight;
  }
  if (thread < kKey) {
    float sum = 0.0F;
    for (int first = 0; first < kC; first += 32) {
      float x[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        x[i] = log_decay_of(a, span.token, span.tokens, first + i, h * kKey + thread);
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        sum = fmaf(x[i], kLog2E, sum);
        s.sums[(first + i) * kRow + thread] = sum;
      }
    }
    ends[kEnds + thread] = fast_exp2(sum);
  }
  wait_for_copies<0>();
  __syncthreads();

  const float* block = s.sums + 16 * warp * kRow;
  bool bounded = true;
#pragma unroll
  for (int c = 0; c < kKey; c += 32) {
    bounded = bounded && block[c + lane] - block[15 * kRow + c + lane] <= kMostDecay;
  }
  bounded = __all_sync(kWholeWarp, bounded) != 0;
  float p[kRowTiles][2][4] = {};
  float r[kRowTiles][2][4] = {};
#pragma unroll 2
  for (int t = 0; t < kKeyTiles; ++t) {
    float from[2][2];  // G_r
    float last[2][2];  // G_last
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_n<2>(block + 16 * t + tile_column(n, 0), from[n]);
      load_n<2>(s.sums + (kC - 1) * kRow + 16 * t + tile_column(n, 0), last[n]);
    }
    float g[2][4];
    float factor[2][4];
    load_sums<kRow>(block + 16 * t, g);
    uint32_t q[4];
    uint32_t k[4];
    uint32_t tile[4];
    load_left(s.q + 16 * warp * kRow + 16 * t, kRow, q);
    load_left(s.k + 16 * warp * kRow + 16 * t, kRow, k);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      factor[e / 4][e % 4] = fast_exp2(last[e / 4][e % 2] - g[e / 4][e % 4]);
    }
    scale_left(k, factor, tile);
    transpose_to_right(tile);
    store_tile(parts.keys + (part * kKeyTiles + t) * kRowTiles + warp, tile);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      factor[e / 4][e % 4] = fast_exp2(g[e / 4][e % 4]);
    }
    scale_left(q, factor, tile);
    store_tile(parts.queries + (part * kRowTiles + warp) * kKeyTiles + t, tile);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      factor[e / 4][e % 4] = fast_exp2(g[e / 4][e % 4] - from[e / 4][e % 2]);
    }
    uint32_t query[4];
    uint32_t key[4];
    scale_left(q, factor, query);
    scale_left(k, factor, key);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j < warp || (j == warp && bounded)) {
        load_right_of_rows(s.k + 16 * j * kRow + 16 * t, kRow, tile);
        load_sums<kRow>(s.sums + 16 * j * kRow + 16 * t, g);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          factor[e / 4][e % 4] = fast_exp2(from[e / 4][e % 2] - g[e / 4][e % 4]);
        }
        uint32_t right[4];
        scale_right(tile, factor, right);
        multiply_tiles(p[j], query, right);
        if constexpr (kDelta) {
          multiply_tiles(r[j], key, right);
        }
      }
    }
  }
  if (!bounded) {
    const bf16* q = s.q + 16 * warp * kRow;
    const bf16* k = s.k + 16 * warp * kRow;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = tile_row(e % 4) * kRow;
      const int j = tile_column(e / 4, e % 4) * kRow;
      float read = 0.0F;
      float key_read = 0.0F;
      for (int c = 0; j <= i && c < kKey; ++c) {
        const float x = load(k + j + c) * fast_exp2(block[i + c] - block[j + c]);
        read = fmaf(load(q + i + c), x, read);
        key_read = fmaf(load(k + i + c), x, key_read);
      }
#pragma unroll
      for (int b = 0; b < kRowTiles; ++b) {
        if (b == warp) {
          p[b][e / 4][e % 4] = read;
          r[b][e / 4][e % 4] = key_read;
        }
      }
    }
  }
  __syncthreads();  // q is used up
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 16 * warp + tile_row(e);
          const int column = 16 * j + tile_column(n, e);
          const float weight = s.weight[column];
          p[j][n][e] = column <= i ? p[j][n][e] * weight : 0.0F;
          if constexpr (kDelta) {
            s.x[i * kInversePad + column] = column < i ? r[j][n][e] * weight : 0.0F;
          }
        }
      }
      uint32_t tile[4];
      round_left(p[j], tile);
      store_tile(parts.pairs + (part * kRowTiles + warp) * kRowTiles + j, tile);
    }
  }
  if constexpr (kDelta) {
    for (int x = thread; x < kC * kKey / 2; x += 128) {
      const int at = x / (kKey / 2) * kRow + x % (kKey / 2) * 2;
      float k[2];
      float g[2];
      load_n<2>(s.k + at, k);
      load_n<2>(s.sums + at, g);
      *reinterpret_cast<uint32_t*>(s.k + at) =
          pack(-fast_exp2(g[0]) * k[0], -fast_exp2(g[1]) * k[1]);
    }
  }
  __syncthreads();  // G is used up
  copy_rows<kDim, 128>(a.v.at(span.token, h * kDim), a.v.rows.outer_stride, span.tokens, thread,
                       s.v);
  commit_copies();
  if constexpr (kDelta) {
    solve_tiles<kKey, kDim>(s.x, nullptr, s.k, s.v, parts.reads + part * kRowTiles * kKeyTiles,
                            parts.errors + part * kDimTiles * kRowTiles);
  } else {
    wait_for_copies<0>();
    __syncthreads();
    for (int m = 0; m < kDimTiles; ++m) {
      uint32_t tile[4];
      load_right(s.v + 16 * warp * (kDim + 8) + 16 * m, kDim + 8, tile);
      store_tile(parts.errors + (part * kDimTiles + m) * kRowTiles + warp, tile);
    }
  }
}

template <int kKey, int kDim>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const ChunkTiles& parts,
         const Launch& on) {
  launch(on, "recurrence",
         a.delta ? prepare_channels_kernel<kKey, kDim, true>
                 : prepare_channels_kernel<kKey, kDim, false>,
         static_cast<unsigned>(chunks.count * a.heads), 128, sizeof(ChannelShared<kKey, kDim>), a,
         chunks.span, parts);
}

}  // namespace

void prepare_channels(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                      const ChunkTiles& parts, const Launch& on) {
  if (a.key_dim == 64) {
    a.dim == 64 ? run<64, 64>(a, chunks, parts, on) : run<64, 128>(a, chunks, parts, on);
  } else {
    a.dim == 64 ? run<128, 64>(a, chunks, parts, on) : run<128, 128>(a, chunks, parts, on);
  }
}

}  // namespace cambium::cuda
