// The scores of the choice by warpgroups (sm_90a): bf16, an index of at most 64 heads whose keys
// have 128 numbers. A block, one warpgroup, has a token and walks kTiles tiles of 64 keys, which
// are the rows of its products with the token's queries; two tiles are on their way while one is
// read.
#include <algorithm>

#include "ops/attention/attention_cuda.cuh"
#include "ops/cuda_warpgroup.cuh"
#include "ops/selection/selection_cuda.cuh"

namespace cambium::cuda::selection {
namespace {

constexpr int kDim = 128;
constexpr int kKeys = 64;
constexpr int kHeads = 64;
constexpr int64_t kLeastTiles = 4;  // of a block
constexpr int64_t kMostTiles = 96;
constexpr int kStages = 3;
constexpr int kPieces = kDim / 8;
constexpr int kBlock = 128;
constexpr int kRowStep = kBlock / kPieces;  // rows that are copied at a time
constexpr int kOwnRows = kKeys / kRowStep;  // of a thread

struct alignas(1024) Shared {
  bf16 queries[2][kTileSize];
  bf16 keys[kStages][2][kTileSize];
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 3)
    wgmma_kernel(ChooseTokens<bf16> a, attention::Layout layout, const int32_t* segments,
                 Scores scores, int most_tiles) {
  if constexpr (kWarpgroups) {
    extern __shared__ __align__(1024) float memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    await_inputs();
    const int64_t t = scores.first + blockIdx.y;
    const int s = segments[t];
    const auto own = static_cast<int>(layout.position[s] + t - layout.start[s]);
    const int begin = static_cast<int>(blockIdx.x) * most_tiles * kKeys;
    if (begin > own || own < a.chosen.budget) {
      return;
    }
    const auto thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    const int tiles = min(most_tiles, (own - begin) / kKeys + 1);
    const int first_row = thread / kPieces;
    const int piece = thread % kPieces;
    const int place = piece / 8 * kTileSize + swizzled(first_row, piece % 8);
    int64_t rows[kOwnRows];  // of the tile that is copied next
    const auto find_rows = [&](int tile) {
      latent::find_rows<kOwnRows, kRowStep>(layout, s, begin + tile * kKeys, first_row,
                                            tile < tiles ? own + 1 : 0, rows);
    };
    const auto copy_keys = [&](int tile) {
      bf16* to = shared.keys[tile % kStages][0] + place;
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        copy_16(to + i * kRowStep * kTileColumns,
                rows[i] < 0 ? a.keys.wide.data : a.keys.wide.at(rows[i], piece * 8), rows[i] >= 0);
      }
    };
    find_rows(0);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int h = i * kRowStep + first_row;
      copy_16(shared.queries[0] + place + i * kRowStep * kTileColumns,
              h < layout.heads ? a.q.row(t, h) + piece * 8 : a.q.data, h < layout.heads);
    }
    copy_keys(0);
    commit_copies();
#pragma unroll
    for (int tile = 1; tile < kStages - 1; ++tile) {
      find_rows(tile);
      copy_keys(tile);
      commit_copies();
    }
    find_rows(kStages - 1);
    float weights[kHeads / 8][2];
#pragma unroll
    for (int x = 0; x < kHeads / 4; ++x) {
      const int h = x / 2 * 8 + lane % 4 * 2 + x % 2;
      weights[x / 2][x % 2] = h < layout.heads ? load(a.weight.row(t) + h) : 0.0F;
    }
    float* to = scores.rows + int64_t{blockIdx.y} * scores.capacity;
    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies<kStages - 2>();
      publish_to_products();
      __syncthreads();  // the tile is there, and the one before has been read
      copy_keys(tile + kStages - 1);
      commit_copies();
      find_rows(tile + kStages);
      float dot[kHeads / 8][4] = {};
      const uint64_t keys = describe_tile(shared.keys[tile % kStages]);
      const uint64_t queries = describe_tile(shared.queries);
      pin(dot);
      begin_products();
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        multiply_async(dot, keys + of_columns(k), queries + of_columns(k));
      }
      commit_products();
      wait_for_products<0>();
      pin(dot);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // keys lane / 4 and lane / 4 + 8 of the warp's
        float sum = 0.0F;
#pragma unroll
        for (int n = 0; n < kHeads / 8; ++n) {
          sum += weights[n][0] * fmaxf(dot[n][2 * i], 0.0F);
          sum += weights[n][1] * fmaxf(dot[n][2 * i + 1], 0.0F);
        }
        sum += __shfl_xor_sync(0xffffffffU, sum, 1);
        sum += __shfl_xor_sync(0xffffffffU, sum, 2);
        const int p = begin + tile * kKeys + thread / 32 * 16 + i * 8 + lane / 4;
        if (lane % 4 == 0 && p <= own) {
          to[p] = sum;
        }
      }
    }
    wait_for_copies<0>();
  }
}

}  // namespace

bool score_by_warpgroups(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                         const latent::Tokens& tokens, const Scores& scores, const Launch& on) {
  const auto kernel = wgmma_kernel<kBlock>;
  if (a.shape.heads > kHeads || !has_warpgroups()) {
    return false;
  }
  // As many blocks as the device holds at once, where their tiles are not too few or too many.
  const int64_t tiles = ceil_div(scores.capacity, kKeys);
  const int64_t blocks =
      std::max<int64_t>(resident_blocks(kernel, kBlock, sizeof(Shared)) / scores.count, 1);
  const int64_t each = std::clamp(ceil_div(tiles, blocks), kLeastTiles, kMostTiles);
  launch_ahead(
      on, "choose_tokens", kernel,
      dim3(static_cast<unsigned>(ceil_div(tiles, each)), static_cast<unsigned>(scores.count)),
      dim3(kBlock), sizeof(Shared), latent::for_device(a), layout, tokens.segment, scores,
      static_cast<int>(each));
  return true;
}

}  // namespace cambium::cuda::selection
