// Private to recurrence_chunks_delta_cuda.cu: those who read. Four warps have a chunk and head, a
// quarter of the columns each.
#pragma once

#include "ops/recurrence/recurrence_chunks_delta_walk.cuh"

namespace cambium::cuda {

template <class Form>
struct ReadShared {
  bf16 q[kC * (Form::kKey + 8)];
  Tile pairs[kPairTiles];
  float starts[kC];
  Tile transitions[Form::kPieces ? kRowTiles : 1][Form::kPieces ? Form::kKeyTiles : 1];  // R, left
};

/// exp(G) q S + P e of 16 kOwn columns, whose tiles begin at `states` and `errors`.
template <class Form, int kOwn>
__device__ __forceinline__ void read_columns(const Tile* states, const Tile* errors,
                                             const ReadShared<Form>& s,
                                             float (&y)[kRowTiles][kOwn][2][4]) {
  constexpr int kRow = Form::kKey + 8;
  constexpr int kKeyTiles = Form::kKeyTiles;
#pragma unroll
  for (int x = 0; x < 8 * kRowTiles * kOwn; ++x) {
    y[x / 8 / kOwn][x / 8 % kOwn][x / 4 % 2][x % 4] = 0.0F;
  }
#pragma unroll
  for (int t = 0; t < kKeyTiles; ++t) {
    uint32_t right[kOwn][4];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      load_tile(states + n * kKeyTiles + t, right[n]);
      left_to_right(right[n]);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t left[4];
      load_left(s.q + 16 * i * kRow + 16 * t, kRow, left);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        multiply_tiles(y[i][n], left, right[n]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const float start[2] = {s.starts[16 * i + tile_row(0)], s.starts[16 * i + tile_row(2)]};
#pragma unroll
    for (int x = 0; x < 8 * kOwn; ++x) {
      y[i][x / 8][x / 4 % 2][x % 4] *= start[x % 4 / 2];
    }
  }
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    uint32_t right[kOwn][4];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      load_tile(errors + n * kRowTiles + j, right[n]);
      left_to_right(right[n]);
    }
#pragma unroll
    for (int i = j; i < kRowTiles; ++i) {
      uint32_t left[4];
      load_tile(&s.pairs[pair_tile(i, j)], left);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        multiply_tiles(y[i][n], left, right[n]);
      }
    }
  }
}

/// y of a part, a chunk and head, if that is of a later piece as asked.
template <class Form>
__device__ __forceinline__ void read(const Recurrence<bf16>& a, const DeltaCall& call,
                                     const DeltaParts& parts, int64_t part, bool later,
                                     ReadShared<Form>& s) {
  constexpr int kKey = Form::kKey;
  constexpr int kKeyTiles = Form::kKeyTiles;
  constexpr int kOwn = Form::kDimTiles / 4;
  const int64_t h = part % a.heads;
  const ChunkSpan span = call.span[part / a.heads];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const HeadPieces<Form> of(a, call, span.segment, h);
  const int64_t chunk = part / a.heads - of.first;
  const int64_t piece = piece_at(of.chunks, of.count, chunk);
  if (later != (piece > 0)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int half = static_cast<int>(threadIdx.x) / 128;
  const int warp = thread / 32;
  copy_rows<kKey, 128>(a.q.at(span.token, a.key_head(h) * kKey), a.q.rows.outer_stride, span.tokens,
                       thread, s.q);
  if constexpr (Form::kPrepares) {
    // By each thread that copies, in place of a barrier. It comes: PreparedChunks::await_next().
    await_more_than(parts.prepared + PrepareItems(a).item(h) * call.count + part / a.heads, 0);
  }
  for (int x = thread; x < kPairTiles * 32; x += 128) {
    copy_16(&s.pairs[x / 32].lane[x % 32], &parts.pairs[part * kPairTiles + x / 32].lane[x % 32],
            true);
  }
  if (thread < kC / 4) {
    copy_16(s.starts + 4 * thread, parts.step[part].gates.starts + 4 * thread, true);
  }
  commit_copies();
  // One warp asks: the numbers lie together.
  if (thread < (piece > 0 ? Form::kAllSlices : Form::kSlices)) {
    await_more_than(parts.walked + of.walk(piece, thread),
                    static_cast<int32_t>(chunk - of.begin(piece)));
  }
  wait_for_copies<0>();
  sync_half(half);
  const Tile* states = parts.states + part * Form::kColumnTiles * kKeyTiles;
  const Tile* errors = parts.errors + part * Form::kColumnTiles * kRowTiles;
  if constexpr (Form::kPieces) {
    if (piece > 0) {
      constexpr int kOwnKeys = kKeyTiles / 4;
      const int column_tile = Form::kDimTiles + warp * kOwnKeys;
      float r[kRowTiles][kOwnKeys][2][4];
      read_columns<Form, kOwnKeys>(states + column_tile * kKeyTiles,
                                   errors + column_tile * kRowTiles, s, r);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int n = 0; n < kOwnKeys; ++n) {
          uint32_t tile[4];
          round_left(r[i][n], tile);
          store_tile(&s.transitions[i][warp * kOwnKeys + n], tile);
        }
      }
    }
  }
  const int value_tile = warp * kOwn;
  float y[kRowTiles][kOwn][2][4];
  read_columns<Form, kOwn>(states + value_tile * kKeyTiles, errors + value_tile * kRowTiles, s, y);
  if constexpr (Form::kPieces) {
    if (piece > 0) {
      if (thread < Form::kSlices) {
        await_more_than(parts.walked + of.walk(0, thread),
                        static_cast<int32_t>(of.chunks_in(0) + piece - 2));
      }
      sync_half(half);  // and R is whole
      const Tile* starts = of.starts(parts, piece) + value_tile * kKeyTiles;
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        uint32_t right[kOwn][4];
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
          load_tile(starts + n * kKeyTiles + t, right[n]);
          left_to_right(right[n]);
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          uint32_t left[4];
          load_tile(&s.transitions[i][t], left);
#pragma unroll
          for (int n = 0; n < kOwn; ++n) {
            multiply_tiles(y[i][n], left, right[n]);
          }
        }
      }
    }
  }
  store_results<kOwn>(a, span.token, span.tokens, h, h * Form::kDim + 16 * value_tile, y);
}

}  // namespace cambium::cuda
