// The recurrence in chunks of 64 tokens on tensor cores: bf16, dims of 64 or 128. In the notation
// of chunk.h, with G the running sum of log decays in the chunk:
//
//   P_ij = q_i . k_j exp(G_i - G_j) w_j, j <= i      A_ij = k_i . k_j exp(G_i - G_j) w_j, j < i
//   e    = (I + A)^-1 (v - exp(G) k S) = U - W S     (delta; else e = v)
//   y    = exp(G) q S + P e
//   S    = exp(G_last) S + k' (exp(G_last - G) w e)
//
// 1. prepare_kernel, for all chunks and heads at once: P, U and W, and q and k as tiles. The
// inverse
//    is taken in fp32 within blocks of 16 tokens, in tf32 between them.
//    (prepare_channels_kernel where every channel has its decay.)
// 2. state_kernel, over the chunks of a segment in turn: states and e.
// 3. output_kernel, for all chunks and heads at once: y.
//
// One decay a head without the delta rule needs no e and goes through one kernel instead
// (recurrence_chunks_scan_cuda.cu).
//
// exp(G_i - G_j) is one exponential of a difference that is never positive. A chunk is cut at
// multiples of 64 of absolute position; rows past its tokens are zero, which is exact.
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

template <int kKey, int kDim>
struct PrepareShared {
  union {
    bf16 q[kC * (kKey + 8)];
    float x[kC * kInversePad];  // A, when q is used up
  };
  bf16 k[kC * (kKey + 8)];
  bf16 v[kC * (kDim + 8)];
  float sums[kC];
  float starts[kC];  // exp(G)
  float weight[kC];
};

template <int kKey, int kDim>
__global__ void __launch_bounds__(128, 4)
    prepare_kernel(Recurrence<bf16> a, const ChunkSpan* spans, ChunkTiles parts) {
  extern __shared__ float4 shared[];
  using Shared = PrepareShared<kKey, kDim>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kRow = kKey + 8;
  constexpr int kKeyTiles = kKey / 16;
  const int64_t chunk = last_first(a.heads);
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t key_head = a.key_head(h);
  copy_rows<kKey, 128>(a.q.at(span.token, key_head * kKey), a.q.rows.outer_stride, span.tokens,
                       thread, s.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_head * kKey), a.k.rows.outer_stride, span.tokens,
                       thread, s.k);
  commit_copies();
  copy_rows<kDim, 128>(a.v.at(span.token, h * kDim), a.v.rows.outer_stride, span.tokens, thread,
                       s.v);
  commit_copies();
  if (thread < 32) {
    float sums[2];
    sum_decays(a, span.token, span.tokens, h, sums);
    s.sums[2 * thread] = sums[0];
    s.sums[2 * thread + 1] = sums[1];
  } else if (thread >= kC) {
    s.weight[thread - kC] = weight_of(a, span.token, span.tokens, thread - kC, h);
  }
  wait_for_copies<1>();
  __syncthreads();
  const int warp = thread / 32;
  const int64_t part = chunk * a.heads + h;
  const float last = s.sums[kC - 1];
  float* ends = parts.ends + part * (kEnds + kKey);
  if (thread < kC) {
    ends[thread] = expf(last - s.sums[thread]) * s.weight[thread];
  } else {
    const float start = expf(s.sums[thread - kC]);
    s.starts[thread - kC] = start;
    ends[kStarts + thread - kC] = start;
  }
  if (thread == 0) {
    ends[kEnds] = expf(last);
  }
  // The first value head of a key head leaves its tiles.
  const bool first = h % (a.heads / a.key_heads) == 0;
  Tile* queries = parts.queries + (chunk * a.key_heads + key_head) * kRowTiles * kKeyTiles;
  Tile* keys = parts.keys + (chunk * a.key_heads + key_head) * kRowTiles * kKeyTiles;
  float p[kRowTiles][2][4] = {};
  float r[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKeyTiles; ++t) {
    uint32_t query[4];
    uint32_t key[4];
    load_left(s.q + 16 * warp * kRow + 16 * t, kRow, query);
    load_left(s.k + 16 * warp * kRow + 16 * t, kRow, key);
    if (first) {
      store_tile(queries + warp * kKeyTiles + t, query);
      uint32_t tile[4] = {key[0], key[1], key[2], key[3]};
      transpose_to_right(tile);
      store_tile(keys + t * kRowTiles + warp, tile);
    }
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(s.k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(p[j], query, right);
        multiply_tiles(r[j], key, right);
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
          const float decay =
              column <= i ? expf(s.sums[i] - s.sums[column]) * s.weight[column] : 0.0F;
          p[j][n][e] *= decay;
          s.x[i * kInversePad + column] = column < i ? decay * r[j][n][e] : 0.0F;
        }
      }
      uint32_t tile[4];
      round_left(p[j], tile);
      store_tile(parts.pairs + (part * kRowTiles + warp) * kRowTiles + j, tile);
    }
  }
  solve_tiles<kKey, kDim>(s.x, s.starts, s.k, s.v, parts.reads + part * kRowTiles * kKeyTiles,
                          parts.errors + part * (kDim / 16) * kRowTiles);
}

// A warp has a quarter of the columns of the value for all tokens: it alone reads its part of the
// state and of e.
template <int kKey, int kDim, bool kPerChannel>
__global__ void __launch_bounds__(128, 3)
    output_kernel(Recurrence<bf16> a, const ChunkSpan* spans, ChunkTiles parts) {
  constexpr int kKeyTiles = kKey / 16;
  constexpr int kDimTiles = kDim / 16;
  constexpr int kOwn = kDimTiles / 4;
  const int64_t chunk = last_first(a.heads);
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int value_tile = static_cast<int>(threadIdx.x) / 32 * kOwn;
  const int64_t part = chunk * a.heads + h;
  const Tile* queries = parts.queries + (kPerChannel ? part : chunk * a.key_heads + a.key_head(h)) *
                                            kRowTiles * kKeyTiles;
  const Tile* states = parts.states + (part * kDimTiles + value_tile) * kKeyTiles;
  const Tile* errors = parts.errors + (part * kDimTiles + value_tile) * kRowTiles;
  const Tile* pairs = parts.pairs + part * kRowTiles * kRowTiles;
  float y[kRowTiles][kOwn][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKeyTiles; ++t) {
    uint32_t right[kOwn][4];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      load_tile(states + n * kKeyTiles + t, right[n]);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t left[4];
      load_tile(queries + i * kKeyTiles + t, left);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        multiply_tiles(y[i][n], left, right[n]);
      }
    }
  }
  if constexpr (!kPerChannel) {
    const float* starts = parts.ends + part * (kEnds + kKey) + kStarts;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const float start[2] = {starts[16 * i + tile_row(0)], starts[16 * i + tile_row(2)]};
#pragma unroll
      for (int x = 0; x < 8 * kOwn; ++x) {
        y[i][x / 8][x / 4 % 2][x % 4] *= start[x % 4 / 2];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    uint32_t right[kOwn][4];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      load_tile(errors + n * kRowTiles + j, right[n]);
    }
#pragma unroll
    for (int i = j; i < kRowTiles; ++i) {
      uint32_t left[4];
      load_tile(pairs + i * kRowTiles + j, left);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        multiply_tiles(y[i][n], left, right[n]);
      }
    }
  }
  const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
  const int64_t at = h * kDim + 16 * value_tile + tile_column(0, 0);
  bf16* to = a.y.at(span.token + tile_row(0), at);
  const bf16* v = a.v.at(span.token + tile_row(0), at);
#pragma unroll
  for (int x = 0; x < 2 * kRowTiles; ++x) {  // 8 rows at a time
    if (8 * x + tile_row(0) < span.tokens) {
#pragma unroll
      for (int n = 0; n < 2 * kOwn; ++n) {
        float out[2] = {y[x / 2][n / 2][n % 2][x % 2 * 2], y[x / 2][n / 2][n % 2][x % 2 * 2 + 1]};
        if (a.skip.defined()) {
          out[0] = fmaf(skip, load(v + 8 * n), out[0]);
          out[1] = fmaf(skip, load(v + 8 * n + 1), out[1]);
        }
        *reinterpret_cast<uint32_t*>(to + 8 * n) = pack(out[0], out[1]);
      }
    }
    to += 8 * a.y.rows.outer_stride;
    v += 8 * a.v.rows.outer_stride;
  }
}

template <int kKey, int kDim>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
         const Launch& on) {
  constexpr int64_t kKeyTiles = kKey / 16;
  constexpr int64_t kDimTiles = kDim / 16;
  const int64_t count = chunks.count * a.heads;
  const int64_t key_count = a.decay_per_channel ? count : chunks.count * a.key_heads;
  const ChunkTiles parts{
      .queries = scratch<Tile>(on, key_count * kRowTiles * kKeyTiles),
      .keys = scratch<Tile>(on, key_count * kRowTiles * kKeyTiles),
      .pairs = scratch<Tile>(on, count * kRowTiles * kRowTiles),
      .reads = a.delta ? scratch<Tile>(on, count * kRowTiles * kKeyTiles) : nullptr,
      .errors = scratch<Tile>(on, count * kDimTiles * kRowTiles),
      .states = scratch<Tile>(on, count * kDimTiles * kKeyTiles),
      .ends = scratch<float>(on, count * (kEnds + kKey)),
  };
  const auto blocks = static_cast<unsigned>(count);
  if (a.decay_per_channel) {
    prepare_channels(a, chunks, parts, on);
  } else {
    launch(on, "recurrence", prepare_kernel<kKey, kDim>, blocks, 128,
           sizeof(PrepareShared<kKey, kDim>), a, chunks.span, parts);
  }
  pass_states(a, chunks, kept, parts, on);
  launch(on, "recurrence",
         a.decay_per_channel ? output_kernel<kKey, kDim, true> : output_kernel<kKey, kDim, false>,
         blocks, 128, 0, a, chunks.span, parts);
}

bool rows_aligned(const View<bf16>& x) {
  return aligned(x.data, 16) && x.rows.outer_stride % 8 == 0;
}

}  // namespace

bool recurrence_has_chunks(const Recurrence<bf16>& a) {
  const auto fits = [](int64_t dim) { return dim == 64 || dim == 128; };
  return fits(a.key_dim) && fits(a.dim) && rows_aligned(a.q) && rows_aligned(a.k) &&
         rows_aligned(a.v) && rows_aligned(a.y);
}

void recurrence_chunks(const Recurrence<bf16>& a, const DeviceSegments& segments,
                       const DeviceChunks& chunks, const Launch& on) {
  Recurrence<bf16> device = a;
  device.segments = segments.walk;
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  if (!a.delta && !a.decay_per_channel) {
    scan_chunks(device, chunks, kept, on);
  } else if (a.key_dim == 64) {
    a.dim == 64 ? run<64, 64>(device, chunks, kept, on) : run<64, 128>(device, chunks, kept, on);
  } else {
    a.dim == 64 ? run<128, 64>(device, chunks, kept, on) : run<128, 128>(device, chunks, kept, on);
  }
}

}  // namespace cambium::cuda
