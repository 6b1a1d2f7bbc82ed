// Private to the delta rule's chunks on CUDA: what is made of a chunk before it is walked, by 128
// threads.
#pragma once

#include "ops/recurrence/recurrence_chunks_delta_walk.cuh"

namespace cambium::cuda {

/// For up to kHeads heads that share keys.
template <int kKey, int kHeads>
struct PrepareShared {
  union {
    struct {
      bf16 q[kC * (kKey + 8)];
      DeltaKeys<kKey> k;
    } rows;
    float x[kHeads][kC * kInversePad];  // A, when rows are used up
  };
  float sums[kHeads][kC];  // G in units of log 2
  float weight[kHeads][kC];
};

/// P, T - I, what becomes of the decays, and keys where they are wanted, of a chunk and `heads`
/// heads from `first_head` on, by a half of a block. When it returns, its warps may still be at
/// work, and shared memory in use.
template <int kKey, int kHeads>
__device__ __forceinline__ void prepare(const Recurrence<bf16>& a, const ChunkSpan& span,
                                        int64_t chunk, int64_t first_head, int heads,
                                        const DeltaParts& parts, int half,
                                        PrepareShared<kKey, kHeads>& s) {
  constexpr int kRow = kKey + 8;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int warp = thread / 32;
  const bf16* q = s.rows.q;
  const bf16* k = s.rows.k.row;
  const int64_t key_head = a.key_head(first_head);
  copy_rows<kKey, 128>(a.q.at(span.token, key_head * kKey), a.q.rows.outer_stride, span.tokens,
                       thread, s.rows.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_head * kKey), a.k.rows.outer_stride, span.tokens,
                       thread, s.rows.k.row);
  commit_copies();
  static_assert(kHeads <= 2);
  if (warp < heads) {
    const int row = 2 * (thread % 32);
    const int64_t h = first_head + warp;
    float sums[2] = {log_decay_of(a, span.token, span.tokens, row, h),
                     log_decay_of(a, span.token, span.tokens, row + 1, h)};
    sum_decays(sums);
    s.sums[warp][row] = sums[0] * kLog2E;
    s.sums[warp][row + 1] = sums[1] * kLog2E;
  } else if (warp >= 2) {
    const int row = thread - kC;
    for (int i = 0; i < heads; ++i) {
      s.weight[i][row] = weight_of(a, span.token, span.tokens, row, first_head + i);
    }
  }
  wait_for_copies<0>();
  sync_half(half);
  if (parts.keys != nullptr && first_head % (a.heads / a.key_heads) == 0) {
    auto* keys = static_cast<DeltaKeys<kKey>*>(parts.keys) + chunk * a.key_heads + key_head;
    constexpr int kPieces = sizeof(*keys) / 16;
    for (int x = thread; x < kPieces; x += 128) {
      reinterpret_cast<uint4*>(keys)[x] = reinterpret_cast<const uint4*>(&s.rows.k)[x];
    }
  }
  float p[kRowTiles][2][4] = {};
  float r[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t query[4];
    uint32_t key[4];
    load_left(q + 16 * warp * kRow + 16 * t, kRow, query);
    load_left(k + 16 * warp * kRow + 16 * t, kRow, key);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(p[j], query, right);
        multiply_tiles(r[j], key, right);
      }
    }
  }
  sync_half(half);  // rows are used up
#pragma unroll 1
  for (int i = 0; i < heads; ++i) {
    const int64_t part = chunk * a.heads + first_head + i;
    const float* sums = s.sums[i];
    const float* weight = s.weight[i];
    float* x = s.x[i];
    const float last = sums[kC - 1];
    DeltaGates& gates = parts.step[part].gates;
    if (thread < kC) {
      gates.ends[thread] = fast_exp2(last - sums[thread]) * weight[thread];
    } else {
      gates.starts[thread - kC] = fast_exp2(sums[thread - kC]);
    }
    if (thread == 0) {
      gates.decay = fast_exp2(last);
    }
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        float of[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = 16 * warp + tile_row(e);
            const int column = 16 * j + tile_column(n, e);
            const float decay =
                column <= row ? fast_exp2(sums[row] - sums[column]) * weight[column] : 0.0F;
            of[n][e] = p[j][n][e] * decay;
            x[row * kInversePad + column] = column < row ? decay * r[j][n][e] : 0.0F;
          }
        }
        uint32_t tile[4];
        round_left(of, tile);
        store_tile(parts.pairs + part * kPairTiles + pair_tile(warp, j), tile);
      }
    }
    float t[kRowTiles][2][4];
    invert_tiles(x, t, half);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            t[j][n][e] = j == warp && tile_row(e) == tile_column(n, e) ? 0.0F : t[j][n][e];
          }
        }
        uint32_t tile[4];
        round_right(t[j], tile);
        store_tile(parts.step[part].inverse + pair_tile(warp, j), tile);
      }
    }
  }
}

/// Of walk_kernel: a worker's part of the items of all chunks, the first chunks first, half a block
/// each.
template <int kKey>
__device__ __forceinline__ void prepare_items(const Recurrence<bf16>& a, const DeltaCall& call,
                                              const DeltaParts& parts, int worker,
                                              PrepareShared<kKey, kItemHeads>* s) {
  const int half = static_cast<int>(threadIdx.x) / 128;
  const PrepareItems items(a);
  const int64_t count = call.count * items.of_chunk;
  for (int64_t i = 2 * worker + half; i < count; i += 2 * call.workers) {
    const int64_t chunk = i / items.of_chunk;
    const int64_t item = i % items.of_chunk;
    const ChunkSpan span = call.span[chunk];
    if (!in_chunks(a.segments, span.segment)) {
      continue;
    }
    prepare(a, span, chunk, items.first_head(item), items.heads(item), parts, half, s[half]);
    sync_half(half);  // all is written, and shared memory free
    if (threadIdx.x % 128 == 0) {
      publish(parts.prepared + item * call.count + chunk, 1);
    }
  }
}

}  // namespace cambium::cuda
