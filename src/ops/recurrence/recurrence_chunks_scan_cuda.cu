// Chunks with one decay a head and without the delta rule (Mamba-2, Lightning): what a token writes
// is w v, so that nothing of a chunk waits for the chunk before but its state. In the notation of
// recurrence_chunks_cuda.cu, with S transposed (V, K):
//
//   y = exp(G) q S + P v          S' = S' exp(G_last) + (v' f) k',  f = exp(G_last - G) w
//
// 1. pair_kernel, for all chunks and key heads at once: q and k as tiles and q k', which value
// heads
//    that share a key head share.
// 2. scan_kernel, a block for each segment, head and 64 columns of the value, over the chunks in
//    turn: states never leave registers, so the device's memory sees v and y alone. Four warps have
//    16 columns each, of the state and of y; four more work one chunk ahead: they fetch q, k and v
//    into shared memory and make the pairs P of q k' and the decays.
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kColumns = 64;  // of the value, a block's
constexpr int kValuePad = kColumns + 8;
constexpr int kScanStages = 3;
constexpr int kPairTiles = kRowTiles * (kRowTiles + 1) / 2;

constexpr __host__ __device__ int pair_tile(int i, int j) {
  return i * (i + 1) / 2 + j;
}

// Per chunk and key head.
struct SharedTiles {
  Tile* queries;     // (4, K / 16), (tokens, key), left
  Tile* keys;        // (K / 16, 4), (key, tokens), right
  float4* products;  // (10 tiles on and below the diagonal, 2, 32 lanes) q k', as accumulators
};

template <int kKey>
__global__ void __launch_bounds__(128)
    pair_kernel(Recurrence<bf16> a, const ChunkSpan* spans, SharedTiles parts) {
  constexpr int kRow = kKey + 8;
  constexpr int kKeyTiles = kKey / 16;
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
  const int lane = thread % 32;
  const int64_t part = chunk * a.key_heads + key_head;
  Tile* queries = parts.queries + part * kRowTiles * kKeyTiles;
  Tile* keys = parts.keys + part * kRowTiles * kKeyTiles;
  float p[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKeyTiles; ++t) {
    uint32_t query[4];
    load_left(q + 16 * warp * kRow + 16 * t, kRow, query);
    store_tile(queries + warp * kKeyTiles + t, query);
    uint32_t key[4];
    load_right(k + 16 * warp * kRow + 16 * t, kRow, key);
    store_tile(keys + t * kRowTiles + warp, key);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(p[j], query, right);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
      float4* to = parts.products + (part * kPairTiles + pair_tile(warp, j)) * 64 + lane;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        to[32 * n] = make_float4(p[j][n][0], p[j][n][1], p[j][n][2], p[j][n][3]);
      }
    }
  }
}

template <int kKey>
struct ScanShared {
  struct Stage {
    Tile queries[kRowTiles][kKey / 16];
    Tile keys[kKey / 16][kRowTiles];
    bf16 v[kC * kValuePad];
  };
  Stage stage[kScanStages];
  // Of two chunks: one is read while the next is made.
  Tile pairs[2][kPairTiles];
  float starts[2][kC];  // exp(G)
  float ends[2][kC];    // exp(G_last - G) w
  float decay[2];       // exp(G_last)
  float sums[4][kC];    // G, of each warp that makes pairs
};

template <int kKey>
__global__ void __launch_bounds__(256) scan_kernel(Recurrence<bf16> a, const int32_t* first_chunk,
                                                   RecurrenceKept kept, SharedTiles parts) {
  extern __shared__ float4 shared[];
  using Shared = ScanShared<kKey>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
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
  const int64_t count = first_chunk[segment + 1] - first;
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const int64_t position = a.segments.position[segment];
  const auto part_of = [&](int64_t c) { return (first + c) * a.key_heads + a.key_head(h); };
  const auto token_of = [&](int64_t c) { return begin + chunk_begin(position, c); };
  const auto tokens_of = [&](int64_t c) {
    return static_cast<int>((c + 1 == count ? length : chunk_begin(position, c + 1)) -
                            chunk_begin(position, c));
  };

  // --- Of the warps that work ahead.
  const auto fetch = [&](int64_t c) {
    if (c < count) {
      auto& stage = s.stage[c % kScanStages];
      constexpr int kPieces = kRowTiles * kKeyTiles * 32;
      const Tile* queries = parts.queries + part_of(c) * kRowTiles * kKeyTiles;
      const Tile* keys = parts.keys + part_of(c) * kRowTiles * kKeyTiles;
      for (int x = thread; x < kPieces; x += 128) {
        copy_16(&stage.queries[0][0].lane[0] + x, &queries->lane[0] + x, true);
        copy_16(&stage.keys[0][0].lane[0] + x, &keys->lane[0] + x, true);
      }
      copy_rows<kColumns, 128>(a.v.at(token_of(c), h * a.dim + slice * kColumns),
                               a.v.rows.outer_stride, tokens_of(c), thread, stage.v);
    }
    commit_copies();
  };
  const auto make_pairs = [&](int64_t c) {
    const int64_t token = token_of(c);
    const int tokens = tokens_of(c);
    const float4* products = parts.products + (part_of(c) * kPairTiles + pair_tile(warp, 0)) * 64;
    float4 product[kRowTiles][2];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        product[j][0] = products[j * 64 + lane];
        product[j][1] = products[j * 64 + 32 + lane];
      }
    }
    float own[2];
    sum_decays(a, token, tokens, h, own);
    const float weight[2] = {weight_of(a, token, tokens, 2 * lane, h),
                             weight_of(a, token, tokens, 2 * lane + 1, h)};
    const float last = __shfl_sync(0xffffffffU, own[1], 31);
    float* sums = s.sums[warp];
    __syncwarp();
    sums[2 * lane] = own[0];
    sums[2 * lane + 1] = own[1];
    const int64_t buffer = c % 2;
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s.starts[buffer][2 * lane + i] = expf(own[i]);
        s.ends[buffer][2 * lane + i] = expf(last - own[i]) * weight[i];
      }
      if (lane == 0) {
        s.decay[buffer] = expf(last);
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
          const float4 x = product[j][n];
          const float of[4] = {x.x, x.y, x.z, x.w};
          // Column `column` is of lane column / 2.
          const int column = 16 * j + tile_column(n, 0);
          const float w[2] = {__shfl_sync(0xffffffffU, weight[0], column / 2),
                              __shfl_sync(0xffffffffU, weight[1], column / 2)};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const bool in = column + e % 2 <= 16 * warp + tile_row(e);
            p[n][e] = in ? of[e] * expf(row[e / 2] - sums[column + e % 2]) * w[e % 2] : 0.0F;
          }
        }
        uint32_t tile[4];
        round_left(p, tile);
        store_tile(&s.pairs[buffer][pair_tile(warp, j)], tile);
      }
    }
  };

  // --- Of the warps that scan: S' (16 columns of the value, K).
  float state[kKeyTiles][2][4];
  float* slot = a.state_of(segment, h);
  const int64_t value = slice * kColumns + 16 * warp;
  const auto at = [&](int t, int n, int e) {
    return (16 * t + tile_column(n, e)) * a.dim + value + tile_row(e);
  };
  const auto scan = [&](int64_t c) {
    const auto& stage = s.stage[c % kScanStages];
    const int64_t buffer = c % 2;
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
        load_tile(&stage.queries[i][t], left);
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
        load_tile(&stage.keys[t][j], right);
        multiply_tiles(state[t], left, right);
      }
    }
    const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
    const int tokens = tokens_of(c);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = 16 * i + tile_row(2 * half);
        if (token < tokens) {
          bf16* to = a.y.at(token_of(c) + token, h * a.dim + value + tile_column(0, 0));
          const bf16* v = stage.v + token * kValuePad + 16 * warp + tile_column(0, 0);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float x[2];
            load_n<2>(v + 8 * n, x);
            *reinterpret_cast<uint32_t*>(to + 8 * n) =
                pack(fmaf(skip, x[0], y[i][n][2 * half]), fmaf(skip, x[1], y[i][n][2 * half + 1]));
          }
        }
      }
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
  } else {
    for (int c = 0; c + 1 < kScanStages; ++c) {
      fetch(c);
    }
    make_pairs(0);
  }
  for (int64_t c = 0; c < count; ++c) {
    if (!scans) {
      wait_for_copies<kScanStages - 2>();
    }
    __syncthreads();  // chunk c is there, chunk c - 1 is done with
    if (scans) {
      scan(c);
    } else {
      fetch(c + kScanStages - 1);
      if (c + 1 < count) {
        make_pairs(c + 1);
      }
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
  constexpr int64_t kTiles = kRowTiles * kKey / 16;
  const SharedTiles parts{
      .queries = scratch<Tile>(on, count * kTiles),
      .keys = scratch<Tile>(on, count * kTiles),
      .products = scratch<float4>(on, count * kPairTiles * 64),
  };
  launch(on, "recurrence", pair_kernel<kKey>, static_cast<unsigned>(count), 128, 0, a, chunks.span,
         parts);
  launch(on, "recurrence", scan_kernel<kKey>,
         static_cast<unsigned>(a.segments.count * a.heads * (a.dim / kColumns)), 256,
         sizeof(ScanShared<kKey>), a, chunks.first, kept, parts);
}

}  // namespace

void scan_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const Launch& on) {
  a.key_dim == 64 ? run<64>(a, chunks, kept, on) : run<128>(a, chunks, kept, on);
}

}  // namespace cambium::cuda
