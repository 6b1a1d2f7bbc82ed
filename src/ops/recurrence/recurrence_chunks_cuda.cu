// The recurrence in chunks of 64 tokens on tensor cores: bf16, dims of 64 or 128. In the notation
// of chunk.h, with G the running sum of log decays in the chunk:
//
//   P_ij = q_i . k_j exp(G_i - G_j) w_j, j <= i      A_ij = k_i . k_j exp(G_i - G_j) w_j, j < i
//   e    = (I + A)^-1 (v - exp(G) k S) = U - W S     (delta; else e = v)
//   y    = exp(G) q S + P e
//   S    = exp(G_last) S + k' (exp(G_last - G) w e)
//
// With one decay a head: recurrence_chunks_delta_cuda.cu, and without the delta rule, where nothing
// of a chunk but its state waits for the chunk before, recurrence_chunks_scan_cuda.cu. Here what is
// left, a decay per channel:
//
// 1. prepare_channels_kernel, for all chunks and heads at once: P, U and W, and q and k as tiles.
// 2. state_kernel, over the chunks of a segment in turn: states and e.
// 3. output_kernel, for all chunks and heads at once: y.
//
// The inverse is taken in fp32 within blocks of 16 tokens, in tf32 between them.
// exp(G_i - G_j) is one exponential of a difference that is never positive. A chunk is cut at
// multiples of 64 of absolute position; rows past its tokens are zero, which is exact.
#include "ops/recurrence/recurrence_chunks_delta_cuda.cuh"

namespace cambium::cuda {
namespace {

// A warp has a quarter of the columns of the value for all tokens: it alone reads its part of the
// state and of e.
template <int kKey, int kDim>
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
  const Tile* queries = parts.queries + part * kRowTiles * kKeyTiles;
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
  store_results<kOwn>(a, span.token, span.tokens, h, h * kDim + 16 * value_tile, y);
}

template <int kKey, int kDim>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
         const Launch& on) {
  constexpr int64_t kKeyTiles = kKey / 16;
  constexpr int64_t kDimTiles = kDim / 16;
  const int64_t count = chunks.count * a.heads;
  const ChunkTiles parts{
      .queries = scratch<Tile>(on, count * kRowTiles * kKeyTiles),
      .keys = scratch<Tile>(on, count * kRowTiles * kKeyTiles),
      .pairs = scratch<Tile>(on, count * kRowTiles * kRowTiles),
      .reads = a.delta ? scratch<Tile>(on, count * kRowTiles * kKeyTiles) : nullptr,
      .errors = scratch<Tile>(on, count * kDimTiles * kRowTiles),
      .states = scratch<Tile>(on, count * kDimTiles * kKeyTiles),
      .ends = scratch<float>(on, count * (kEnds + kKey)),
  };
  prepare_channels(a, chunks, parts, on);
  pass_states(a, chunks, kept, parts, on);
  launch(on, "recurrence", output_kernel<kKey, kDim>, static_cast<unsigned>(count), 128, 0, a,
         chunks.span, parts);
}

bool rows_aligned(const View<bf16>& x) {
  return aligned(x.data, 16) && x.rows.outer_stride % 8 == 0;
}

}  // namespace

bool recurrence_has_chunks(const Recurrence<bf16>& a) {
  const auto fits = [](int64_t dim) { return dim == 64 || dim == 128; };
  const bool scans = !a.delta && !a.decay_per_channel;
  return (scans ? scan_has_chunks(a) : fits(a.key_dim) && fits(a.dim)) && rows_aligned(a.q) &&
         rows_aligned(a.k) && rows_aligned(a.v) && rows_aligned(a.y) &&
         most_shared() >= kForwardShared;
}

void recurrence_chunks(const Recurrence<bf16>& a, const DeviceSegments& segments,
                       const DeviceChunks& chunks, const Launch& on) {
  Recurrence<bf16> device = a;
  device.segments = segments.walk;
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  if (!a.decay_per_channel) {
    a.delta ? delta_chunks(device, a.segments, chunks, kept, on)
            : scan_chunks(device, chunks, kept, on);
  } else if (a.key_dim == 64) {
    a.dim == 64 ? run<64, 64>(device, chunks, kept, on) : run<64, 128>(device, chunks, kept, on);
  } else {
    a.dim == 64 ? run<128, 64>(device, chunks, kept, on) : run<128, 128>(device, chunks, kept, on);
  }
}

}  // namespace cambium::cuda
