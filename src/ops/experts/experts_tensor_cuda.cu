// Products of experts in bf16 by tensor cores, fed by copies in the background.
//
// Tiles of the result are dealt to as many blocks as the device holds. How many rows an expert has
// only the device knows: every block counts the tiles of the experts before it begins. A block goes
// through the steps of depth of one tile after another without a pause, its copies some steps ahead
// of its products, over the ends of tiles too. Beside each other run tiles of one expert that share
// columns of its weight, so that memory gives each weight once.
//
// Few rows take narrow tiles, for which reading the weights is what takes time; many take tiles of
// 128 rows and, where the device has them, products of warpgroups. An element is summed in the
// order of the depth, 16 at a time; where the call must not depend on its batch, always by the
// tiles for many rows.
#include <algorithm>
#include <type_traits>

#include "ops/cuda.cuh"
#include "ops/cuda_mma.cuh"
#include "ops/cuda_warpgroup.cuh"
#include "ops/experts/experts_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffU;

/// Tiles of kM x kN, kDepth a step; warps along rows and columns; blocks of a multiprocessor.
template <int kM_, int kN_, int kDepth_, int kStages_, int kRowWarps_, int kColumnWarps_,
          int kBlocks_, bool kWarpgroups_ = false>
struct Shape {
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kStage = (kM + kN) * kDepth;  // elements
  // Products of warpgroups: each has 64 rows and all columns.
  static constexpr bool kWarpgroups = kByWarpgroup && kWarpgroups_;
  static_assert(!kWarpgroups_ || (kM == 128 && kN == 256 && kDepth == 64 && kThreads == 256));
  static constexpr int kRowTiles = kWarpgroups ? 1 : kM / kRowWarps / 16;
  static constexpr int kColumnTiles = kWarpgroups ? kN / 8 : kN / kColumnWarps / 8;
  // A stage is written while products of so many steps before may still read theirs.
  static constexpr int kReading = kWarpgroups ? 1 : 0;
  static constexpr int kAhead = kStages - 1 - kReading;
};
using Rows16 = Shape<16, 32, 128, 5, 1, 4, 3>;
using Rows32 = Shape<32, 64, 128, 4, 1, 4, 2>;
using Rows64 = Shape<64, 128, 64, 4, 2, 2, 2>;
using Rows128 = Shape<128, 128, 64, 3, 2, 4, 1>;
using Wide = Shape<128, 256, 64, 4, 2, 4, 1, true>;

template <class S>
size_t shared_bytes(int64_t experts) {
  return sizeof(bf16) * S::kStages * S::kStage +
         sizeof(int32_t) * (static_cast<size_t>(experts + 1) + S::kThreads / 32);
}

// --- Operands in shared memory, in rows of 128 bytes whose pieces of 16 are swizzled by the row.

/// Where piece `piece` of the depth of row i lies, of kRows rows, in elements.
template <int kRows>
__device__ __forceinline__ int place_of(int i, int piece) {
  return piece / 8 * kRows * 64 + i * 64 + ((piece % 8) ^ (i % 8)) * 8;
}
/// The same of a turned operand: rows i to i + 7 at p of the depth.
__device__ __forceinline__ int turned_place_of(int i, int p) {
  return i / 64 * 64 * 64 + p * 64 + ((i % 64 / 8) ^ (p % 8)) * 8;
}

/// As copy_16, but of what is not wanted nothing is written.
__device__ __forceinline__ void copy_wanted(bool wanted, bf16* to, const bf16* from, bool exists) {
  const int bytes = exists ? 16 : 0;
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %0, 0;\n\t"
      "@p cp.async.cg.shared.global [%1], [%2], 16, %3;\n\t}"
      :
      : "r"(wanted ? 1 : 0), "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)),
        "r"(bytes)
      : "memory");
}

/// Begins to copy kRows rows of kDepth elements; zeros from `depth` on, of rows from `rows` on
/// nothing.
template <int kRows, int kDepth, int kThreads>
__device__ __forceinline__ void copy_rows(const bf16* from, int64_t stride, int rows, int depth,
                                          bf16* to) {
  constexpr int kPieces = kDepth / 8;
  constexpr int kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kStep % 8 == 0 && kRows % kStep == 0);
  const int row = static_cast<int>(threadIdx.x) / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const bool exists = piece * 8 < depth;
  const bf16* at = exists ? from + row * stride + piece * 8 : from;
  const int64_t step = exists ? kStep * stride : 0;
  to += place_of<kRows>(row, piece);
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    copy_wanted(row + i < rows, to + i * 64, at, exists);
    at += step;
  }
}
/// The same, turned: 64 rows of the depth, kRows elements each.
template <int kRows, int kThreads>
__device__ __forceinline__ void copy_turned(const bf16* from, int64_t stride, int rows, int depth,
                                            bf16* to) {
  constexpr int kPieces = kRows / 8;
  constexpr int kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kStep % 8 == 0 && 64 % kStep == 0);
  const int p = static_cast<int>(threadIdx.x) / kPieces;
  const int i = static_cast<int>(threadIdx.x) % kPieces * 8;
  const bool wanted = i < rows;
  const bf16* at = from + p * stride + i;
  to += turned_place_of(i, p);
#pragma unroll
  for (int q = 0; q < 64; q += kStep) {
    const bool exists = p + q < depth;
    copy_wanted(wanted, to + q * 64, exists ? at : from, exists);
    at += kStep * stride;
  }
}

// --- Tiles.

template <ExpertsUse kUse>
inline constexpr bool kRowsInDepth = kUse == ExpertsUse::kGradWeight;

template <class S, ExpertsUse kUse, class C>
__device__ __forceinline__ int tiles_of(const ExpertsProduct<C>& g, int rows) {
  const int columns = (g.n + S::kN - 1) / S::kN;
  if constexpr (kRowsInDepth<kUse>) {
    return rows == 0 && g.accumulate ? 0 : (g.m + S::kM - 1) / S::kM * columns;
  }
  return (rows + S::kM - 1) / S::kM * columns;
}

/// first_tile[e] = the tiles of experts before e, for all threads; behind them a number a warp.
template <class S, ExpertsUse kUse, class C>
__device__ void count_tiles(const ExpertsProduct<C>& g, int* first_tile) {
  int* sums = first_tile + g.experts + 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int each = (g.experts + S::kThreads - 1) / S::kThreads;
  const int begin = min(thread * each, g.experts);
  const int end = min(begin + each, g.experts);
  int own = 0;
  for (int e = begin; e < end; ++e) {
    own += tiles_of<S, kUse>(g, g.start[e + 1] - g.start[e]);
  }
  int below = own;  // and own
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(kAll, below, lanes);
    below += thread % 32 >= lanes ? other : 0;
  }
  if (thread % 32 == 31) {
    sums[thread / 32] = below;
  }
  __syncthreads();
  below -= own;
  for (int w = 0; w < thread / 32; ++w) {
    below += sums[w];
  }
  for (int e = begin; e < end; ++e) {
    first_tile[e] = below;
    below += tiles_of<S, kUse>(g, g.start[e + 1] - g.start[e]);
    if (e + 1 == g.experts) {
      first_tile[g.experts] = below;
    }
  }
  __syncthreads();
}

/// A step of depth of a tile, and the way from one to the next.
template <class S, ExpertsUse kUse, class C>
struct Step {
  int tile;
  int depth = 0;  // before the step
  int expert = 0;
  int first = 0;  // row of the expert
  int row = 0, rows = 0;
  int column = 0, columns = 0;
  int depths = 0;
  bool exists = false;

  __device__ Step(const ExpertsProduct<C>& g, const int* first_tile)
      : tile(static_cast<int>(blockIdx.x)) {
    find(g, first_tile);
  }
  __device__ void next_tile(const ExpertsProduct<C>& g, const int* first_tile) {
    tile += static_cast<int>(gridDim.x);
    depth = 0;
    find(g, first_tile);
  }
  /// After the last step of the last tile none exists.
  __device__ void next(const ExpertsProduct<C>& g, const int* first_tile) {
    depth += S::kDepth;
    if (depth >= depths) {
      next_tile(g, first_tile);
    }
  }

 private:
  __device__ void find(const ExpertsProduct<C>& g, const int* first_tile) {
    exists = tile < first_tile[g.experts];
    if (!exists) {
      return;
    }
    // The last expert whose tiles begin no later: 32 experts at a time, then of those.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int blocks =
        __popc(__ballot_sync(kAll, first_tile[min(32 * (lane + 1), g.experts)] <= tile));
    expert = 32 * blocks + __popc(__ballot_sync(
                               kAll, first_tile[min(32 * blocks + lane + 1, g.experts)] <= tile));
    first = g.start[expert];
    const int count = g.start[expert + 1] - first;
    const int m = kRowsInDepth<kUse> ? g.m : count;
    depths = kRowsInDepth<kUse> ? count : g.k;
    const int row_tiles = (m + S::kM - 1) / S::kM;
    const int within = tile - first_tile[expert];
    column = within / row_tiles * S::kN;
    row = (within - within / row_tiles * row_tiles) * S::kM;
    rows = m - row;
    columns = g.n - column;
  }
};

template <class S, ExpertsUse kUse, class C>
__device__ __forceinline__ void copy_step(const ExpertsProduct<C>& g, const Step<S, kUse, C>& at,
                                          bf16* stage) {
  const int left = at.depths - at.depth;
  const bf16* b = g.b + at.expert * g.b_expert;
  bf16* b_stage = stage + S::kM * S::kDepth;
  if constexpr (kRowsInDepth<kUse>) {
    const int64_t depth = at.first + at.depth;
    copy_turned<S::kM, S::kThreads>(g.a + depth * g.a_stride + at.row, g.a_stride, at.rows, left,
                                    stage);
    copy_turned<S::kN, S::kThreads>(b + depth * g.b_stride + at.column, g.b_stride, at.columns,
                                    left, b_stage);
  } else {
    copy_rows<S::kM, S::kDepth, S::kThreads>(
        g.a + static_cast<int64_t>(at.first + at.row) * g.a_stride + at.depth, g.a_stride, at.rows,
        left, stage);
    if constexpr (kUse == ExpertsUse::kForward) {
      copy_rows<S::kN, S::kDepth, S::kThreads>(b + at.column * g.b_stride + at.depth, g.b_stride,
                                               at.columns, left, b_stage);
    } else {
      copy_turned<S::kN, S::kThreads>(b + at.depth * g.b_stride + at.column, g.b_stride, at.columns,
                                      left, b_stage);
    }
  }
}

// --- Products of a step.

template <class S>
struct Sums {
  float of[S::kRowTiles][S::kColumnTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          of[i][j][q] = 0.0F;
        }
      }
    }
  }
  /// The first row and column of this warp.
  static __device__ __forceinline__ int row() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return S::kWarpgroups ? warp * 16 : warp / S::kColumnWarps * S::kRowTiles * 16;
  }
  static __device__ __forceinline__ int column() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return S::kWarpgroups ? 0 : warp % S::kColumnWarps * S::kColumnTiles * 8;
  }
};

/// 16 rows of a from row i on, 16 of the depth from p on, as the left operand.
template <class S, bool kTurned>
__device__ __forceinline__ void load_left(const bf16* a, int i, int p, uint32_t (&left)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kTurned) {
    load_matrices_transposed(
        left, a + turned_place_of(i + lane / 8 % 2 * 8, p + lane / 16 * 8 + lane % 8));
  } else {
    load_matrices(left, a + place_of<S::kM>(i + lane % 16, p / 8 + lane / 16));
  }
}

/// 16 rows of b as two right operands.
template <class S, bool kTurned>
__device__ __forceinline__ void load_right(const bf16* b, int j, int p, uint32_t (&right)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kTurned) {
    load_matrices_transposed(
        right, b + turned_place_of(j + lane / 16 * 8, p + lane / 8 % 2 * 8 + lane % 8));
  } else {
    load_matrices(right, b + place_of<S::kN>(j + lane / 16 * 8 + lane % 8, p / 8 + lane / 8 % 2));
  }
}

/// By the products of single warps.
template <class S, bool kATurned, bool kBTurned>
__device__ __forceinline__ void multiply(const bf16* a, const bf16* b, Sums<S>& sums) {
  const int row = Sums<S>::row();
  const int column = Sums<S>::column();
  if constexpr (S::kColumnTiles == 1) {
    static_assert(!kATurned && !kBTurned && S::kRowTiles == 1);
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int p = 0; p < S::kDepth; p += 32) {
      uint32_t right[4];
      load_matrices(right, b + place_of<S::kN>(column + lane % 8, p / 8 + lane / 8));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t left[4];
        load_left<S, kATurned>(a, row, p + 16 * half, left);
        mma(sums.of[0][0], left, right[2 * half], right[2 * half + 1]);
      }
    }
  } else {
#pragma unroll
    for (int p = 0; p < S::kDepth; p += 16) {
      uint32_t left[S::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        load_left<S, kATurned>(a, row + 16 * i, p, left[i]);
      }
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j += 2) {
        uint32_t right[4];
        load_right<S, kBTurned>(b, column + 8 * j, p, right);
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) {
          mma(sums.of[i][j], left[i], right[0], right[1]);
          mma(sums.of[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }
}

/// By a warpgroup, in the background.
template <class S, bool kATurned, bool kBTurned>
__device__ __forceinline__ void begin_multiply(const bf16* a, const bf16* b, Sums<S>& sums) {
  // The next 64 rows of a lie behind 64 rows of 64 elements, turned or not.
  const uint64_t left = describe_operand(a + Sums<S>::row() / 64 * 64 * 64);
  const uint64_t right = describe_operand(b, 64 * 128);
  begin_async_products();
#pragma unroll
  for (int p = 0; p < S::kDepth / 16; ++p) {
    multiply_async<kATurned, kBTurned>(sums.of[0], left + p * kNextDepth<kATurned>,
                                       right + p * kNextDepth<kBTurned>);
  }
}

// --- Results.

/// Pairs of columns of four tiles side by side, of which lane q of four has columns 2 q and 2 q +
/// 1: after it the lane has all of tile q.
__device__ __forceinline__ void gather_tiles(uint32_t (&pairs)[4]) {
  const int q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const bool odd = q % 2 == 1;
    const uint32_t got = __shfl_xor_sync(kAll, odd ? pairs[j] : pairs[j + 1], 1);
    pairs[j] = odd ? got : pairs[j];
    pairs[j + 1] = odd ? pairs[j + 1] : got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const bool upper = q >= 2;
    const uint32_t got = __shfl_xor_sync(kAll, upper ? pairs[j] : pairs[j + 2], 2);
    pairs[j] = upper ? got : pairs[j];
    pairs[j + 2] = upper ? pairs[j + 2] : got;
  }
}

/// The sums of a tile, with kMore a bias and what is there.
template <bool kMore, class S, ExpertsUse kUse, class C>
__device__ __forceinline__ void put(const ExpertsProduct<C>& g, const Step<S, kUse, C>& at,
                                    const Sums<S>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_column = at.column + Sums<S>::column();
  C* c = g.c + at.expert * g.c_expert;
  if constexpr (!kRowsInDepth<kUse>) {
    c += at.first * g.c_stride;
  }
#pragma unroll
  for (int i = 0; i < 2 * S::kRowTiles; ++i) {
    const int own = Sums<S>::row() + 8 * i + lane / 4;
    C* row = c + (at.row + own) * g.c_stride;
    // Two neighbours, of column tile j.
    const auto pair = [&](int j) {
      float2 of = {sums.of[i / 2][j][i % 2 * 2], sums.of[i / 2][j][i % 2 * 2 + 1]};
      const int column = first_column + 8 * j + lane % 4 * 2;
      if (kMore && own < at.rows && column < g.n) {
        if (g.bias != nullptr) {
          const float2 bias =
              *reinterpret_cast<const float2*>(g.bias + int64_t{at.expert} * g.n + column);
          of = {of.x + bias.x, of.y + bias.y};
        }
        if (g.accumulate) {
          float old[2];
          load_n<2>(row + column, old);
          of = {old[0] + of.x, old[1] + of.y};
        }
      }
      return of;
    };
    if constexpr (sizeof(C) == 2 && S::kColumnTiles % 4 == 0) {
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 of = pair(j + k);
          pairs[k] = pack(of.x, of.y);
        }
        gather_tiles(pairs);
        const int column = first_column + 8 * (j + lane % 4);
        if (own < at.rows && column < g.n) {
          *reinterpret_cast<uint4*>(row + column) =
              make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
        const int column = first_column + 8 * j + lane % 4 * 2;
        if (own < at.rows && column < g.n) {
          const float2 of = pair(j);
          store_n<2>(row + column, {of.x, of.y});
        }
      }
    }
  }
}

template <class S, ExpertsUse kUse, class C>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    grouped_product(const __grid_constant__ ExpertsProduct<C> g) {
  constexpr bool kATurned = kRowsInDepth<kUse>;
  constexpr bool kBTurned = kUse != ExpertsUse::kForward;
  extern __shared__ __align__(1024) uint4 shared[];
  auto* stages = reinterpret_cast<bf16*>(shared);
  int* first_tile = reinterpret_cast<int*>(stages + S::kStages * S::kStage);
  await_inputs();
  count_tiles<S, kUse>(g, first_tile);
  using At = Step<S, kUse, C>;
  At ahead(g, first_tile);
  int ahead_stage = 0;
  const auto copy = [&] {
    if (ahead.exists) {
      copy_step(g, ahead, stages + ahead_stage * S::kStage);
      ahead.next(g, first_tile);
      ahead_stage = ahead_stage + 1 == S::kStages ? 0 : ahead_stage + 1;
    }
    commit_copies();
  };
  At at = ahead;
#pragma unroll 1
  for (int i = 0; i < S::kAhead; ++i) {
    copy();
  }
  int stage = 0;
  for (; at.exists; at.next_tile(g, first_tile)) {
    Sums<S> sums;
    sums.clear();
    // The same for a warp, and known to be: products of a warpgroup are not to diverge. Of one
    // without rows nothing is stored.
    const bool has_rows = __shfl_sync(kAll, Sums<S>::row() / 64 * 64 < at.rows, 0) != 0;
    const int depths = __shfl_sync(kAll, at.depths, 0);
    int depth = 0;
#pragma unroll 1
    do {
      wait_for_copies<S::kAhead - 1>();
      if constexpr (S::kWarpgroups) {
        publish_to_async_products();
      }
      __syncthreads();  // the step is here; what is written next has been read
      const bf16* a = stages + stage * S::kStage;
      const bf16* b = a + S::kM * S::kDepth;
      if constexpr (S::kWarpgroups) {
        pin_sums(sums.of[0]);
        if (has_rows) {
          begin_multiply<S, kATurned, kBTurned>(a, b, sums);
          commit_async_products();
        }
        copy();
        wait_for_async_products<1>();
      } else {
        copy();
        multiply<S, kATurned, kBTurned>(a, b, sums);
      }
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
      depth += S::kDepth;
    } while (depth < depths);
    if constexpr (S::kWarpgroups) {
      wait_for_async_products<0>();
      pin_sums(sums.of[0]);
    }
    if (g.bias != nullptr || g.accumulate) {
      put<true>(g, at, sums);
    } else {
      put<false>(g, at, sums);
    }
  }
}

/// What a block may take of shared memory.
size_t most_shared() {
  int device = 0;
  int bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

template <class S, ExpertsUse kUse, class C>
bool run_shape(const ExpertsProduct<C>& p, const ExpertLists& lists, const Launch& on) {
  const size_t shared = shared_bytes<S>(p.experts);
  if (shared > most_shared()) {
    return false;
  }
  // Every expert that has rows may have a tile of rows that is not full.
  const int64_t row_tiles = kRowsInDepth<kUse>
                                ? p.experts * ceil_div(p.m, S::kM)
                                : lists.rows() / S::kM + std::min(lists.rows(), lists.experts);
  const int64_t tiles = row_tiles * ceil_div(p.n, S::kN);
  const auto kernel = grouped_product<S, kUse, C>;
  const int64_t blocks = std::min(tiles, resident_blocks(kernel, S::kThreads, shared));
  launch_ahead(on, kUse == ExpertsUse::kForward ? "experts_matmul" : "experts_matmul's gradient",
               kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads), shared, p);
  return true;
}

template <ExpertsUse kUse, class C>
bool run_many_rows(const ExpertsProduct<C>& p, const ExpertLists& lists, const Launch& on) {
  return launches_ahead() ? run_shape<Wide, kUse>(p, lists, on)
                          : run_shape<Rows128, kUse>(p, lists, on);
}

}  // namespace

bool experts_by_tensor_cores(ExpertsUse use, const ExpertsProduct<bf16>& p,
                             const ExpertLists& lists, const Launch& on) {
  if (use == ExpertsUse::kGradInput) {
    return run_many_rows<ExpertsUse::kGradInput>(p, lists, on);
  }
  // Most experts have little more than their even share.
  const int64_t even = ceil_div(lists.rows(), lists.experts);
  if (on.batch_invariant || even > 48) {
    return run_many_rows<ExpertsUse::kForward>(p, lists, on);
  }
  return even <= 8    ? run_shape<Rows16, ExpertsUse::kForward>(p, lists, on)
         : even <= 20 ? run_shape<Rows32, ExpertsUse::kForward>(p, lists, on)
                      : run_shape<Rows64, ExpertsUse::kForward>(p, lists, on);
}

bool experts_by_tensor_cores(const ExpertsProduct<float>& p, const ExpertLists& lists,
                             const Launch& on) {
  return run_many_rows<ExpertsUse::kGradWeight>(p, lists, on);
}

}  // namespace cambium::cuda
