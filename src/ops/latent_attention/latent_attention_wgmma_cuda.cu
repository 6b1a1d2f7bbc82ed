// Latent attention by warpgroups (sm_90a), forward: bf16, latents of 512 numbers beside rotated
// keys of 64. A block has a token, 64 of its heads and a part of its keys, in tiles of 64. Three
// warpgroups:
//
//   scores    q k' of a tile, its softmax and the left half of the result
//   values    the right half of the result, whose weights the first one leaves in shared memory
//   copies    two pairs of warps, each of which keeps one of two tiles filled: while one is waited
//             for, the other is on its way too
//
// With fewer than 64 heads the rest of the rows multiply zeros where a sequence has one token, and
// memory is what a tile waits for; of longer ones a block has as many tokens as have 64 rows.
#include "ops/attention/attention_cuda.cuh"
#include "ops/cuda_bulk.cuh"
#include "ops/cuda_warpgroup.cuh"
#include "ops/latent_attention/latent_cuda.cuh"

namespace cambium::cuda::latent {
namespace {

constexpr int kRank = 512;
constexpr int kAll = 576;
constexpr int kRows = 64;
constexpr int kKeys = 64;
constexpr int kRankTiles = kRank / kTileColumns;
constexpr int kAllTiles = kAll / kTileColumns;
constexpr int kGroup = 128;   // threads of a warpgroup
constexpr int kCopying = 64;  // of a pair of warps
constexpr int kBlock = 3 * kGroup;
constexpr int kColumns = kRank / 2;  // of a warpgroup
/// Keys for which a part of them pays.
constexpr int64_t kLeastPart = 128;

struct alignas(1024) Shared {
  bf16 queries[kAllTiles][kTileSize];
  bf16 keys[2][kAllTiles][kTileSize];
  bf16 weights[kTileSize];
  float factors[kRows];  // of the result so far
  float sums[kRows];
};

/// The first two with the tile's number added, the last with the warpgroup's.
enum Barrier : int { kFilled = 1, kRead = 3, kWeights = 5, kWeightsRead, kConsumers, kStaged };

/// The rows of a block: the heads from the first on of one token or, where the heads are few, all
/// of them of each of some tokens.
struct RowsOfBlock {
  int tokens;  // 0: another block has them
  int first_head;
  int heads;  // of the call
  bool several;

  __device__ int token(int row) const { return several ? row / heads : 0; }
  __device__ int head(int row) const { return several ? row % heads : first_head + row; }
  __device__ bool has(int row) const { return token(row) < tokens && head(row) < heads; }
};

/// Of the block of token `from_start` of a segment, after which it has `left`, itself among them;
/// the tokens of one block see the same keys, but the last ones.
__device__ __forceinline__ RowsOfBlock rows_of_block(const LatentAttention<bf16>& a, int heads,
                                                     int from_start, int left, int first_head) {
  const int each = left + from_start == 1 || a.chosen.defined() ? 1 : max(1, kRows / heads);
  return {from_start % each == 0 ? min(each, left) : 0, first_head, heads, each > 1};
}

/// Keeps tile `which` of the two filled: by one pair of warps. old: the keys that were there before
/// the call, which need not await inputs.
__device__ __forceinline__ void copy_tiles(const LatentAttention<bf16>& a,
                                           const attention::Layout& layout, int64_t t, int s,
                                           const KeyRange& range, int64_t old, int tiles, int which,
                                           Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x) % kCopying;
  const int first_row = thread / 8;
  const int piece = thread % 8;
  bf16* to = shared.keys[which][0] + swizzled(first_row, piece);
  for (int tile = which; tile < tiles; tile += 2) {
    int64_t rows[kKeys / 8];
    const int64_t first = range.first + int64_t{tile} * kKeys;
    if (!a.chosen.defined()) {
      find_rows<kKeys / 8, 8>(layout, s, first, first_row, range.end, rows);
    } else {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const int64_t at = first + i * 8 + first_row;
        rows[i] =
            at < range.end ? layout.key_row(s, static_cast<int>(a.chosen.position(t, at))) : -1;
      }
    }
    if (first + kKeys > old) {
      await_inputs();
    }
    if (tile >= 2) {
      meet(kRead + which, kCopying + 2 * kGroup);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const bool exists = rows[i] >= 0;
      const int64_t row = exists ? rows[i] : 0;
      const bf16* latent = a.latent.wide.at(row, piece * 8);
#pragma unroll
      for (int c = 0; c < kRankTiles; ++c) {
        copy_16(to + c * kTileSize + i * 8 * kTileColumns, latent + c * kTileColumns, exists);
      }
      copy_16(to + kRankTiles * kTileSize + i * 8 * kTileColumns,
              a.rope_key.wide.at(row, piece * 8), exists);
    }
    commit_copies();
    wait_for_copies<0>();
    publish_to_products();
    report(kFilled + which, kCopying + kGroup);
  }
}

/// Of rows lane / 4 and lane / 4 + 8 of a warp's.
__device__ __forceinline__ void scale_rows(float (&y)[kColumns / 8][4], const float (&factor)[2]) {
  if (__any_sync(0xffffffffU, factor[0] != 1.0F || factor[1] != 1.0F)) {
#pragma unroll
    for (auto& tile : y) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        tile[x] *= factor[x / 2];
      }
    }
  }
}

/// The running softmax of two rows, base 2; sums over the thread's keys alone.
struct Running {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
};

/// Turns scores into weights, the operands of products of 16 keys each. end: of the keys that the
/// rows see, counted from the tile's first.
__device__ __forceinline__ void weigh(float (&score)[kKeys / 8][4], float scale,
                                      const int (&end)[2], Running& running, float (&factor)[2],
                                      uint32_t (&weights)[kKeys / 16][4]) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int x = 0; x < kKeys / 2; ++x) {
    score[x / 4][x % 4] *= scale;
  }
  if (min(end[0], end[1]) < kKeys) {
#pragma unroll
    for (int x = 0; x < kKeys / 2; ++x) {
      if (x / 4 * 8 + column + x % 2 >= end[x % 4 / 2]) {
        score[x / 4][x % 4] = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float most = running.largest[i];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      most = fmaxf(most, fmaxf(score[j][2 * i], score[j][2 * i + 1]));
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
    factor[i] = fast_exp2(running.largest[i] - most);  // 0 for the first tile
    running.largest[i] = most;
    float sum = 0.0F;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const float weight[2] = {fast_exp2(score[j][2 * i] - most),
                               fast_exp2(score[j][2 * i + 1] - most)};
      sum += weight[0] + weight[1];
      weights[j / 2][j % 2 * 2 + i] = pack(weight[0], weight[1]);
    }
    running.sum[i] = running.sum[i] * factor[i] + sum;
  }
}

/// The rows of a warpgroup's half, times their factors, to to_of(row): by way of the keys' memory,
/// so that they go there whole. Rows lie there 32 bytes or a half of that apart in the banks.
template <class E, class ToOf>
__device__ __forceinline__ void put_rows(const float (&y)[kColumns / 8][4],
                                         const float (&factor)[2], const RowsOfBlock& rows, int row,
                                         int group, Shared& shared, const ToOf& to_of) {
  constexpr int kStride = kColumns + 8;
  static_assert(2 * kRows * kStride * sizeof(float) <= sizeof(shared.keys));
  E* staged = reinterpret_cast<E*>(shared.keys) + group * kRows * kStride;
  const auto thread = static_cast<int>(threadIdx.x) % kGroup;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float pair[2] = {y[j][2 * i] * factor[i], y[j][2 * i + 1] * factor[i]};
      store_n<2>(staged + (row + 8 * i) * kStride + 8 * j + thread % 4 * 2, pair);
    }
  }
  publish_to_products();
  meet(kStaged + group, kGroup);
  if (thread < kRows && rows.has(thread)) {
    copy_bulk_out(to_of(thread), staged + thread * kStride, kColumns * sizeof(E));
    await_bulk_out();
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_kernel(LatentAttention<bf16> a, attention::Layout layout, const int32_t* segments,
                 const int32_t* singles, Partials partials, int early) {
  if constexpr (kWarpgroups) {
    extern __shared__ __align__(1024) float memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (early == 0) {
      await_inputs();
    }
    // What the host made of the segments is there since before the kernels that came before; so
    // are, in a step, all keys but the call's own.
    const int64_t t = blockIdx.y;
    const int single = singles[t];
    const int s = segments[t];
    const int start = layout.start[s];
    const int next = layout.start[s + 1];
    const int position = layout.position[s];
    const auto part = static_cast<int>(blockIdx.z);
    const auto from_start = static_cast<int>(t) - start;
    const RowsOfBlock rows = rows_of_block(a, layout.heads, from_start, next - static_cast<int>(t),
                                           static_cast<int>(blockIdx.x) * kRows);
    if (rows.tokens == 0 || (part > 0 && single < 0)) {
      return;
    }
    const int64_t own = int64_t{position} + from_start;
    const KeyRange range = keys_of_part(a.chosen.count(own + rows.tokens - 1), kKeys, part,
                                        single < 0 ? 1 : partials.parts);
    const auto tiles = static_cast<int>((range.end - range.first + kKeys - 1) / kKeys);
    // The same for a warp, and known to be: products of a warpgroup are not to diverge.
    const int group = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kGroup, 0);
    if (group == 2) {
      leave_registers<72>();
      const int which =
          __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) % kGroup / kCopying, 0);
      const int64_t old = early == 0 ? range.end : position;
      copy_tiles(a, layout, t, s, range, old, tiles, which, shared);
    } else {
      take_registers<216>();
      if (early != 0) {
        await_inputs();
      }
      const auto thread = static_cast<int>(threadIdx.x);
      const int lane = thread % 32;
#pragma unroll
      for (int i = 0; i < kRows; i += 2 * kGroup / 8) {
        const int of = i + thread / 8;
        const bool exists = rows.has(of);
        const bf16* from =
            exists ? a.q.row(t + rows.token(of), rows.head(of)) + thread % 8 * 8 : nullptr;
#pragma unroll
        for (int c = 0; c < kAllTiles; ++c) {
          copy_16(shared.queries[c] + swizzled(of, thread % 8),
                  exists ? from + c * kTileColumns : a.q.data, exists);
        }
      }
      commit_copies();
      wait_for_copies<0>();
      publish_to_products();
      meet(kConsumers, 2 * kGroup);

      const int row = thread % kGroup / 32 * 16 + lane / 4;  // and the eighth after it
      float y[kColumns / 8][4] = {};
      Running running;
      if (group == 0) {
        const float scale = layout.scale * attention::kLog2E;
        const uint64_t queries = describe_tile(shared.queries);
        int end[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t seen = a.chosen.count(own + rows.token(row + 8 * i));
          end[i] = static_cast<int>(min(range.end, seen) - range.first);
        }
        for (int tile = 0; tile < tiles; ++tile) {
          const int which = tile % 2;
          const uint64_t keys = describe_tile(shared.keys[which]);
          float score[kKeys / 8][4] = {};
          meet(kFilled + which, kCopying + kGroup);
          pin(score);
          begin_products();
#pragma unroll
          for (int k = 0; k < kAll / 16; ++k) {
            multiply_async(score, queries + of_columns(k), keys + of_columns(k));
          }
          commit_products();
          wait_for_products<0>();
          pin(score);
          float factor[2];
          uint32_t weights[kKeys / 16][4];
          weigh(score, scale, end, running, factor, weights);
          end[0] -= kKeys;
          end[1] -= kKeys;
          if (tile > 0) {
            meet(kWeightsRead, 2 * kGroup);
          }
#pragma unroll
          for (int x = 0; x < kKeys / 4; ++x) {
            const int of_row = row + x % 2 * 8;
            *reinterpret_cast<uint32_t*>(shared.weights + swizzled(of_row, x / 2) + lane % 4 * 2) =
                weights[x / 4][x % 4];
          }
          if (lane % 4 == 0) {
            shared.factors[row] = factor[0];
            shared.factors[row + 8] = factor[1];
          }
          publish_to_products();
          report(kWeights, 2 * kGroup);
          scale_rows(y, factor);
          const uint64_t values = describe_tile(shared.keys[which], kTileBytes);
          pin(y);
          begin_products();
#pragma unroll
          for (int k = 0; k < kKeys / 16; ++k) {
            multiply_async<true>(y, weights[k], values + of_rows(k));
          }
          commit_products();
          wait_for_products<0>();
          pin(y);
          if (tile + 2 < tiles) {
            report(kRead + which, kCopying + 2 * kGroup);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          running.sum[i] += __shfl_xor_sync(0xffffffffU, running.sum[i], 1);
          running.sum[i] += __shfl_xor_sync(0xffffffffU, running.sum[i], 2);
          if (lane % 4 == 0) {
            shared.sums[row + 8 * i] = running.sum[i];
          }
        }
      } else {
        const uint64_t weights = describe_tile(shared.weights);
        for (int tile = 0; tile < tiles; ++tile) {
          const int which = tile % 2;
          const uint64_t values = describe_tile(shared.keys[which][kRankTiles / 2], kTileBytes);
          meet(kWeights, 2 * kGroup);
          const float factor[2] = {shared.factors[row], shared.factors[row + 8]};
          scale_rows(y, factor);
          pin(y);
          begin_products();
#pragma unroll
          for (int k = 0; k < kKeys / 16; ++k) {
            multiply_async<false, true>(y, weights + of_columns(k), values + of_rows(k));
          }
          commit_products();
          wait_for_products<0>();
          pin(y);
          if (tile + 1 < tiles) {
            report(kWeightsRead, 2 * kGroup);
          }
          if (tile + 2 < tiles) {
            report(kRead + which, kCopying + 2 * kGroup);
          }
        }
      }
      meet(kConsumers, 2 * kGroup);
      const bool whole = partials.parts == 1 || single < 0;
      const int64_t first_at = (int64_t{single} * partials.parts + part) * layout.heads;
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int of = row + 8 * i;
        const float sum = shared.sums[of];
        factor[i] = whole ? 1.0F / sum : 1.0F;
        if (group == 0 && lane % 4 == 0 && rows.has(of)) {
          const float largest = running.largest[i] / attention::kLog2E;
          const int64_t at = (t + rows.token(of)) * layout.heads + rows.head(of);
          if (!whole) {
            partials.largest[first_at + rows.head(of)] = largest;
            partials.sum[first_at + rows.head(of)] = sum;
          } else if (a.largest != nullptr) {
            a.largest[at] = largest;
            a.inverse_sum[at] = factor[i];
          }
        }
      }
      const int column = group * kColumns;
      if (whole) {
        put_rows<bf16>(y, factor, rows, row, group, shared,
                       [&](int of) { return a.y.row(t + rows.token(of), rows.head(of)) + column; });
      } else {
        put_rows<float>(y, factor, rows, row, group, shared, [&](int of) {
          return partials.y + (first_at + rows.head(of)) * kRank + column;
        });
      }
    }
  }
}

}  // namespace

bool forward_by_warpgroups(const LatentAttention<bf16>& a, const Tokens& tokens, const Launch& on) {
  const auto kernel = wgmma_kernel<kBlock>;
  if (!has_warpgroups()) {
    return false;
  }
  const AttentionShape& shape = a.shape;
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const int64_t head_blocks = ceil_div(shape.heads, kRows);
  const Partials partials = make_partials(a, tokens, tokens.singles * head_blocks, kLeastPart,
                                          resident_blocks(kernel, kBlock, sizeof(Shared)), on);
  launch_ahead(on, "latent_attention", kernel,
               dim3(static_cast<unsigned>(head_blocks), static_cast<unsigned>(a.q.rows.outer),
                    static_cast<unsigned>(partials.parts)),
               dim3(kBlock), sizeof(Shared), for_device(a), layout.layout, tokens.segment,
               tokens.single, partials, on.recorder != nullptr && !a.chosen.defined() ? 1 : 0);
  add_parts("latent_attention", a.y, tokens, partials, on);
  return true;
}

}  // namespace cambium::cuda::latent
