// Chunks with one decay a head and without the delta rule (Mamba-2, Lightning): what a token writes
// is w v, so that nothing of a chunk waits for the chunk before but its state. In the notation of
// recurrence_chunks_cuda.cu, with S transposed (V, K):
//
//   y = exp(G) q S + P v          S' = S' exp(G_last) + (v' f) k',  f = exp(G_last - G) w
//
// 1. product_kernel, for all chunks and key heads at once: q k', which the value heads of a key
// head
//    share.
// 2. scan_kernel, a block for each segment, head and 64 columns of the value, over the chunks in
//    turn: states never leave registers, so of the large the device's memory sees v and y alone.
//    Four warps have 16 columns each, of the state and of y; four more work ahead: they fetch q, k
//    and v into shared memory and make the pairs P of q k' and the decays.
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kColumns = 64;  // of the value, a block's
constexpr int kValuePad = kColumns + 8;
constexpr int kScanStages = 3;

// The tiles of pairs on and below the diagonal.
constexpr int kPairTiles = kRowTiles * (kRowTiles + 1) / 2;
constexpr __host__ __device__ int pair_tile(int i, int j) {
  return i * (i + 1) / 2 + j;
}

// products (chunks, key heads, kPairTiles, 2, 32 lanes): accumulators.
template <int kKey>
__global__ void __launch_bounds__(128)
    product_kernel(Recurrence<bf16> a, const ChunkSpan* spans, float4* products) {
  constexpr int kRow = kKey + 8;
  __shared__ __align__(16) bf16 q[kC * kRow];
  __shared__ __align__(16) bf16 k[kC * kRow];
  const int64_t chunk = blockIdx.x / a.key_heads;
  const int64_t key_head = blockIdx.x % a.key_heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  copy_rows<kKey, 128>(a.q.at(span.token, key_head * kKey), a.q.rows.outer_stride, span.tokens,
                       thread, q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_head * kKey), a.k.rows.outer_stride, span.tokens,
                       thread, k);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  const int warp = thread / 32;
  float p[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t query[4];
    load_left(q + 16 * warp * kRow + 16 * t, kRow, query);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(p[j], query, right);
      }
    }
  }
  float4* to =
      products + (blockIdx.x * int64_t{kPairTiles} + pair_tile(warp, 0)) * 64 + thread % 32;
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        to[64 * j + 32 * n] = make_float4(p[j][n][0], p[j][n][1], p[j][n][2], p[j][n][3]);
      }
    }
  }
}

template <int kKey>
struct ScanShared {
  static constexpr int kRow = kKey + 8;
  struct Stage {
    bf16 q[kC * kRow];
    bf16 k[kC * kRow];
    bf16 v[kC * kValuePad];
  };
  Stage stage[kScanStages];
  // Of two chunks: one is read while the next is made.
  Tile pairs[2][kPairTiles];
  float starts[2][kC];  // exp(G)
  float ends[2][kC];    // exp(G_last - G) w
  float decay[2];       // exp(G_last)
  float sums[4][kC];    // G in units of log 2, of each warp that makes pairs
};

template <int kKey>
__global__ void __launch_bounds__(256) scan_kernel(Recurrence<bf16> a, const int32_t* first_chunk,
                                                   RecurrenceKept kept, const float4* products) {
  extern __shared__ float4 shared[];
  using Shared = ScanShared<kKey>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kRow = Shared::kRow;
  constexpr int kKeyTiles = kKey / 16;
  const int64_t slices = a.dim / kColumns;
  const int64_t slice = blockIdx.x % slices;
  const int64_t h = blockIdx.x / slices % a.heads;
  const int64_t segment = blockIdx.x / slices / a.heads;
  if (!in_chunks(a.segments, segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const bool scans = threadIdx.x < 128;
  const int64_t first = first_chunk[segment];
  const auto count = static_cast<int>(first_chunk[segment + 1] - first);
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const int64_t position = a.segments.position[segment];
  const int64_t key_head = a.key_head(h);
  const int64_t value = slice * kColumns + 16 * warp;  // a scanning warp's first column
  const auto token_of = [&](int c) { return begin + chunk_begin(position, c); };
  const auto tokens_of = [&](int c) {
    const int64_t end = c + 1 == count ? length : chunk_begin(position, c + 1);
    return static_cast<int>(end - chunk_begin(position, c));
  };

  // --- Of the warps that work ahead.
  const auto fetch = [&](int c) {
    if (c < count) {
      auto& stage = s.stage[c % kScanStages];
      const int64_t token = token_of(c);
      const int tokens = tokens_of(c);
      copy_rows<kKey, 128>(a.q.at(token, key_head * kKey), a.q.rows.outer_stride, tokens, thread,
                           stage.q);
      copy_rows<kKey, 128>(a.k.at(token, key_head * kKey), a.k.rows.outer_stride, tokens, thread,
                           stage.k);
      copy_rows<kColumns, 128>(a.v.at(token, h * a.dim + slice * kColumns), a.v.rows.outer_stride,
                               tokens, thread, stage.v);
    }
    commit_copies();
  };
  const auto make_pairs = [&](int c) {
    const int64_t token = token_of(c);
    const int tokens = tokens_of(c);
    const float4* from =
        products + (((first + c) * a.key_heads + key_head) * kPairTiles + pair_tile(warp, 0)) * 64 +
        lane;
    float4 product[kRowTiles][2];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        product[j][0] = from[64 * j];
        product[j][1] = from[64 * j + 32];
      }
    }
    const float weight[2] = {weight_of(a, token, tokens, 2 * lane, h),
                             weight_of(a, token, tokens, 2 * lane + 1, h)};
    float own[2];
    sum_decays(a, token, tokens, h, own);
    own[0] *= kLog2E;
    own[1] *= kLog2E;
    const float last = __shfl_sync(kWholeWarp, own[1], 31);
    float* sums = s.sums[warp];
    sums[2 * lane] = own[0];
    sums[2 * lane + 1] = own[1];
    const int buffer = c % 2;
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s.starts[buffer][2 * lane + i] = fast_exp2(own[i]);
        s.ends[buffer][2 * lane + i] = fast_exp2(last - own[i]) * weight[i];
      }
      if (lane == 0) {
        s.decay[buffer] = fast_exp2(last);
      }
    }
    __syncwarp();
    const float row[2] = {sums[16 * warp + tile_row(0)], sums[16 * warp + tile_row(2)]};
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        float p[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float of[4] = {product[j][n].x, product[j][n].y, product[j][n].z, product[j][n].w};
          const int column = 16 * j + tile_column(n, 0);
          float sum[2];
          load_n<2>(sums + column, sum);
          // Its weight is of lane column / 2.
          const float w[2] = {__shfl_sync(kWholeWarp, weight[0], column / 2),
                              __shfl_sync(kWholeWarp, weight[1], column / 2)};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = of[e] * fast_exp2(row[e / 2] - sum[e % 2]) * w[e % 2];
            p[n][e] = column + e % 2 <= 16 * warp + tile_row(e) ? x : 0.0F;
          }
        }
        uint32_t tile[4];
        round_left(p, tile);
        store_tile(&s.pairs[buffer][pair_tile(warp, j)], tile);
      }
    }
    __syncwarp();  // before the sums of the next chunk
  };

  // --- Of the warps that scan: S' (16 columns of the value, K).
  float state[kKeyTiles][2][4];
  float* slot = a.state_of(segment, h);
  const auto at = [&](int t, int n, int e) {
    return (16 * t + tile_column(n, e)) * a.dim + value + tile_row(e);
  };
  const auto scan = [&](int c) {
    const auto& stage = s.stage[c % kScanStages];
    const int buffer = c % 2;
    if (kept.states != nullptr) {
      float* to = kept.states + ((first + c) * a.heads + h) * kKey * a.dim;
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          to[at(t, x / 4, x % 4)] = state[t][x / 4][x % 4];
        }
      }
    }
    float y[kRowTiles][2][4] = {};
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
      uint32_t right[4];
      round_right(state[t], right);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t left[4];
        load_left(stage.q + 16 * i * kRow + 16 * t, kRow, left);
        multiply_tiles(y[i], left, right);
      }
    }
    uint32_t values[kRowTiles][4];  // (value, tokens)
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      load_right(stage.v + 16 * j * kValuePad + 16 * warp, kValuePad, values[j]);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const float start[2] = {s.starts[buffer][16 * i + tile_row(0)],
                              s.starts[buffer][16 * i + tile_row(2)]};
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        y[i][x / 4][x % 4] *= start[x % 4 / 2];
      }
    }
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int i = j; i < kRowTiles; ++i) {
        uint32_t left[4];
        load_tile(&s.pairs[buffer][pair_tile(i, j)], left);
        multiply_tiles(y[i], left, values[j]);
      }
    }
    const float decay = s.decay[buffer];
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        state[t][x / 4][x % 4] *= decay;
      }
    }
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      float written[2][4];
      widen_right(values[j], written);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float end[2];
        load_n<2>(&s.ends[buffer][16 * j + tile_column(n, 0)], end);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          written[n][e] *= end[e % 2];
        }
      }
      uint32_t left[4];
      round_left(written, left);
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        uint32_t right[4];
        load_right(stage.k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(state[t], left, right);
      }
    }
    const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
    const int tokens = tokens_of(c);
    bf16* to = a.y.at(token_of(c) + tile_row(0), h * a.dim + value + tile_column(0, 0));
    const bf16* v = stage.v + tile_row(0) * kValuePad + 16 * warp + tile_column(0, 0);
#pragma unroll
    for (int x = 0; x < 2 * kRowTiles; ++x) {  // 8 rows at a time
      if (8 * x + tile_row(0) < tokens) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float* of = &y[x / 2][n][x % 2 * 2];
          float of_v[2];
          load_n<2>(v + 8 * x * kValuePad + 8 * n, of_v);
          *reinterpret_cast<uint32_t*>(to + 8 * n) =
              pack(fmaf(skip, of_v[0], of[0]), fmaf(skip, of_v[1], of[1]));
        }
      }
      to += 8 * a.y.rows.outer_stride;
    }
  };

  if (scans) {
    const bool continues = a.segments.continues(segment);
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        state[t][x / 4][x % 4] = continues ? slot[at(t, x / 4, x % 4)] : 0.0F;
      }
    }
  }
  for (int c = 1 - kScanStages; c < count; ++c) {
    if (!scans) {
      wait_for_copies<kScanStages - 2>();
    }
    __syncthreads();  // chunk c is there, chunk c - 1 is done with
    if (!scans) {
      fetch(c + kScanStages - 1);
      if (c + 1 >= 0 && c + 1 < count) {
        make_pairs(c + 1);
      }
    } else if (c >= 0) {
      scan(c);
    }
  }
  if (scans && slot != nullptr) {
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        slot[at(t, x / 4, x % 4)] = state[t][x / 4][x % 4];
      }
    }
  }
}

template <int kKey>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
         const Launch& on) {
  const int64_t count = chunks.count * a.key_heads;
  auto* products = scratch<float4>(on, count * kPairTiles * 64);
  launch(on, "recurrence", product_kernel<kKey>, static_cast<unsigned>(count), 128, 0, a,
         chunks.span, products);
  launch(on, "recurrence", scan_kernel<kKey>,
         static_cast<unsigned>(a.segments.count * a.heads * (a.dim / kColumns)), 256,
         sizeof(ScanShared<kKey>), a, chunks.first, kept, products);
}

}  // namespace

void scan_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const Launch& on) {
  a.key_dim == 64 ? run<64>(a, chunks, kept, on) : run<128>(a, chunks, kept, on);
}

}  // namespace cambium::cuda
