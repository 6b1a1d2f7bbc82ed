// Products of experts in fp32 and of odd widths. One kernel of tiles computes all three: forward,
// gradients of rows and gradients of weights are c = a b^T with operands walked by two strides. Of
// which rows an expert has only the device knows, so the blocks of an expert walk its tiles and
// those of an expert without rows end at once. In bf16 the tiles are multiplied by tensor cores
// (mma.sync), in fp32 by fused multiply-adds. An element is summed in the order of k whatever its
// tile holds beside it, so the tiles serve the batch-invariant mode as they are.
#include <algorithm>
#include <type_traits>

#include "ops/cuda_mma.cuh"
#include "ops/experts/experts_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kTile = 64;  // rows and columns of a tile, and its depth
constexpr int kThreads = 128;

/// Element (i, p) of an operand of an expert, i a row or column of the result and p in the depth.
template <class T>
struct Operand {
  const T* data = nullptr;
  int64_t i_stride = 0, p_stride = 0;
  bool chunks = false;  // kChunk elements along the stride of 1 are aligned, there or not together

  __host__ __device__ const T* at(int64_t i, int64_t p) const {
    return data + i * i_stride + p * p_stride;
  }
  __host__ __device__ Operand from(int64_t offset) const {
    return {data + offset, i_stride, p_stride, chunks};
  }
};

/// For each expert c (m, n) = [c +] a (m, k) b (n, k)^T + bias (n).
template <class A, class B, class C>
struct GroupedProduct {
  Operand<A> a;
  Operand<B> b;
  int64_t b_expert = 0;         // elements from one expert's b to the next; rows in depth: 0
  const float* bias = nullptr;  // (E, n), or null
  C* c;
  int64_t c_stride;
  int64_t c_expert = 0;         // likewise of c; rows of c are the experts' own rows: 0
  int64_t m = 0, n = 0, k = 0;  // of one expert; m or k, 0 here, is the number of its rows
  bool rows_in_depth = false;   // k is, not m
  bool accumulate = false;
  const int32_t* start;  // (E + 1)
};

/// What a tile is multiplied in: bf16 by tensor cores, else fp32.
template <class S>
struct TileShape;
template <>
struct TileShape<bf16> {
  static constexpr int kDepth = 64;
  static constexpr int kStride = kDepth + 8;  // rows on other banks
};
template <>
struct TileShape<float> {
  static constexpr int kDepth = 32;
  static constexpr int kStride = kDepth + 1;
};

__device__ __forceinline__ void put_chunk(bf16* to, const float (&x)[kChunk], int step) {
  if (step == 1) {
    store_n<kChunk>(to, x);
    return;
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    store(to + j * step, x[j]);
  }
}
__device__ __forceinline__ void put_chunk(float* to, const float (&x)[kChunk], int step) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    to[j * step] = x[j];
  }
}

/// tile[i][p] = element (i0 + i, p0 + p), zero from (i_end, p_end) on.
template <class T, class S>
__device__ void bring(const Operand<T>& from, int64_t i0, int64_t i_end, int64_t p0, int64_t p_end,
                      S* tile) {
  constexpr int kDepth = TileShape<S>::kDepth;
  constexpr int kStride = TileShape<S>::kStride;
  const bool along_depth = from.p_stride == 1;
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kTile * kDepth / kChunk;
       chunk += kThreads) {
    const int i = along_depth ? chunk / (kDepth / kChunk) : chunk % (kTile / kChunk) * kChunk;
    const int p = along_depth ? chunk % (kDepth / kChunk) * kChunk : chunk / (kTile / kChunk);
    const int64_t left = along_depth ? p_end - p0 - p : i_end - i0 - i;
    const bool exists = along_depth ? i0 + i < i_end : p0 + p < p_end;
    const T* source = from.at(i0 + i, p0 + p);
    float x[kChunk] = {};
    if (exists && from.chunks && left >= kChunk) {
      load_all<kChunk>(source, x);
    } else if (exists) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < left) {
          x[j] = load(source + j);
        }
      }
    }
    put_chunk(tile + i * kStride + p, x, along_depth ? 1 : kStride);
  }
}

/// The part of a tile's result that a thread holds.
template <class S>
struct TileSums;

/// Four warps, each 32 x 32 of the tile.
template <>
struct TileSums<bf16> {
  float sum[2][4][4] = {};

  __device__ void multiply(const bf16* a, const bf16* b) {
    constexpr int kStride = TileShape<bf16>::kStride;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x / 32);
    const bf16* a_row = a + (warp / 2 * 32 + lane % 16) * kStride + lane / 16 * 8;
    const bf16* b_row = b + (warp % 2 * 32 + lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int p = 0; p < TileShape<bf16>::kDepth; p += 16) {
      uint32_t left[2][4];
      uint32_t right[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(left[i], a_row + i * 16 * kStride + p);
        load_matrices(right[i], b_row + i * 16 * kStride + p);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma(sum[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  /// Calls f(row, column, sum).
  template <class F>
  __device__ void each(const F& f) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          f(warp / 2 * 32 + i * 16 + lane / 4 + q / 2 * 8,
            warp % 2 * 32 + j * 8 + lane % 4 * 2 + q % 2, sum[i][j][q]);
        }
      }
    }
  }
};

/// A thread has rows of every 16th from t / 8 and columns of every 8th from t % 8.
template <>
struct TileSums<float> {
  float sum[4][8] = {};

  __device__ void multiply(const float* a, const float* b) {
    constexpr int kStride = TileShape<float>::kStride;
    const float* a_row = a + threadIdx.x / 8 * kStride;
    const float* b_row = b + threadIdx.x % 8 * kStride;
    for (int p = 0; p < TileShape<float>::kDepth; ++p) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = a_row[i * 16 * kStride + p];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float w = b_row[j * 8 * kStride + p];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i][j] = fmaf(x[i], w, sum[i][j]);
        }
      }
    }
  }

  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        f(static_cast<int>(threadIdx.x / 8) + i * 16, static_cast<int>(threadIdx.x % 8) + j * 8,
          sum[i][j]);
      }
    }
  }
};

/// Blocks (columns, walkers of tiles, experts).
template <class S, class A, class B, class C>
__global__ void __launch_bounds__(kThreads) grouped_tiles(GroupedProduct<A, B, C> g) {
  constexpr int kDepth = TileShape<S>::kDepth;
  __shared__ __align__(16) S a_tile[kTile * TileShape<S>::kStride];
  __shared__ __align__(16) S b_tile[kTile * TileShape<S>::kStride];
  await_inputs();
  const int64_t expert = blockIdx.z;
  const int64_t first = g.start[expert];
  const int64_t count = g.start[expert + 1] - first;
  const int64_t m = g.rows_in_depth ? g.m : count;
  const int64_t k = g.rows_in_depth ? count : g.k;
  const Operand<A> a = g.a.from(first * (g.rows_in_depth ? g.a.p_stride : g.a.i_stride));
  const Operand<B> b = g.b.from(expert * g.b_expert + (g.rows_in_depth ? first * g.b.p_stride : 0));
  C* c = g.c + (g.rows_in_depth ? expert * g.c_expert : first * g.c_stride);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kTile;
  for (int64_t m0 = static_cast<int64_t>(blockIdx.y) * kTile; m0 < m;
       m0 += static_cast<int64_t>(gridDim.y) * kTile) {
    TileSums<S> sums;
    for (int64_t p0 = 0; p0 < k; p0 += kDepth) {
      __syncthreads();  // the tiles are not read any more
      bring(a, m0, m, p0, k, a_tile);
      bring(b, n0, g.n, p0, k, b_tile);
      __syncthreads();
      sums.multiply(a_tile, b_tile);
    }
    sums.each([&](int i, int j, float sum) {
      if (m0 + i < m && n0 + j < g.n) {
        C* to = c + (m0 + i) * g.c_stride + n0 + j;
        sum += g.bias != nullptr ? g.bias[expert * g.n + n0 + j] : 0.0F;
        store(to, g.accumulate ? load(to) + sum : sum);
      }
    });
  }
}

template <class A, class B, class C>
void run_tiles(const GroupedProduct<A, B, C>& g, const ExpertLists& lists, const char* operation,
               const Launch& on) {
  using S = std::conditional_t<std::is_same_v<A, float>, float, bf16>;
  // Twice the blocks that even shares of the rows would need.
  const int64_t even = ceil_div(2 * lists.rows(), lists.experts * kTile);
  const int64_t walkers =
      g.rows_in_depth ? ceil_div(g.m, kTile) : std::clamp<int64_t>(even, 1, 1024);
  const dim3 blocks(static_cast<unsigned>(ceil_div(g.n, kTile)), static_cast<unsigned>(walkers),
                    static_cast<unsigned>(lists.experts));
  launch_ahead(on, operation, grouped_tiles<S, A, B, C>, blocks, kThreads, 0, g);
}

/// An operand whose rows are (i, contiguous p), and one whose rows are (p, contiguous i).
template <class T>
Operand<T> rows_of(const T* data, int64_t stride) {
  return {data, stride, 1, in_chunks(data, stride)};
}
template <class T>
Operand<T> columns_of(const T* data, int64_t stride) {
  return {data, 1, stride, in_chunks(data, stride)};
}

}  // namespace

template <class T>
void experts_by_tiles(const ExpertsMatmul<T>& a, const Launch& on) {
  const int64_t outputs = a.y.channels;
  const int64_t depth = a.x.channels;
  with_weight(a.weight, [&]<class W>(const W* weight) {
    const GroupedProduct<T, W, T> g{.a = rows_of<T>(a.x.data, a.x.rows.outer_stride),
                                    .b = rows_of(weight, depth),
                                    .b_expert = outputs * depth,
                                    .bias = a.bias.data,
                                    .c = a.y.data,
                                    .c_stride = a.y.rows.outer_stride,
                                    .n = outputs,
                                    .k = depth,
                                    .start = a.lists.start};
    run_tiles(g, a.lists, "experts_matmul", on);
  });
}
template <class T>
void experts_by_tiles(const ExpertsGradInput<T>& a, const Launch& on) {
  const int64_t outputs = a.dy.channels;
  const int64_t depth = a.out.channels;
  with_weight(a.weight, [&]<class W>(const W* weight) {
    const GroupedProduct<T, W, T> g{.a = rows_of<T>(a.dy.data, a.dy.rows.outer_stride),
                                    .b = columns_of(weight, depth),
                                    .b_expert = outputs * depth,
                                    .c = a.out.data,
                                    .c_stride = a.out.rows.outer_stride,
                                    .n = depth,
                                    .k = outputs,
                                    .accumulate = a.accumulate,
                                    .start = a.lists.start};
    run_tiles(g, a.lists, "experts_matmul's gradient", on);
  });
}
template <class T>
void experts_by_tiles(const ExpertsGradWeight<T>& a, const Launch& on) {
  const GroupedProduct<T, T, float> g{.a = columns_of<T>(a.dy.data, a.dy.rows.outer_stride),
                                      .b = columns_of<T>(a.x.data, a.x.rows.outer_stride),
                                      .c = a.out.data,
                                      .c_stride = a.x.channels,
                                      .c_expert = a.dy.channels * a.x.channels,
                                      .m = a.dy.channels,
                                      .n = a.x.channels,
                                      .rows_in_depth = true,
                                      .accumulate = a.accumulate,
                                      .start = a.lists.start};
  run_tiles(g, a.lists, "experts_matmul's gradient", on);
}

template void experts_by_tiles(const ExpertsMatmul<float>&, const Launch&);
template void experts_by_tiles(const ExpertsMatmul<bf16>&, const Launch&);
template void experts_by_tiles(const ExpertsGradInput<float>&, const Launch&);
template void experts_by_tiles(const ExpertsGradInput<bf16>&, const Launch&);
template void experts_by_tiles(const ExpertsGradWeight<float>&, const Launch&);
template void experts_by_tiles(const ExpertsGradWeight<bf16>&, const Launch&);

}  // namespace cambium::cuda
