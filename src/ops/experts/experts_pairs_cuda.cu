// Products of experts in bf16 for many rows, by pairs of blocks (clusters of two, sm_90a).
//
// A product of warpgroups has 64 rows and any multiple of eight columns up to 256. Here the outputs
// of the weight are the rows and the rows of an expert, of which there may be any number, the
// columns: a tile has as many as the expert has, up to 320, in sixteens. A block has 128 outputs.
// The two of a pair share the expert's rows, of which each brings a half to both: L2 does not give
// them to each block as fast as they are multiplied. One warp brings what two warpgroups multiply,
// steps ahead and over the ends of tiles.
//
// An element is summed in the order of the depth, 16 at a time.
#include <algorithm>
#include <functional>

#include "ops/cuda_bulk.cuh"
#include "ops/cuda_cluster.cuh"
#include "ops/cuda_tensor_map.cuh"
#include "ops/experts/experts_tiles_cuda.cuh"

namespace cambium::cuda {
namespace {

using namespace expert_tiles;

constexpr int kThreads = 384;  // two warpgroups that multiply, one of which a warp brings operands
constexpr int kPair = 2;       // blocks
constexpr int kStages = 3;
constexpr int kDepth = kTileColumns;
constexpr int kOutputs = 128;   // rows of the weight in a block's tile
constexpr int kMostRows = 320;  // of a tile
constexpr int kBoxRows = 32;    // that one copy brings
constexpr int kRowStep = 16;    // between widths of tiles
constexpr int kStored = 64;     // rows of the result that a warpgroup stores at a time

struct Shared {
  bf16 weight[kStages][kOutputs * kDepth];
  bf16 rows[kStages][kMostRows * kDepth];
  bf16 result[2][kStored * kTileColumns];  // of a warpgroup
  uint64_t full[kStages], empty[kStages];  // barriers
};

/// Outputs of a block: of two weights half as many of each.
template <ExpertsUse kUse>
constexpr int kColumnsOf = kUse == ExpertsUse::kHidden ? kOutputs / 2 : kOutputs;

__device__ __forceinline__ int row_tiles_of(int rows) {
  return (rows + kMostRows - 1) / kMostRows;
}

/// The tiles of a pair one after another.
template <ExpertsUse kUse>
struct PairTile {
  int tile;
  bool exists = false;
  int expert = 0;
  int row = 0, rows = 0;  // among the rows of all experts
  int column = 0;         // of this block

  __device__ PairTile(const ExpertsProduct<bf16>& g, const int* first_tile)
      : tile(static_cast<int>(blockIdx.x) / kPair) {
    find(g, first_tile);
  }
  __device__ void next(const ExpertsProduct<bf16>& g, const int* first_tile) {
    tile += static_cast<int>(gridDim.x) / kPair;
    find(g, first_tile);
  }
  /// How many times `by` rows: the same for a warp, and known to be.
  __device__ int times(int by) const { return __shfl_sync(kAll, (rows + by - 1) / by, 0); }

 private:
  __device__ void find(const ExpertsProduct<bf16>& g, const int* first_tile) {
    exists = tile < first_tile[g.experts];
    if (!exists) {
      return;
    }
    expert = expert_of(first_tile, g.experts, tile);
    const int first = g.start[expert];
    const int count = g.start[expert + 1] - first;
    const int row_tiles = row_tiles_of(count);
    const int within = tile - first_tile[expert];
    const int columns = within / row_tiles;
    // Beside each other run tiles that share outputs. All but the last have as many rows.
    const int each = ((count + row_tiles - 1) / row_tiles + kRowStep - 1) / kRowStep * kRowStep;
    const int begin = (within - columns * row_tiles) * each;
    row = first + begin;
    rows = min(each, count - begin);
    column = (kPair * columns + cluster_rank()) * kColumnsOf<kUse>;
  }
};

/// A warp: brings the operands of all tiles.
template <ExpertsUse kUse>
__device__ __forceinline__ void bring(const ExpertsProduct<bf16>& g, const CUtensorMap& weights,
                                      const CUtensorMap& rows, const int* first_tile, Shared& s) {
  const int rank = cluster_rank();
  RingPlace<kStages> at;
  for (PairTile<kUse> tile(g, first_tile); tile.exists; tile.next(g, first_tile)) {
    const int boxes = tile.times(kBoxRows);
    for (int depth = 0; depth < g.k; depth += kDepth) {
      if (threadIdx.x % 32 == 0) {
        bf16* weight = s.weight[at.stage];
        uint64_t* full = &s.full[at.stage];
        await_phase(&s.empty[at.stage], at.parity ^ 1);
        arrive_expecting(full, (kOutputs + boxes * kBoxRows) * kDepth * sizeof(bf16));
        if constexpr (kUse == ExpertsUse::kGradInput) {
          for (int i = 0; i < kOutputs; i += kTileColumns) {
            copy_box(weight + i * kDepth, weights, {tile.column + i, depth, tile.expert}, full);
          }
        } else if constexpr (kUse == ExpertsUse::kHidden) {
          copy_box(weight, weights, {depth, 0, 0, tile.column / 8, tile.expert}, full);
        } else {
          copy_box(weight, weights, {depth, tile.column, tile.expert}, full);
        }
        for (int i = rank; i < boxes; i += kPair) {
          copy_box_to(0b11, s.rows[at.stage] + i * kBoxRows * kDepth, rows,
                      {depth, tile.row + i * kBoxRows}, full);
        }
      }
      __syncwarp();
      at.next();
    }
  }
}

template <ExpertsUse kUse, int kTiles>
__device__ __forceinline__ void store_tile(const ExpertsProduct<bf16>& g, bool up_first,
                                           const PairTile<kUse>& tile, float (&sums)[kTiles][4],
                                           Shared& s) {
  constexpr bool kHidden = kUse == ExpertsUse::kHidden;
  constexpr int kOwn = kColumnsOf<kUse> / 2;  // outputs of a warpgroup
  constexpr int kPieces = kOwn / 8;           // of 16 bytes
  constexpr int kTogether = kHidden ? 4 : 2;  // tiles of eight rows in four matrices
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int column = tile.column + warpgroup * kOwn;
  bf16* result = s.result[warpgroup];
  // Of a warp's 16 rows of the weight a thread has one of the first eight and one of the others: of
  // two weights one of each.
  float bias[2] = {};
  if (g.bias != nullptr) {
    const int64_t first = int64_t{tile.expert} * g.n;
    const int own = column + warp * kOwn / 4 + lane / 4;
    if constexpr (kHidden) {
      const float gate = own < g.n ? g.bias[first + own] : 0.0F;
      const float up = own < g.n ? g.bias2[first + own] : 0.0F;
      bias[0] = up_first ? up : gate;
      bias[1] = up_first ? gate : up;
    } else {
      bias[0] = own < g.n ? g.bias[first + own] : 0.0F;
      bias[1] = own + 8 < g.n ? g.bias[first + own + 8] : 0.0F;
    }
  }
#pragma unroll
  for (int begin = 0; begin < 8 * kTiles; begin += kStored) {
    const int count = min(kStored, 8 * kTiles - begin);
    meet(1 + warpgroup, 128);  // what was there has been stored
#pragma unroll
    for (int j = 0; j < kStored / 8; j += kTogether) {
      if (8 * j < count) {
        uint32_t matrices[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = kHidden ? 0 : i % 2;
          const float(&of)[4] = sums[min(begin / 8 + j + (kHidden ? i : i / 2), kTiles - 1)];
          float value[2];
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const float first = of[2 * half + x] + bias[half];
            if constexpr (kHidden) {
              const float second = of[2 + x] + bias[1];
              value[x] =
                  up_first ? hidden_of(second, first, g.limit) : hidden_of(first, second, g.limit);
            } else {
              value[x] = first;
            }
          }
          matrices[i] = pack(value[0], value[1]);
        }
        const int matrix = lane / 8;
        const int row = 8 * (j + (kHidden ? matrix : matrix / 2)) + lane % 8;
        const int piece = kHidden ? warp : 2 * warp + matrix % 2;
        store_matrices_transposed(result + swizzled(row, piece), matrices);
      }
    }
    meet(1 + warpgroup, 128);
    const int piece = thread % kPieces;
    const bool wanted = column + 8 * piece < g.n;
    bf16* to = g.c + (tile.row + begin) * g.c_stride + column + 8 * piece;
#pragma unroll
    for (int row = thread / kPieces; row < kStored; row += 128 / kPieces) {
      if (wanted && row < count && begin + row < tile.rows) {
        *reinterpret_cast<uint4*>(to + row * g.c_stride) =
            *reinterpret_cast<const uint4*>(result + swizzled(row, piece));
      }
    }
  }
}

/// Two warpgroups: a tile of 8 kTiles rows, of which each has half of the outputs.
template <ExpertsUse kUse, int kTiles>
__device__ __forceinline__ void multiply_tile(const ExpertsProduct<bf16>& g, bool up_first,
                                              const PairTile<kUse>& tile, RingPlace<kStages>& at,
                                              Shared& s) {
  constexpr bool kTurned = kUse == ExpertsUse::kGradInput;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  float sums[kTiles][4];
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    sums[i / 4][i % 4] = 0.0F;
  }
  // An instruction takes 256 rows at most.
  constexpr int kFirst = kTiles <= 32 ? kTiles : (kTiles / 2 + 1) / 2 * 2;
  auto& first = *reinterpret_cast<float(*)[kFirst][4]>(&sums[0]);
  auto& rest = *reinterpret_cast<float(*)[kTiles > kFirst ? kTiles - kFirst : 1][4]>(
      &sums[kTiles > kFirst ? kFirst : 0]);
  // Says in both blocks that this warp has read a stage.
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) {
      arrive(&s.empty[stage]);
      arrive_in_block(&s.empty[stage], cluster_rank() ^ 1);
    }
  };
  int reading = -1;  // the stage of the products under way
#pragma unroll 1
  for (int depth = 0; depth < g.k; depth += kDepth) {
    await_phase(&s.full[at.stage], at.parity);
    const uint64_t weight = describe_tile(s.weight[at.stage] + warpgroup * kTileSize);
    const uint64_t rows = describe_tile(s.rows[at.stage]);
    pin(sums);
    begin_products();
#pragma unroll
    for (int p = 0; p < kDepth / 16; ++p) {
      const uint64_t left = weight + (kTurned ? of_rows(p) : of_columns(p));
      multiply_async<kTurned>(first, left, rows + of_columns(p));
      if constexpr (kTiles > kFirst) {
        multiply_async<kTurned>(rest, left, rows + of_columns(p) + of_rows(kFirst / 2));
      }
    }
    commit_products();
    wait_for_products<1>();
    if (reading >= 0) {
      release(reading);
    }
    reading = at.stage;
    at.next();
  }
  wait_for_products<0>();
  pin(sums);
  release(reading);
  store_tile<kUse, kTiles>(g, up_first, tile, sums, s);
}

/// Calls f<steps>().
template <int kSteps = 1, class F>
__device__ __forceinline__ void with_steps(int steps, const F& f) {
  if constexpr (kSteps * kRowStep == kMostRows) {
    f.template operator()<kSteps>();
  } else if (steps == kSteps) {
    f.template operator()<kSteps>();
  } else {
    with_steps<kSteps + 1>(steps, f);
  }
}

template <ExpertsUse kUse>
__global__ void __launch_bounds__(kThreads, 1)
    paired_product(const __grid_constant__ ExpertsProduct<bf16> g,
                   const __grid_constant__ CUtensorMap weights,
                   const __grid_constant__ CUtensorMap rows, bool up_first) {
  if constexpr (kWarpgroups) {
    extern __shared__ __align__(1024) uint4 shared[];
    auto& s = *reinterpret_cast<Shared*>(shared);
    int* first_tile = reinterpret_cast<int*>(&s + 1);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        init_barrier(&s.full[i], 1);
        init_barrier(&s.empty[i], kPair * 8);
      }
      barriers_ready();
    }
    await_inputs();
    count_tiles<kThreads>(g.start, g.experts, first_tile, [&](int count) {
      constexpr int kBoth = kPair * kColumnsOf<kUse>;
      return row_tiles_of(count) * ((g.n + kBoth - 1) / kBoth);
    });
    meet_cluster<kPair>();
    if (threadIdx.x >= 256) {
      leave_registers<40>();
      if (threadIdx.x < 288) {
        bring<kUse>(g, weights, rows, first_tile, s);
      }
    } else {
      take_registers<232>();
      RingPlace<kStages> at;
      for (PairTile<kUse> tile(g, first_tile); tile.exists; tile.next(g, first_tile)) {
        with_steps(tile.times(kRowStep), [&]<int kSteps>() {
          multiply_tile<kUse, kSteps * kRowStep / 8>(g, up_first, tile, at, s);
        });
      }
    }
    meet_cluster<kPair>();  // a block's shared memory stays while the other may write to it
  }
}

/// The boxes of the weight that make a tile.
template <ExpertsUse kUse>
bool describe_weights(const ExpertsProduct<bf16>& p, CUtensorMap& map) {
  const auto experts = static_cast<uint64_t>(p.experts);
  const auto n = static_cast<uint64_t>(p.n);
  const auto k = static_cast<uint64_t>(p.k);
  const auto row = static_cast<uint64_t>(p.b_stride);
  const auto expert = static_cast<uint64_t>(p.b_expert);
  if constexpr (kUse == ExpertsUse::kHidden) {
    // Eight rows of the one weight, then eight of the other, which lies that far behind it.
    const auto from = reinterpret_cast<uintptr_t>(p.b);
    const auto other = reinterpret_cast<uintptr_t>(p.b2);
    const uint64_t apart = (std::max(from, other) - std::min(from, other)) / sizeof(bf16);
    return describe_boxes<5>({.data = std::min(p.b, p.b2),
                              .size = {k, 8, 2, n / 8, experts},
                              .stride = {row, apart, 8 * row, expert},
                              .box = {kDepth, 8, 2, kOutputs / 16, 1}},
                             map);
  } else if constexpr (kUse == ExpertsUse::kGradInput) {
    return describe_boxes<3>({.data = p.b,
                              .size = {n, k, experts},
                              .stride = {row, expert},
                              .box = {kTileColumns, kDepth, 1}},
                             map);
  } else {
    return describe_boxes<3>({.data = p.b,
                              .size = {k, n, experts},
                              .stride = {row, expert},
                              .box = {kDepth, kOutputs, 1}},
                             map);
  }
}

template <ExpertsUse kUse>
bool run_pairs(ExpertsProduct<bf16> p, const ExpertLists& lists, const Launch& on) {
  const auto kernel = paired_product<kUse>;
  const size_t shared = sizeof(Shared) + tile_count_bytes<kThreads>(p.experts);
  CUtensorMap weights;
  CUtensorMap rows;
  if (!has_warpgroups() || shared > most_shared() || !describe_weights<kUse>(p, weights)) {
    return false;
  }
  if constexpr (kUse == ExpertsUse::kHidden) {
    // Boxes are of rows side by side: those of the tokens that the expert has are copied.
    View<bf16> x{.data = const_cast<bf16*>(p.a), .rows = {}, .channels = p.k};
    View<bf16> y = x;
    x.rows = {.outer = lists.tokens, .inner = 1, .outer_stride = p.a_stride, .inner_stride = 0};
    y.data = scratch<bf16>(on, lists.rows() * p.k);
    y.rows = {.outer = lists.rows(), .inner = 1, .outer_stride = p.k, .inner_stride = 0};
    p.a = y.data;
    p.a_stride = p.k;
    dispatch_forward(Dispatch<bf16>{.x = x, .y = y, .lists = lists}, on);
  }
  if (!describe_boxes<2>({.data = p.a,
                          .size = {static_cast<uint64_t>(p.k), static_cast<uint64_t>(lists.rows())},
                          .stride = {static_cast<uint64_t>(p.a_stride)},
                          .box = {kDepth, kBoxRows}},
                         rows)) {
    return false;
  }
  const int64_t row_tiles =
      lists.rows() / kMostRows + std::min<int64_t>(lists.rows(), lists.experts);
  const int64_t tiles = row_tiles * ceil_div(p.n, kPair * kColumnsOf<kUse>);
  const int64_t pairs =
      std::min(tiles, std::max<int64_t>(resident_blocks(kernel, kThreads, shared) / kPair, 1));
  constexpr const char* kOperation = kUse == ExpertsUse::kHidden    ? "experts_hidden"
                                     : kUse == ExpertsUse::kForward ? "experts_matmul"
                                                                    : "experts_matmul's gradient";
  launch_clusters(on, kOperation, kPair, kernel, dim3(static_cast<unsigned>(kPair * pairs)),
                  dim3(kThreads), shared, p, weights, rows, std::less<>{}(p.b2, p.b));
  return true;
}

}  // namespace

bool experts_by_pairs(ExpertsUse use, const ExpertsProduct<bf16>& p, const ExpertLists& lists,
                      const Launch& on) {
  switch (use) {
    case ExpertsUse::kForward:
      return run_pairs<ExpertsUse::kForward>(p, lists, on);
    case ExpertsUse::kHidden:
      return run_pairs<ExpertsUse::kHidden>(p, lists, on);
    case ExpertsUse::kGradInput:
      return !p.accumulate && run_pairs<ExpertsUse::kGradInput>(p, lists, on);
    case ExpertsUse::kGradWeight:
      break;
  }
  return false;
}

}  // namespace cambium::cuda
