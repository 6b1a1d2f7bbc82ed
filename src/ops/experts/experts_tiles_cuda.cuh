// Tiles of the products of experts: which there are, what of them is copied, multiplied and stored.
#pragma once

#include "ops/experts/experts_cuda.cuh"
#include "ops/experts/experts_operands_cuda.cuh"

namespace cambium::cuda::expert_tiles {

inline constexpr unsigned kAll = 0xffffffffU;

// --- Tiles.

template <ExpertsUse kUse>
inline constexpr bool kRowsInDepth = kUse == ExpertsUse::kGradWeight;

/// Columns of the result that a tile has: of two weights it has half of its columns each.
template <class S, ExpertsUse kUse>
inline constexpr int kColumns = kUse == ExpertsUse::kHidden ? S::kN / 2 : S::kN;

template <class S, ExpertsUse kUse, class C>
__device__ __forceinline__ int tiles_of(const ExpertsProduct<C>& g, int rows) {
  const int columns = (g.n + kColumns<S, kUse> - 1) / kColumns<S, kUse>;
  if constexpr (kRowsInDepth<kUse>) {
    return rows == 0 && g.accumulate ? 0 : (g.m + S::kM - 1) / S::kM * columns;
  }
  return (rows + S::kM - 1) / S::kM * columns;
}

/// first_tile[e] = the tiles of experts before e, for all threads; behind them a number a warp.
/// tiles_of(rows) are those of an expert.
template <int kThreads, class TilesOf>
__device__ __forceinline__ void count_tiles(const int32_t* start, int experts, int* first_tile,
                                            const TilesOf& tiles_of) {
  int* sums = first_tile + experts + 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int each = (experts + kThreads - 1) / kThreads;
  const int begin = min(thread * each, experts);
  const int end = min(begin + each, experts);
  int own = 0;
  for (int e = begin; e < end; ++e) {
    own += tiles_of(start[e + 1] - start[e]);
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
    below += tiles_of(start[e + 1] - start[e]);
    if (e + 1 == experts) {
      first_tile[experts] = below;
    }
  }
  __syncthreads();
}
/// The bytes of that.
template <int kThreads>
size_t tile_count_bytes(int64_t experts) {
  return sizeof(int32_t) * (static_cast<size_t>(experts + 1) + kThreads / 32);
}

/// The expert of a tile that exists, found by a whole warp: the last whose tiles begin no later, 32
/// experts at a time, then of those.
__device__ __forceinline__ int expert_of(const int* first_tile, int experts, int tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int blocks = __popc(__ballot_sync(kAll, first_tile[min(32 * (lane + 1), experts)] <= tile));
  return 32 * blocks +
         __popc(__ballot_sync(kAll, first_tile[min(32 * blocks + lane + 1, experts)] <= tile));
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
  // Of kHidden: the tokens of the rows that this thread copies.
  static constexpr int kPieces = S::kDepth / 8;
  int token[S::kM * kPieces / S::kCopiers] = {};

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
    expert = expert_of(first_tile, g.experts, tile);
    first = g.start[expert];
    const int count = g.start[expert + 1] - first;
    const int m = kRowsInDepth<kUse> ? g.m : count;
    depths = kRowsInDepth<kUse> ? count : g.k;
    const int row_tiles = (m + S::kM - 1) / S::kM;
    const int within = tile - first_tile[expert];
    column = within / row_tiles * kColumns<S, kUse>;
    row = (within - within / row_tiles * row_tiles) * S::kM;
    rows = m - row;
    columns = g.n - column;
    if constexpr (kUse == ExpertsUse::kHidden) {
      const int own = static_cast<int>(threadIdx.x) / kPieces;
#pragma unroll
      for (int i = 0; i < S::kM * kPieces / S::kCopiers; ++i) {
        const int at = own + i * S::kCopiers / kPieces;
        token[i] = at < rows ? g.slot[first + row + at] / g.top : 0;
      }
    }
  }
};

template <class S, ExpertsUse kUse, class C>
__device__ __forceinline__ void copy_step(const ExpertsProduct<C>& g, const Step<S, kUse, C>& at,
                                          bf16* stage) {
  if (S::kCopiers < S::kThreads && static_cast<int>(threadIdx.x) >= S::kCopiers) {
    return;
  }
  const int left = at.depths - at.depth;
  const bf16* b = g.b + at.expert * g.b_expert;
  bf16* b_stage = stage + S::kM * S::kDepth;
  if constexpr (kRowsInDepth<kUse>) {
    const int64_t depth = at.first + at.depth;
    copy_turned<S::kM, S::kCopiers>(g.a + depth * g.a_stride + at.row, g.a_stride, at.rows, left,
                                    stage);
    copy_turned<S::kN, S::kCopiers>(b + depth * g.b_stride + at.column, g.b_stride, at.columns,
                                    left, b_stage);
  } else if constexpr (kUse == ExpertsUse::kHidden) {
    copy_tokens<S::kM, S::kDepth, S::kCopiers>(g.a + at.depth, g.a_stride, at.token, at.rows, left,
                                               stage);
    const int64_t offset = at.expert * g.b_expert + at.column * g.b_stride + at.depth;
    copy_both<S::kN, S::kColumnTiles * 4, S::kDepth, S::kCopiers>(
        g.b + offset, g.b2 + offset, g.b_stride, at.columns, left, b_stage);
  } else {
    copy_rows<S::kM, S::kDepth, S::kCopiers>(
        g.a + static_cast<int64_t>(at.first + at.row) * g.a_stride + at.depth, g.a_stride, at.rows,
        left, stage);
    if constexpr (kUse == ExpertsUse::kForward) {
      copy_rows<S::kN, S::kDepth, S::kCopiers>(b + at.column * g.b_stride + at.depth, g.b_stride,
                                               at.columns, left, b_stage);
    } else {
      copy_turned<S::kN, S::kCopiers>(b + at.depth * g.b_stride + at.column, g.b_stride, at.columns,
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
  const uint64_t left = describe_tile(a + Sums<S>::row() / 64 * 64 * 64);
  const uint64_t right = describe_tile(b, 64 * 128);
  begin_products();
#pragma unroll
  for (int p = 0; p < S::kDepth / 16; ++p) {
    multiply_async<kATurned, kBTurned>(sums.of[0], left + (kATurned ? of_rows(p) : of_columns(p)),
                                       right + (kBTurned ? of_rows(p) : of_columns(p)));
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

/// Two neighbours of the bias.
__device__ __forceinline__ float2 bias_at(const float* bias, int expert, int n, int column) {
  return *reinterpret_cast<const float2*>(bias + int64_t{expert} * n + column);
}

/// The sums of a tile, with kMore a bias and what is there.
template <bool kMore, class S, ExpertsUse kUse, class C>
__device__ __forceinline__ void put(const ExpertsProduct<C>& g, const Step<S, kUse, C>& at,
                                    const Sums<S>& sums) {
  // Tiles of columns that a warp stores: of two weights the second's are the other half.
  constexpr bool kHidden = kUse == ExpertsUse::kHidden;
  constexpr int kTiles = kHidden ? S::kColumnTiles / 2 : S::kColumnTiles;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_column = at.column + (kHidden ? Sums<S>::column() / 2 : Sums<S>::column());
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
      const auto sum = [&](int tile) {
        return float2{sums.of[i / 2][tile][i % 2 * 2], sums.of[i / 2][tile][i % 2 * 2 + 1]};
      };
      const int column = first_column + 8 * j + lane % 4 * 2;
      const bool here = own < at.rows && column < g.n;
      float2 of = sum(j);
      if (kMore && here && g.bias != nullptr) {
        const float2 bias = bias_at(g.bias, at.expert, g.n, column);
        of = {of.x + bias.x, of.y + bias.y};
      }
      if constexpr (kHidden) {
        float2 up = sum(j + kTiles);
        if (kMore && here) {
          const float2 bias = bias_at(g.bias2, at.expert, g.n, column);
          up = {up.x + bias.x, up.y + bias.y};
        }
        return float2{hidden_of(of.x, up.x, g.limit), hidden_of(of.y, up.y, g.limit)};
      }
      if (kMore && here && g.accumulate) {
        float old[2];
        load_n<2>(row + column, old);
        of = {old[0] + of.x, old[1] + of.y};
      }
      return of;
    };
    if constexpr (sizeof(C) == 2 && kTiles % 4 == 0) {
#pragma unroll
      for (int j = 0; j < kTiles; j += 4) {
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
      for (int j = 0; j < kTiles; ++j) {
        const int column = first_column + 8 * j + lane % 4 * 2;
        if (own < at.rows && column < g.n) {
          const float2 of = pair(j);
          store_n<2>(row + column, {of.x, of.y});
        }
      }
    }
  }
}

}  // namespace cambium::cuda::expert_tiles
