// Chunks with one decay a head and without the delta rule (Mamba-2, Lightning): what a token writes
// is w v, so that nothing of a chunk waits for the chunk before but its state. In the notation of
// recurrence_chunks_cuda.cu, with S transposed (V, K):
//
//   y = exp(G) q S + P v          S' = S' exp(G_last) + (v' f) k',  f = exp(G_last - G) w
//
// 1. product_kernel, for all chunks and key heads at once: q k', which the value heads of a key
//    head share, and what their gates come to: of a head's tokens these lie far apart in memory.
// 2. scan_kernel, a block for each segment, head and 64 columns of the value (80 where that is all
//    of them: with 64 and 16 each chunk would be walked twice), over the chunks in
//    turn: states never leave registers, so of the large the device's memory sees v and y alone.
//    Warps have 16 columns each, of the state and of y, and where they are four and the device can
//    (sm_90a) multiply as a warpgroup, which reads q, k and P of shared memory once for all four,
//    y' then being a product from the left like the state; four more work ahead: they fetch into
//    shared memory all that a chunk takes, and make the pairs P of q k' and the decays. No warp
//    waits for memory of the device but by a barrier, two chunks after it was asked for.
//
// More keys than registers hold a state of are taken in two passes: S q and P are sums over keys,
// and what the halves of S become does not depend on each other. The first leaves its y in fp32.
#include <algorithm>

#include "ops/cuda_warpgroup.cuh"
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kColumns = 64;    // of the value, a block's, unless it has more warps
constexpr int kScanStages = 3;  // of q, k and v; products and gates have one less
constexpr int kMostKeys = 128;  // of a pass

// What a block of more than four scanning warps may take of shared memory: that of sm_90.
constexpr size_t kWideShared = 227 * 1024;

// Which of the keys' passes a kernel is.
enum class Pass { kOnly, kFirst, kLast };

// Of a chunk and head.
struct ScanGates {
  float sums[kC];  // G in units of log 2
  float weights[kC];
};
constexpr int kGateHeads = 16;  // of a block

/// The gates of heads [h, end) of a chunk, kGateHeads at most, by 4 warps.
__device__ __forceinline__ void sum_gates(const Recurrence<bf16>& a, const ChunkSpan& span,
                                          int64_t h, int64_t end, ScanGates* gates) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kOwn = kGateHeads / 4;
  float sums[kOwn][2];
  float weights[kOwn][2];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t own = h + warp * kOwn + i;
    const int64_t head = own < end ? own : end - 1;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      sums[i][x] = log_decay_of(a, span.token, span.tokens, 2 * lane + x, head);
      weights[i][x] = weight_of(a, span.token, span.tokens, 2 * lane + x, head);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    sum_decays(sums[i]);
    const int64_t own = h + warp * kOwn + i;
    if (own < end) {
      const float of[2] = {sums[i][0] * kLog2E, sums[i][1] * kLog2E};
      store_n<2>(gates[own].sums + 2 * lane, of);
      store_n<2>(gates[own].weights + 2 * lane, weights[i]);
    }
  }
}

// products (chunks, key heads, kPairTiles, 2, 32 lanes): accumulators, of the keys from first_key
// on; gates (chunks, heads). For every chunk and key head a block, and more where one has no more
// than the gates of some heads.
template <int kKey>
__global__ void __launch_bounds__(128)
    product_kernel(Recurrence<bf16> a, const ChunkSpan* spans, int64_t first_key, float4* products,
                   ScanGates* gates) {
  await_inputs();
  constexpr int kRow = kKey + 8;
  __shared__ __align__(16) bf16 q[kC * kRow];
  __shared__ __align__(16) bf16 k[kC * kRow];
  const int64_t group = a.heads / a.key_heads;
  const int64_t parts = (group + kGateHeads - 1) / kGateHeads;
  const int64_t part = blockIdx.x % parts;
  const int64_t index = blockIdx.x / parts;
  const int64_t chunk = index / a.key_heads;
  const int64_t key_head = index % a.key_heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (part == 0) {
    const int64_t key = key_head * a.key_dim + first_key;
    copy_rows<kKey, 128>(a.q.at(span.token, key), a.q.rows.outer_stride, span.tokens, thread, q);
    copy_rows<kKey, 128>(a.k.at(span.token, key), a.k.rows.outer_stride, span.tokens, thread, k);
    commit_copies();
  }
  const int64_t first_head = key_head * group + part * kGateHeads;
  const int64_t end_head = (key_head + 1) * group;
  sum_gates(a, span, first_head, end_head, gates + chunk * a.heads);
  if (part != 0) {
    return;
  }
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
  float4* to = products + (index * kPairTiles + pair_tile(warp, 0)) * 64 + thread % 32;
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

// --- Products of a warpgroup: the left operand in registers, the right one in tiles of 64 rows.
constexpr int kSwizzledRow = 64;              // elements
constexpr int kSwizzled = kC * kSwizzledRow;  // of 64 rows

/// As copy_rows, to kDim / 64 parts of kSwizzled elements.
template <int kDim>
__device__ __forceinline__ void copy_swizzled(const bf16* from, int64_t from_stride, int rows,
                                              int thread, bf16* to) {
  constexpr int kPieces = kDim / 8;
  constexpr int kStep = 128 / kPieces;
  static_assert(kStep % 8 == 0);
  const int first = thread / kPieces;
  const int piece = thread % kPieces;
  const bf16* row = from + first * from_stride + piece * 8;
  to += piece / 8 * kSwizzled + first * kSwizzledRow + ((piece % 8) ^ (first % 8)) * 8;
#pragma unroll
  for (int i = 0; i < kC; i += kStep) {
    const bool valid = first + i < rows;
    copy_16(to + i * kSwizzledRow, valid ? row : from, valid);
    row += kStep * from_stride;
  }
}

template <int kKey, int kWarps, bool kWarpgroup>
struct ScanShared {
  static constexpr int kRow = kKey + 8;
  static constexpr int kKeys = kWarpgroup ? kC * kKey : kC * kRow;
  struct alignas(kWarpgroup ? 1024 : 16) Stage {
    bf16 q[kKeys];
    bf16 k[kKeys];
    bf16 v[kC * (16 * kWarps + 8)];
  };
  Stage stage[kScanStages];
  // Of two chunks: one is read while the next is made.
  bf16 square[kWarpgroup ? 2 : 1][kWarpgroup ? kSwizzled : 8];  // P, zero above the diagonal
  Tile pairs[kWarpgroup ? 1 : 2][kWarpgroup ? 1 : kPairTiles];  // or its tiles
  // Of two chunks: pairs are made of one while the next is fetched.
  float4 products[2][kPairTiles * 64];
  ScanGates gates[2];
  float starts[2][kC];  // exp(G)
  float ends[2][kC];    // exp(G_last - G) w
  float decay[2];       // exp(G_last)
};
template <int kKey, int kWarps>
constexpr size_t kScanBytes = std::max(sizeof(ScanShared<kKey, kWarps, false>),
                                       sizeof(ScanShared<kKey, kWarps, true>));

// sums, of two passes: y of a block's chunks, (chunks, heads, slices, 32, 128 threads).
template <int kKey, Pass kPass, int kWarps>
__global__ void __launch_bounds__(32 * kWarps + 128, 1)
    scan_kernel(Recurrence<bf16> a, const int32_t* first_chunk, RecurrenceKept kept,
                const float4* products, const ScanGates* gates, float* sums) {
  await_inputs();
  extern __shared__ __align__(1024) float4 shared[];
  constexpr bool kWarpgroup = kWarpgroups && kWarps == 4;
  constexpr int kColumns = 16 * kWarps;
  constexpr int kValuePad = kColumns + 8;
  constexpr int kScanning = 32 * kWarps;  // threads
  using Shared = ScanShared<kKey, kWarps, kWarpgroup>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kKeyTiles = kKey / 16;
  constexpr int64_t kFirstKey = kPass == Pass::kLast ? kKey : 0;
  const int64_t slices = (a.dim + kColumns - 1) / kColumns;
  const int64_t slice = blockIdx.x % slices;
  const int64_t h = blockIdx.x / slices % a.heads;
  const int64_t segment = blockIdx.x / slices / a.heads;
  if (!in_chunks(a.segments, segment)) {
    return;
  }
  // The same for a warp, and known to be: products of a warpgroup are not to diverge.
  const bool scans = __shfl_sync(kWholeWarp, threadIdx.x, 0) < kScanning;
  const int thread = static_cast<int>(threadIdx.x) - (scans ? 0 : kScanning);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int64_t first = first_chunk[segment];
  const auto count = static_cast<int>(first_chunk[segment + 1] - first);
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const int64_t position = a.segments.position[segment];
  const int64_t key_head = a.key_head(h);
  const int64_t value = slice * kColumns + 16 * warp;  // a scanning warp's first column
  const bool has_columns = value < a.dim;
  const auto columns = static_cast<int>(a.dim - slice * kColumns);  // that there are of the block's
  const auto token_of = [&](int c) { return begin + chunk_begin(position, c); };
  const auto tokens_of = [&](int c) {
    const int64_t end = c + 1 == count ? length : chunk_begin(position, c + 1);
    return static_cast<int>(end - chunk_begin(position, c));
  };

  // --- Of the warps that work ahead.
  const auto fetch_products = [&](int c) {
    if (c < count) {
      const float4* from =
          products + ((first + c) * a.key_heads + key_head) * kPairTiles * 64 + thread;
      float4* to = s.products[c % 2] + thread;
#pragma unroll
      for (int x = 0; x < kPairTiles * 64; x += 128) {
        copy_16(to + x, from + x, true);
      }
      if (thread < 32) {
        copy_16(reinterpret_cast<float4*>(&s.gates[c % 2]) + thread,
                reinterpret_cast<const float4*>(&gates[(first + c) * a.heads + h]) + thread, true);
      }
    }
    commit_copies();
  };
  const auto fetch = [&](int c) {
    if (c < count) {
      auto& stage = s.stage[c % kScanStages];
      const int64_t token = token_of(c);
      const int tokens = tokens_of(c);
      const bf16* q = a.q.at(token, key_head * a.key_dim + kFirstKey);
      const bf16* k = a.k.at(token, key_head * a.key_dim + kFirstKey);
      if constexpr (kWarpgroup) {
        copy_swizzled<kKey>(q, a.q.rows.outer_stride, tokens, thread, stage.q);
        copy_swizzled<kKey>(k, a.k.rows.outer_stride, tokens, thread, stage.k);
      } else {
        copy_rows<kKey, 128>(q, a.q.rows.outer_stride, tokens, thread, stage.q);
        copy_rows<kKey, 128>(k, a.k.rows.outer_stride, tokens, thread, stage.k);
      }
      const bf16* v = a.v.at(token, h * a.dim + slice * kColumns);
      if constexpr (kColumns == 64) {
        copy_rows<kColumns, 128>(v, a.v.rows.outer_stride, tokens, thread, stage.v, columns);
      } else {
        constexpr int kPieces = kColumns / 8;
#pragma unroll
        for (int x = thread; x < kC * kPieces; x += 128) {
          const int row = x / kPieces;
          const int column = x % kPieces * 8;
          const bool valid = row < tokens && column < columns;
          copy_16(stage.v + row * kValuePad + column,
                  valid ? v + row * a.v.rows.outer_stride + column : v, valid);
        }
      }
    }
    commit_copies();
  };
  const auto make_pairs = [&](int c) {
    const int buffer = c % 2;
    const ScanGates& of = s.gates[buffer];
    const float last = of.sums[kC - 1];
    if (thread < kC) {
      s.starts[buffer][thread] = fast_exp2(of.sums[thread]);
    } else {
      const int token = thread - kC;
      s.ends[buffer][token] = fast_exp2(last - of.sums[token]) * of.weights[token];
    }
    if (thread == 0) {
      s.decay[buffer] = fast_exp2(last);
    }
#pragma unroll
    for (int first_tile = 0; first_tile < kPairTiles; first_tile += 4) {
      const int tile = first_tile + warp;
      if (tile < kPairTiles) {
        const int i = tile < 1 ? 0 : tile < 3 ? 1 : tile < 6 ? 2 : 3;
        const int j = tile - pair_tile(i, 0);
        const float row[2] = {of.sums[16 * i + tile_row(0)], of.sums[16 * i + tile_row(2)]};
        float p[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float4 product = s.products[buffer][64 * tile + 32 * n + lane];
          const float x[4] = {product.x, product.y, product.z, product.w};
          const int column = 16 * j + tile_column(n, 0);
          float sum[2];
          float weight[2];
          load_n<2>(of.sums + column, sum);
          load_n<2>(of.weights + column, weight);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float pair = x[e] * fast_exp2(row[e / 2] - sum[e % 2]) * weight[e % 2];
            p[n][e] = column + e % 2 <= 16 * i + tile_row(e) ? pair : 0.0F;
          }
        }
        if constexpr (kWarpgroup) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
              const int of_row = 16 * i + tile_row(e);
              bf16* to = s.square[buffer] + of_row * kSwizzledRow +
                         ((2 * j + n) ^ (of_row % 8)) * 8 + tile_column(0, 0);
              *reinterpret_cast<uint32_t*>(to) = pack(p[n][e], p[n][e + 1]);
            }
          }
        } else {
          uint32_t rounded[4];
          round_left(p, rounded);
          store_tile(&s.pairs[buffer][tile], rounded);
        }
      }
    }
  };

  // --- Of the warps that scan: S' (16 columns of the value, K).
  float state[kKeyTiles][2][4];
  float* slot = a.state_of(segment, h);
  const float skip = kPass != Pass::kFirst && a.skip.defined() ? a.skip.data[h] : 0.0F;
  const auto at = [&](int t, int n, int e) {
    return (kFirstKey + 16 * t + tile_column(n, e)) * a.dim + value + tile_row(e);
  };
  const auto scan = [&](int c) {
    const auto& stage = s.stage[c % kScanStages];
    const int buffer = c % 2;
    float* sums_at =
        sums + (((first + c) * a.heads + h) * slices + slice) * (kC * kColumns) + thread;
    float sum[kPass == Pass::kLast ? kRowTiles : 1][2][4];
    if constexpr (kPass == Pass::kLast) {
#pragma unroll
      for (int x = 0; x < 8 * kRowTiles; ++x) {
        sum[x / 8][x / 4 % 2][x % 4] = sums_at[x * kScanning];
      }
    }
    if (kept.states != nullptr && has_columns) {
      float* to = kept.states + ((first + c) * a.heads + h) * a.key_dim * a.dim;
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          to[at(t, x / 4, x % 4)] = state[t][x / 4][x % 4];
        }
      }
    }
    float y[kRowTiles][2][4];
    // The passes' sums, once y is there.
    const auto exchange = [&] {
      if constexpr (kPass != Pass::kOnly) {
#pragma unroll
        for (int x = 0; x < 8 * kRowTiles; ++x) {
          if constexpr (kPass == Pass::kFirst) {
            sums_at[x * kScanning] = y[x / 8][x / 4 % 2][x % 4];
          } else {
            y[x / 8][x / 4 % 2][x % 4] += sum[x / 8][x / 4 % 2][x % 4];
          }
        }
      }
    };
    uint32_t parts[kRowTiles][4];     // of y, the lane's pairs by row, then by columns
    if constexpr (kWarpgroup) {       // y' (value, tokens)
      uint32_t states[kKeyTiles][4];  // (value, key)
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        round_left(state[t], states[t]);
      }
      uint32_t values[kRowTiles][4];     // (value, tokens)
      uint32_t written[kRowTiles][4];    // the same times what is left of it at the end
      float read[kRowTiles][2][4] = {};  // (value, tokens): of the state
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        load_right(stage.v + 16 * j * kValuePad + 16 * warp, kValuePad, values[j]);
        float v[2][4];
        widen_right(values[j], v);
        left_to_right(values[j]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float end[2];
          load_n<2>(&s.ends[buffer][16 * j + tile_column(n, 0)], end);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            y[j][n][e] = skip * v[n][e];
            v[n][e] *= end[e % 2];
          }
        }
        round_left(v, written[j]);
      }
      const float decay = s.decay[buffer];
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        scale_tile(state[t], decay);
      }
      pin(state);
      pin(read);
      pin(y);
      begin_products();
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        multiply_async<false>(read, states[t],
                              describe_tile(stage.q + t / 4 * kSwizzled + t % 4 * 16));
      }
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        multiply_async<false>(y, values[j], describe_tile(s.square[buffer] + 16 * j));
      }
      commit_products();
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int part = 0; part < kKey / 64; ++part) {
          multiply_async<true>(state + 4 * part, written[j],
                               describe_tile(stage.k + part * kSwizzled + 16 * j * kSwizzledRow));
        }
      }
      commit_products();
      wait_for_products<1>();
      pin(read);
      pin(y);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float start[2];
          load_n<2>(&s.starts[buffer][16 * i + tile_column(n, 0)], start);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            y[i][n][e] = fmaf(start[e % 2], read[i][n][e], y[i][n][e]);
          }
        }
      }
      exchange();
      if constexpr (kPass != Pass::kFirst) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float* of = &y[i][x / 2][x % 2 * 2];
            parts[i][x] = transpose_matrix(pack(of[0], of[1]));
          }
        }
      }
    } else {
#pragma unroll
      for (int x = 0; x < 8 * kRowTiles; ++x) {
        y[x / 8][x / 4 % 2][x % 4] = 0.0F;
      }
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        uint32_t right[4];
        round_right(state[t], right);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          uint32_t left[4];
          load_left(stage.q + 16 * i * Shared::kRow + 16 * t, Shared::kRow, left);
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
        scale_tile(state[t], decay);
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
          load_right(stage.k + 16 * j * Shared::kRow + 16 * t, Shared::kRow, right);
          multiply_tiles(state[t], left, right);
        }
      }
      exchange();
      const bf16* v = stage.v + tile_row(0) * kValuePad + 16 * warp + tile_column(0, 0);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float* of = &y[i][x % 2][x / 2 * 2];
          float of_v[2];
          load_n<2>(v + (16 * i + x / 2 * 8) * kValuePad + x % 2 * 8, of_v);
          parts[i][x] = pack(fmaf(skip, of_v[0], of[0]), fmaf(skip, of_v[1], of[1]));
        }
      }
    }
    // Of the quads of lanes that have rows r and r + 8 of y in parts, each lane stores 16 bytes.
    if constexpr (kPass != Pass::kFirst) {
      const int tokens = has_columns ? tokens_of(c) : 0;
      const int row = tile_row(0) + lane % 4 / 2 * 8;
      bf16* to = a.y.at(token_of(c) + row, h * a.dim + value + lane % 2 * 8);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        transpose_quad(parts[i]);
        if (16 * i + row < tokens) {
          *reinterpret_cast<uint4*>(to) =
              make_uint4(parts[i][0], parts[i][1], parts[i][2], parts[i][3]);
        }
        to += 16 * a.y.rows.outer_stride;
      }
    }
    if constexpr (kWarpgroup) {
      wait_for_products<0>();
      pin(state);
    }
  };

  if (scans) {
    const bool continues = has_columns && a.segments.continues(segment);
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        state[t][x / 4][x % 4] = continues ? slot[at(t, x / 4, x % 4)] : 0.0F;
      }
    }
  }
  if constexpr (kWarpgroup) {
    if (!scans) {
      for (int x = thread; x < 2 * kSwizzled / 8; x += 128) {
        reinterpret_cast<uint4*>(s.square)[x] = make_uint4(0, 0, 0, 0);
      }
    }
    __syncthreads();
  }
  if (scans) {
    for (int c = 1 - kScanStages; c < count; ++c) {
      __syncthreads();  // chunk c is there
      if (c >= 0) {
        scan(c);
      }
    }
  } else {
    for (int c = 1 - kScanStages; c < count; ++c) {
      wait_for_copies<1>();  // all but q, k and v of chunk c + 1
      if constexpr (kWarpgroup) {
        publish_to_products();
      }
      __syncthreads();  // chunk c - 1 is done with
      fetch_products(c + kScanStages - 1);
      fetch(c + kScanStages - 1);
      if (c + 1 >= 0 && c + 1 < count) {
        make_pairs(c + 1);
      }
    }
  }
  if (scans && has_columns && slot != nullptr) {
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        slot[at(t, x / 4, x % 4)] = state[t][x / 4][x % 4];
      }
    }
  }
}

template <int kKey, Pass kPass, int kWarps = 4>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
         float* sums, const Launch& on) {
  const int64_t count = chunks.count * a.key_heads;
  auto* products = scratch<float4>(on, count * kPairTiles * 64);
  auto* gates = scratch<ScanGates>(on, chunks.count * a.heads);
  launch_ahead(on, "recurrence", product_kernel<kKey>,
               static_cast<unsigned>(count * ceil_div(a.heads / a.key_heads, kGateHeads)), 128, 0,
               a, chunks.span, int64_t{kPass == Pass::kLast ? kKey : 0}, products, gates);
  static_assert(kScanBytes<kKey, kWarps> <= (kWarps > 4 ? kWideShared : kForwardShared));
  launch_ahead(on, "recurrence", scan_kernel<kKey, kPass, kWarps>,
               static_cast<unsigned>(a.segments.count * a.heads * ceil_div(a.dim, 16 * kWarps)),
               32 * kWarps + 128, kScanBytes<kKey, kWarps>, a, chunks.first, kept, products, gates,
               sums);
}

}  // namespace

bool scan_has_chunks(const Recurrence<bf16>& a) {
  return (a.key_dim == 64 || a.key_dim == kMostKeys || a.key_dim == 2 * kMostKeys) &&
         a.dim >= kColumns && a.dim % 16 == 0;
}

void scan_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const Launch& on) {
  if (a.key_dim == 64) {
    run<64, Pass::kOnly>(a, chunks, kept, nullptr, on);
  } else if (a.key_dim == kMostKeys && a.dim == 80 && most_shared() >= kWideShared) {
    run<kMostKeys, Pass::kOnly, 5>(a, chunks, kept, nullptr, on);
  } else if (a.key_dim == kMostKeys) {
    run<kMostKeys, Pass::kOnly>(a, chunks, kept, nullptr, on);
  } else {
    auto* sums =
        scratch<float>(on, chunks.count * a.heads * ceil_div(a.dim, kColumns) * (kC * kColumns));
    run<kMostKeys, Pass::kFirst>(a, chunks, kept, sums, on);
    run<kMostKeys, Pass::kLast>(a, chunks, kept, sums, on);
  }
}

}  // namespace cambium::cuda
