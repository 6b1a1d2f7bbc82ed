// More than one token goes to the matrix library, a product a head. Else blocks take a head and
// kTokens tokens, which share what they read of its weight: it is read once, by kWide numbers
// at a time where rows suit that, all that a thread needs of it on the way at once. Their sums have
// one order, whatever else is in the call.
#include "ops/cuda.cuh"
#include "ops/head_matmul/head_matmul_kernels.h"
#include "ops/matmul/side_by_side_cuda.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 8;

template <class T>
__device__ void put(const HeadMatmul<T>& a, int64_t t, int64_t h, int64_t c, float sum) {
  T* y = a.y.row(t, h) + c;
  store(y, a.accumulate ? load(y) + sum : sum);
}

/// Blocks (rows of the weight / kWarps, H, tokens / kTokens); a warp takes a row of the weight.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) plain_kernel(HeadMatmul<T> a, View<W, float> weight) {
  const int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t h = blockIdx.y;
  const int64_t first = int64_t{blockIdx.z} * kTokens;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  await_inputs();
  if (n >= a.y.channels) {
    return;
  }
  const W* row = weight.row(h, n);
  float sum[kTokens] = {};
  for (int64_t k = lane; k < a.x.channels; k += 32) {
    const float w = load(row + k);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (first + i < a.tokens()) {
        sum[i] += w * load(a.x.row(first + i, h) + k);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const float all = warp_sum(sum[i]);
    if (lane == 0 && first + i < a.tokens()) {
      put(a, first + i, h, n, all);
    }
  }
}

/// Blocks (columns of the weight / kThreads, H, tokens / kTokens); a thread takes a column.
template <class T, class W>
__global__ void __launch_bounds__(kThreads)
    transposed_kernel(HeadMatmul<T> a, View<W, float> weight) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t h = blockIdx.y;
  const int64_t first = int64_t{blockIdx.z} * kTokens;
  await_inputs();
  if (k >= a.y.channels) {
    return;
  }
  float sum[kTokens] = {};
#pragma unroll 4
  for (int64_t n = 0; n < a.x.channels; ++n) {
    const float w = load(weight.row(h, n) + k);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (first + i < a.tokens()) {
        sum[i] += w * load(a.x.row(first + i, h) + n);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (first + i < a.tokens()) {
      put(a, first + i, h, k, sum[i]);
    }
  }
}

/// Numbers of a weight's row that a thread takes together.
constexpr int kWide = 8;
/// Rows of the weight that a warp takes together, and how many pieces of each.
constexpr int kRows = 4;
constexpr int kPieces = 2;
/// Columns of a block, kWide a thread; how many threads share a column; rows that one of them takes
/// together.
constexpr int kColumns = 128;
constexpr int kShares = kThreads / (kColumns / kWide);
constexpr int kTogether = 8;

/// The row of a token, or of the last where there are fewer: what is made of it goes nowhere.
template <class T>
__device__ __forceinline__ const T* row_of(const HeadMatmul<T>& a, int64_t token, int64_t h) {
  return a.x.row(min(token, a.tokens() - 1), h);
}

/// Blocks (rows of the weight / kWarps / kRows, H, tokens / kCount); a warp takes kRows rows.
template <class T, class W, int kCount>
__global__ void __launch_bounds__(kThreads, 2)
    wide_plain_kernel(HeadMatmul<T> a, View<W, float> weight) {
  const int64_t n = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kRows;
  const int64_t h = blockIdx.y;
  const int64_t first = int64_t{blockIdx.z} * kCount;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  await_inputs();
  if (n >= a.y.channels) {
    return;
  }
  float sum[kCount][kRows] = {};
  const auto rows = static_cast<int>(min(int64_t{kRows}, a.y.channels - n));
  for (int64_t begin = lane * kWide; begin < a.x.channels; begin += 32 * kWide * kPieces) {
    float w[kPieces][kRows][kWide];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t k = begin + p * 32 * kWide;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load_all<kWide>(weight.row(h, n + min(r, rows - 1)) + (k < a.x.channels ? k : begin),
                        w[p][r]);
      }
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t k = begin + p * 32 * kWide;
      if (k < a.x.channels) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          float x[kWide];
          load_all<kWide>(row_of(a, first + i, h) + k, x);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int e = 0; e < kWide; ++e) {
              sum[i][r] += w[p][r][e] * x[e];
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i < a.tokens()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float all = warp_sum(sum[i][r]);
        if (lane == r && r < rows) {
          put(a, first + i, h, n + r, all);
        }
      }
    }
  }
}

/// Blocks (columns of the weight / kColumns, H, tokens / kCount); thread (share, columns) takes
/// every kShares-th row of kWide columns. What the shares have is added in order. (With one block a
/// multiprocessor in sight the compiler spends registers on loads under way.)
template <class T, class W, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    wide_transposed_kernel(HeadMatmul<T> a, View<W, float> weight) {
  __shared__ __align__(16) float sums[kShares][kColumns];
  const auto thread = static_cast<int>(threadIdx.x);
  const int share = thread / (kColumns / kWide);
  const int column = thread % (kColumns / kWide) * kWide;
  const int64_t begin = int64_t{blockIdx.x} * kColumns;
  const int64_t h = blockIdx.y;
  const int64_t first = int64_t{blockIdx.z} * kCount;
  await_inputs();
  float sum[kCount][kWide] = {};
  const int64_t rows = begin + column < a.y.channels ? a.x.channels : 0;
  for (int64_t from = share; from < rows; from += kShares * kTogether) {
    float w[kTogether][kWide];
    float x[kTogether][kCount];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int64_t n = from + r * kShares;
      load_all<kWide>(weight.row(h, n < rows ? n : from) + begin + column, w[r]);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[r][i] = load(row_of(a, first + i, h) + (n < rows ? n : from));
      }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float factor = from + r * kShares < rows ? x[r][i] : 0.0F;
#pragma unroll
        for (int e = 0; e < kWide; ++e) {
          sum[i][e] += w[r][e] * factor;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i < a.tokens()) {
      __syncthreads();  // the token before has been read
      store_all<kWide>(&sums[share][column], sum[i]);
      __syncthreads();
      if (thread < kColumns && begin + thread < a.y.channels) {
        float all = 0.0F;
#pragma unroll
        for (int s = 0; s < kShares; ++s) {
          all += sums[s][thread];
        }
        put(a, first + i, h, begin + thread, all);
      }
    }
  }
}

/// Blocks (columns / kThreads, rows / kTokens, H); a thread takes a column of kTokens rows.
template <class T>
__global__ void __launch_bounds__(kThreads) grad_weight_kernel(HeadMatmulGradWeight<T> a) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t first = int64_t{blockIdx.y} * kTokens;
  const int64_t h = blockIdx.z;
  if (k >= a.k.channels) {
    return;
  }
  float sum[kTokens] = {};
  for (int64_t t = 0; t < a.n.rows.outer; ++t) {
    const float x = load(a.k.row(t, h) + k);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (first + i < a.n.channels) {
        sum[i] += x * load(a.n.row(t, h) + first + i);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (first + i < a.n.channels) {
      a.out.row(h, first + i)[k] += sum[i];
    }
  }
}

template <class T, class W, int kCount>
auto wide_kernel(bool transposed) {
  return transposed ? wide_transposed_kernel<T, W, kCount> : wide_plain_kernel<T, W, kCount>;
}

template <class T, class W>
void run_product(const HeadMatmul<T>& a, const View<W, float>& weight, bool transposed,
                 const Launch& on) {
  const bool wide = aligned(View<W>{weight.data, nullptr, weight.rows, weight.channels}, kWide) &&
                    (transposed || aligned(a.x, kWide));
  const bool one = a.tokens() == 1;
  const int64_t columns =
      transposed ? (wide ? kColumns : kThreads) : (wide ? kWarps * kRows : kWarps);
  const auto plain = transposed ? transposed_kernel<T, W> : plain_kernel<T, W>;
  launch_ahead(
      on, "head_matmul",
      !wide ? plain
      : one ? wide_kernel<T, W, 1>(transposed)
            : wide_kernel<T, W, kTokens>(transposed),
      dim3(static_cast<unsigned>(ceil_div(a.y.channels, columns)), static_cast<unsigned>(a.heads()),
           static_cast<unsigned>(ceil_div(a.tokens(), kTokens))),
      dim3(kThreads), 0, a, weight);
}

/// By the library, where x and the weight are of one type; false where not.
template <class T>
bool many_tokens(const HeadMatmul<T>& a, const View<T, Sum<T>>& weight, bool transposed,
                 const Launch& on) {
  if (on.batch_invariant || a.tokens() == 1 || !weight.defined()) {
    return false;
  }
  return side_by_side(SideBySide<T>{.count = a.heads(),
                                    .m = a.tokens(),
                                    .n = a.y.channels,
                                    .k = a.x.channels,
                                    .a = a.x.data,
                                    .a_row = a.x.rows.outer_stride,
                                    .a_step = a.x.rows.inner_stride,
                                    .b = weight.data,
                                    .b_row = weight.rows.inner_stride,
                                    .b_step = weight.rows.outer_stride,
                                    .b_transposed = !transposed,
                                    .c = a.y.data,
                                    .c_row = a.y.rows.outer_stride,
                                    .c_step = a.y.rows.inner_stride,
                                    .accumulate = a.accumulate},
                      on);
}

template <class T>
void product(const HeadMatmul<T>& a, bool transposed, const Launch& on) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (many_tokens(a, a.weight.narrow, transposed, on)) {
      return;
    }
  } else if (many_tokens(a, a.weight.wide, transposed, on)) {
    return;
  }
  if (a.weight.narrow.defined()) {
    run_product(a, a.weight.narrow, transposed, on);
  } else {
    run_product(a, a.weight.wide, transposed, on);
  }
}

template <class T>
void grad_weight(const HeadMatmulGradWeight<T>& a, const Launch& on) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(a.k.channels, kThreads)),
                    static_cast<unsigned>(ceil_div(a.n.channels, kTokens)),
                    static_cast<unsigned>(a.n.rows.inner));
  launch(on, "head_matmul's gradient", grad_weight_kernel<T>, blocks, dim3(kThreads), 0, a);
}

}  // namespace

void head_matmul_forward(const HeadMatmul<float>& a, const Launch& on) {
  product(a, false, on);
}
void head_matmul_forward(const HeadMatmul<bf16>& a, const Launch& on) {
  product(a, false, on);
}
void head_matmul_transposed_forward(const HeadMatmul<float>& a, const Launch& on) {
  product(a, true, on);
}
void head_matmul_transposed_forward(const HeadMatmul<bf16>& a, const Launch& on) {
  product(a, true, on);
}
void head_matmul_grad_weight(const HeadMatmulGradWeight<float>& a, const Launch& on) {
  grad_weight(a, on);
}
void head_matmul_grad_weight(const HeadMatmulGradWeight<bf16>& a, const Launch& on) {
  grad_weight(a, on);
}

}  // namespace cambium::cuda
