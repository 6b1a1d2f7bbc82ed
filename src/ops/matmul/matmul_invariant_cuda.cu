// Batch-invariant products: a row of y (M, N) = x (M, K) weight (N, K)^T has the same bits whatever
// M is.
//
// An element's sum is taken in an order that K alone decides: K is cut into kSlices slices of one
// depth, each is summed from its beginning to its end, and the sums of the slices are added in
// their order. In bf16 a slice is a chain of mma.m16n8k16, of which an element is a function of its
// row of x, its row of the weight and what was summed before, wherever in a tile it lies; in fp32 a
// chain of fused multiply-adds. The kernels differ in how they share this work out:
//
//   narrow, up to 64 rows: bound by reading the weight. Eight warps, one for each slice, take 32
//     columns, each with copies of its own under way; their sums are added in shared memory.
//   wide: a block takes a tile of rows and columns and goes through the slices one after the other.
//   tiles_fp32: the same in fp32, 16 or 64 rows a block.
#include "ops/cuda.cuh"
#include "ops/cuda_mma.cuh"
#include "ops/matmul/matmul_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kSlices = 8;
constexpr int64_t kUnit = 64;  // the depth of a slice is a multiple of it

template <class T, class Y>
struct Product {
  const T* weight;  // (n, k)
  const float* bias;
  Y* y;
  int64_t y_stride;
  int64_t n;
  int64_t first_tile;  // of columns, over all products
  bool accumulate;
  bool pairs;  // two elements of y can be written together
};

/// Products of one x.
template <class T, class Y>
struct Products {
  int64_t rows, k;
  int64_t depth;  // of a slice
  const T* x;
  int64_t x_stride;
  bool vectors;  // x and the weights can be read 16 bytes at a time
  int64_t row_tiles, column_tiles;
  int count;
  Product<T, Y> each[kMaxMatmuls];
};

constexpr int64_t depth_of(int64_t k) {
  return (k > 0 ? ceil_div(k, kSlices * kUnit) : 1) * kUnit;
}

// --- Tiles in shared memory: rows of kPieces pieces of 16 bytes without gaps. Equal pieces of
// eight rows one below the other lie in different banks.

/// Where piece `piece` of row `row` lies, in pieces.
template <int kPieces>
__device__ __forceinline__ int place_of(int row, int piece) {
  static_assert(kPieces == 4 || kPieces == 8);
  return row * kPieces + (kPieces == 8 ? piece ^ (row % 8) : piece ^ (row / 2 % 4));
}

/// Begins to copy kRows rows of kPieces pieces, `stride` apart; zeros from row `rows` and column
/// `columns` on. By threads [0, kThreads) of `thread`.
template <int kRows, int kPieces, int kThreads, class T>
__device__ __forceinline__ void copy_tile(const T* from, int64_t stride, int64_t rows,
                                          int64_t columns, bool vectors, int thread, T* to) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(T));
  constexpr int kStep = kThreads / kPieces;  // rows
  static_assert(kThreads % kPieces == 0 && kStep % 8 == 0);
  static_assert(kRows % kStep == 0 || kRows < kStep);
  const int row = thread / kPieces;
  if (kRows < kStep && row >= kRows) {
    return;
  }
  const int column = thread % kPieces * kEach;
  const auto left = static_cast<int>(min(rows, int64_t{kRows})) - row;
  const auto exist = static_cast<int>(min(columns, int64_t{kPieces * kEach})) - column;
  const T* at = from + row * stride + column;
  to += place_of<kPieces>(row, thread % kPieces) * kEach;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      const bool exists = i < left && exist > 0;
      copy_16(to + i * kPieces * kEach, exists ? at : from, exists);
      at += kStep * stride;
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kRows; i += kStep) {
    Packed<kEach, T> packed;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      packed.value[e] = i < left && e < exist ? at[e] : T{};
    }
    *reinterpret_cast<Packed<kEach, T>*>(to + i * kPieces * kEach) = packed;
    at += kStep * stride;
  }
}

/// c += x weight' over 16 columns, those of pieces `piece` and the next: kM x 16 rows of x, kN x 8
/// of the weight.
template <int kPieces, int kM, int kN>
__device__ __forceinline__ void multiply(const bf16* x, const bf16* weight, int piece,
                                         float (&c)[kM][kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t left[kM][4];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    load_matrices(left[m], x + place_of<kPieces>(16 * m + lane % 16, piece + lane / 16) * 8);
  }
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t right[4];
    load_matrices(
        right,
        weight + place_of<kPieces>(8 * n + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2) * 8);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      mma(c[m][n], left[m], right[0], right[1]);
      mma(c[m][n + 1], left[m], right[2], right[3]);
    }
  }
}

// --- Results.

/// What is stored for an element whose slices sum to `total`.
template <class T, class Y>
__device__ __forceinline__ float result(const Product<T, Y>& p, const Y* y, int64_t column,
                                        float total) {
  const float start = (p.accumulate ? load(y) : 0.0F) + (p.bias != nullptr ? p.bias[column] : 0.0F);
  return start + total;
}
template <class T, class Y>
__device__ __forceinline__ void put(const Product<T, Y>& p, int64_t row, int64_t column,
                                    float total) {
  if (column < p.n) {
    Y* y = p.y + row * p.y_stride + column;
    store(y, result(p, y, column, total));
  }
}
/// Of an even column and the next.
template <class Y>
__device__ __forceinline__ void put_pair(const Product<bf16, Y>& p, int64_t row, int64_t column,
                                         float first, float second) {
  if (!p.pairs) {
    put(p, row, column, first);
    put(p, row, column + 1, second);
  } else if (column < p.n) {
    Y* y = p.y + row * p.y_stride + column;
    const float both[2] = {result(p, y, column, first), result(p, y + 1, column + 1, second)};
    store_n(y, both);
  }
}

/// The product that has a tile of columns.
template <class T, class Y>
__device__ __forceinline__ const Product<T, Y>& product_at(const Products<T, Y>& a, int64_t tile) {
  int i = 0;
  while (i + 1 < a.count && tile >= a.each[i + 1].first_tile) {
    ++i;
  }
  return a.each[i];
}

/// The tile of a block. Blocks that run at one time take kBeside tiles of rows and as many of
/// columns as it gives, so that what they read is in L2 for the others.
struct Place {
  int64_t row, column;  // in tiles

  template <class T, class Y>
  __device__ explicit Place(const Products<T, Y>& a) {
    constexpr int64_t kBeside = 16;
    const int64_t block = blockIdx.x;
    const int64_t first = block / (kBeside * a.column_tiles) * kBeside;
    const int64_t beside = min(a.row_tiles - first, kBeside);
    const int64_t within = block - first * a.column_tiles;
    row = first + within % beside;
    column = within / beside;
  }
};

// --- Up to 64 rows in bf16.

constexpr int kNarrowColumns = 32;
constexpr int kNarrowThreads = 32 * kSlices;
constexpr int kNarrowPieces = 4;
constexpr int kSumRow = kNarrowColumns + 8;  // floats: no bank conflicts

/// kM x 16 rows at most.
template <int kM>
constexpr int kNarrowStages = kM == 1   ? 4
                              : kM == 2 ? 3
                                        : 2;
template <int kM>
constexpr int kNarrowStage = (16 * kM + kNarrowColumns) * kNarrowPieces * 8;  // elements of a warp
template <int kM>
constexpr size_t narrow_shared() {
  constexpr size_t kTiles = sizeof(bf16) * kSlices * kNarrowStages<kM> * kNarrowStage<kM>;
  constexpr size_t kSums = sizeof(float) * kSlices * 16 * kM * kSumRow;
  return kTiles > kSums ? kTiles : kSums;
}

template <int kM, class Y>
__global__ void __launch_bounds__(kNarrowThreads, 2) narrow(const Products<bf16, Y> a) {
  extern __shared__ uint4 shared[];
  constexpr int kN = kNarrowColumns / 8;
  constexpr int kStages = kNarrowStages<kM>;
  constexpr int kColumnsOfTile = kNarrowPieces * 8;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Product<bf16, Y>& p = product_at(a, blockIdx.x);
  const int64_t column = (blockIdx.x - p.first_tile) * kNarrowColumns;
  const int64_t begin = warp * a.depth;
  const int64_t depth = max(min(a.depth, a.k - begin), int64_t{0});
  // Whole units, as in the wide kernel.
  const auto tiles = static_cast<int>((depth + kUnit - 1) / kUnit * (kUnit / kColumnsOfTile));
  bf16* own = reinterpret_cast<bf16*>(shared) + warp * kStages * kNarrowStage<kM>;
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      bf16* to = own + tile % kStages * kNarrowStage<kM>;
      const int64_t k = begin + int64_t{tile} * kColumnsOfTile;
      copy_tile<kNarrowColumns, kNarrowPieces, 32>(p.weight + column * a.k + k, a.k, p.n - column,
                                                   a.k - k, a.vectors, lane, to);
      copy_tile<16 * kM, kNarrowPieces, 32>(a.x + k, a.x_stride, a.rows, a.k - k, a.vectors, lane,
                                            to + kNarrowColumns * kColumnsOfTile);
    }
    commit_copies();
  };
  float sum[kM][kN][4] = {};
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    copy(tile);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncwarp();  // the tile is here, the one before has been read
    copy(tile + kStages - 1);
    const bf16* weight = own + tile % kStages * kNarrowStage<kM>;
    const bf16* x = weight + kNarrowColumns * kColumnsOfTile;
#pragma unroll
    for (int piece = 0; piece < kNarrowPieces; piece += 2) {
      multiply<kNarrowPieces>(x, weight, piece, sum);
    }
  }
  wait_for_copies<0>();
  __syncthreads();                                // all tiles have been read
  auto* sums = reinterpret_cast<float*>(shared);  // (kSlices, 16 kM, kSumRow)
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    float* to = sums + (warp * 16 * kM + 8 * i + lane / 4) * kSumRow + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) =
          make_float2(sum[i / 2][n][i % 2 * 2], sum[i / 2][n][i % 2 * 2 + 1]);
    }
  }
  __syncthreads();
  const auto slices = static_cast<int>((a.k + a.depth - 1) / a.depth);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * kM * kNarrowColumns; i += kNarrowThreads) {
    const int row = i / kNarrowColumns;
    if (row >= a.rows) {
      break;
    }
    float total = 0.0F;
    for (int slice = 0; slice < slices; ++slice) {
      total += sums[(slice * 16 * kM + row) * kSumRow + i % kNarrowColumns];
    }
    put(p, row, column + i % kNarrowColumns, total);
  }
}

// --- Any number of rows in bf16.

/// Warps along rows and columns, each with kM x 16 rows and kN x 8 columns.
template <int kRowWarps_, int kColumnWarps_, int kM_, int kN_, int kStages_, int kBlocks_>
struct WideShape {
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_;
  static constexpr int kM = kM_, kN = kN_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kRows = 16 * kRowWarps * kM;
  static constexpr int kColumns = 8 * kColumnWarps * kN;
  static constexpr int kPieces = 8;
  static constexpr int kDepth = 8 * kPieces;                  // of a tile
  static constexpr int kStage = (kRows + kColumns) * kDepth;  // elements
  static constexpr size_t kShared = sizeof(bf16) * kStages * kStage;
};
using LargeTiles = WideShape<2, 4, 4, 4, 4, 1>;  // 128 x 128
using SmallTiles = WideShape<2, 2, 2, 4, 4, 3>;  // 64 x 64

template <class Shape, class Y>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) wide(const Products<bf16, Y> a) {
  extern __shared__ uint4 shared[];
  static_assert(Shape::kDepth == kUnit);
  constexpr int kM = Shape::kM;
  constexpr int kN = Shape::kN;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_row = thread / 32 / Shape::kColumnWarps * kM * 16;
  const int warp_column = thread / 32 % Shape::kColumnWarps * kN * 8;
  const Place place(a);
  const Product<bf16, Y>& p = product_at(a, place.column);
  const int64_t first_row = place.row * Shape::kRows;
  const int64_t first_column = (place.column - p.first_tile) * Shape::kColumns;
  const bf16* x_rows = a.x + first_row * a.x_stride;
  const bf16* weight_rows = p.weight + first_column * a.k;
  auto* stages = reinterpret_cast<bf16*>(shared);
  const auto tiles = static_cast<int>((a.k + kUnit - 1) / kUnit);
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      bf16* to = stages + tile % Shape::kStages * Shape::kStage;
      const int64_t k = tile * kUnit;
      copy_tile<Shape::kRows, Shape::kPieces, Shape::kThreads>(
          x_rows + k, a.x_stride, a.rows - first_row, a.k - k, a.vectors, thread, to);
      copy_tile<Shape::kColumns, Shape::kPieces, Shape::kThreads>(
          weight_rows + k, a.k, p.n - first_column, a.k - k, a.vectors, thread,
          to + Shape::kRows * Shape::kDepth);
    }
    commit_copies();
  };
#pragma unroll
  for (int tile = 0; tile < Shape::kStages - 1; ++tile) {
    copy(tile);
  }
  float total[kM][kN][4] = {};
  float sum[kM][kN][4] = {};  // of the slice in hand
  const auto tiles_of_slice = static_cast<int>(a.depth / kUnit);
  int left = tiles_of_slice;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();  // the tile is here, the one before has been read
    copy(tile + Shape::kStages - 1);
    const bf16* x = stages + tile % Shape::kStages * Shape::kStage;
    const bf16* weight = x + Shape::kRows * Shape::kDepth;
#pragma unroll
    for (int piece = 0; piece < Shape::kPieces; piece += 2) {
      multiply<Shape::kPieces>(x + warp_row * Shape::kDepth, weight + warp_column * Shape::kDepth,
                               piece, sum);
    }
    if (--left == 0 || tile + 1 == tiles) {
      left = tiles_of_slice;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            total[m][n][e] += sum[m][n][e];
            sum[m][n][e] = 0.0F;
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int64_t row = first_row + warp_row + 8 * i + lane / 4;
    if (row < a.rows) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        put_pair(p, row, first_column + warp_column + 8 * n + lane % 4 * 2,
                 total[i / 2][n][i % 2 * 2], total[i / 2][n][i % 2 * 2 + 1]);
      }
    }
  }
}

// --- fp32. Thread (ty, tx) of 16 x 16 has rows ty kR + i and columns tx + 16 j of a tile.

constexpr int kFp32Threads = 256;
constexpr int kFp32Columns = 64;
constexpr int kFp32Pieces = 8;
constexpr int kFp32Depth = 4 * kFp32Pieces;  // of a tile
constexpr int kFp32Stages = 4;
template <int kR>
constexpr int kFp32Stage = (16 * kR + kFp32Columns) * kFp32Depth;  // elements

template <int kR>
__global__ void __launch_bounds__(kFp32Threads, 2) tiles_fp32(const Products<float, float> a) {
  extern __shared__ uint4 shared[];
  constexpr int kRows = 16 * kR;
  constexpr int kC = kFp32Columns / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int ty = thread / 16;
  const int tx = thread % 16;
  const Place place(a);
  const Product<float, float>& p = product_at(a, place.column);
  const int64_t first_row = place.row * kRows;
  const int64_t first_column = (place.column - p.first_tile) * kFp32Columns;
  const float* x_rows = a.x + first_row * a.x_stride;
  const float* weight_rows = p.weight + first_column * a.k;
  auto* stages = reinterpret_cast<float*>(shared);
  const auto tiles = static_cast<int>((a.k + kFp32Depth - 1) / kFp32Depth);
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      float* to = stages + tile % kFp32Stages * kFp32Stage<kR>;
      const int64_t k = int64_t{tile} * kFp32Depth;
      copy_tile<kRows, kFp32Pieces, kFp32Threads>(x_rows + k, a.x_stride, a.rows - first_row,
                                                  a.k - k, a.vectors, thread, to);
      copy_tile<kFp32Columns, kFp32Pieces, kFp32Threads>(weight_rows + k, a.k, p.n - first_column,
                                                         a.k - k, a.vectors, thread,
                                                         to + kRows * kFp32Depth);
    }
    commit_copies();
  };
#pragma unroll
  for (int tile = 0; tile < kFp32Stages - 1; ++tile) {
    copy(tile);
  }
  float total[kR][kC] = {};
  float sum[kR][kC] = {};  // of the slice in hand
  const auto tiles_of_slice = static_cast<int>(a.depth / kFp32Depth);
  int left = tiles_of_slice;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<kFp32Stages - 2>();
    __syncthreads();  // the tile is here, the one before has been read
    copy(tile + kFp32Stages - 1);
    const float* x = stages + tile % kFp32Stages * kFp32Stage<kR>;
    const float* weight = x + kRows * kFp32Depth;
#pragma unroll 2
    for (int piece = 0; piece < kFp32Pieces; ++piece) {
      float4 w[kC];
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        w[j] = *reinterpret_cast<const float4*>(weight +
                                                place_of<kFp32Pieces>(tx + 16 * j, piece) * 4);
      }
#pragma unroll
      for (int i = 0; i < kR; ++i) {
        const float4 v =
            *reinterpret_cast<const float4*>(x + place_of<kFp32Pieces>(ty * kR + i, piece) * 4);
#pragma unroll
        for (int j = 0; j < kC; ++j) {
          sum[i][j] = fmaf(v.x, w[j].x, sum[i][j]);
          sum[i][j] = fmaf(v.y, w[j].y, sum[i][j]);
          sum[i][j] = fmaf(v.z, w[j].z, sum[i][j]);
          sum[i][j] = fmaf(v.w, w[j].w, sum[i][j]);
        }
      }
    }
    if (--left == 0 || tile + 1 == tiles) {
      left = tiles_of_slice;
#pragma unroll
      for (int i = 0; i < kR; ++i) {
#pragma unroll
        for (int j = 0; j < kC; ++j) {
          total[i][j] += sum[i][j];
          sum[i][j] = 0.0F;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kR; ++i) {
    const int64_t row = first_row + ty * kR + i;
    if (row < a.rows) {
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        put(p, row, first_column + tx + 16 * j, total[i][j]);
      }
    }
  }
}

// --- The host's side.

template <class T, class Y>
Products<T, Y> products_of(const MatmulsTo<T, Y>& all, const Launch& on) {
  constexpr int64_t kEach = 16 / static_cast<int64_t>(sizeof(T));
  const MatmulTo<T, Y>& first = all.each[0];
  Products<T, Y> a{};
  a.rows = first.x.count();
  a.k = first.weight.inputs();
  a.depth = depth_of(a.k);
  a.x = first.x.data;
  a.x_stride = first.x.rows.outer_stride;
  a.vectors = aligned(a.x) && a.k % kEach == 0 && (a.rows == 1 || a.x_stride % kEach == 0);
  a.count = static_cast<int>(all.count);
  for (int i = 0; i < a.count; ++i) {
    const MatmulTo<T, Y>& p = all.each[i];
    const T* weight = weight_as(p.weight, on);
    const int64_t stride = p.y.rows.outer_stride;
    a.each[i] = {weight,
                 p.bias.data,
                 p.y.data,
                 stride,
                 p.y.channels,
                 0,
                 p.accumulate,
                 aligned(p.y.data, 2 * sizeof(Y)) && p.y.channels % 2 == 0 &&
                     (a.rows == 1 || stride % 2 == 0)};
    a.vectors = a.vectors && aligned(weight);
  }
  return a;
}

/// Cuts the work into tiles; returns how many there are.
template <class T, class Y>
int64_t cut(Products<T, Y>& a, int64_t rows, int64_t columns) {
  a.row_tiles = ceil_div(a.rows, rows);
  a.column_tiles = 0;
  for (int i = 0; i < a.count; ++i) {
    a.each[i].first_tile = a.column_tiles;
    a.column_tiles += ceil_div(a.each[i].n, columns);
  }
  return a.row_tiles * a.column_tiles;
}

template <int kM, class Y>
void run_narrow(Products<bf16, Y>& a, const Launch& on) {
  launch(on, "matmul", narrow<kM, Y>, static_cast<unsigned>(cut(a, 16 * kM, kNarrowColumns)),
         kNarrowThreads, narrow_shared<kM>(), a);
}
template <class Shape, class Y>
void run_wide(Products<bf16, Y>& a, const Launch& on) {
  launch(on, "matmul", wide<Shape, Y>, static_cast<unsigned>(cut(a, Shape::kRows, Shape::kColumns)),
         Shape::kThreads, Shape::kShared, a);
}
template <int kR>
void run_fp32(Products<float, float>& a, const Launch& on) {
  launch(on, "matmul", tiles_fp32<kR>, static_cast<unsigned>(cut(a, 16 * kR, kFp32Columns)),
         kFp32Threads, sizeof(float) * kFp32Stages * kFp32Stage<kR>, a);
}

void run(Products<float, float>& a, const Launch& on) {
  a.rows <= 16 ? run_fp32<1>(a, on) : run_fp32<4>(a, on);
}
template <class Y>
void run(Products<bf16, Y>& a, const Launch& on) {
  constexpr int64_t kFull = 96;  // large tiles that are worth it: most multiprocessors have one
  if (a.rows <= 16) {
    run_narrow<1>(a, on);
  } else if (a.rows <= 32) {
    run_narrow<2>(a, on);
  } else if (a.rows <= 64) {
    run_narrow<4>(a, on);
  } else if (LargeTiles::kShared <= most_shared() &&
             cut(a, LargeTiles::kRows, LargeTiles::kColumns) >= kFull) {
    run_wide<LargeTiles>(a, on);
  } else {
    run_wide<SmallTiles>(a, on);
  }
}

}  // namespace

template <class T, class Y>
void batch_invariant_products(const MatmulsTo<T, Y>& all, const Launch& on) {
  if (all.each[0].x.count() > 0) {
    Products<T, Y> a = products_of(all, on);
    run(a, on);
  }
}
template void batch_invariant_products(const Matmuls<float>&, const Launch&);
template void batch_invariant_products(const Matmuls<bf16>&, const Launch&);
template void batch_invariant_products(const UnroundedMatmuls<bf16>&, const Launch&);

}  // namespace cambium::cuda
