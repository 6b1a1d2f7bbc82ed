// Products beside cuBLASLt: one to four rows (memory-bound: every weight is read once, 16 bytes a
// lane, a warp for two rows of the weight, x in shared memory in fp32), the sums of a bias's
// gradient, and a plain product for what the library has no algorithm for.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ops/cuda.cuh"
#include "ops/matmul/matmul_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsOfWarp = 2;

template <class T, class W, class Y>
struct FewRows {
  int64_t count;
  int64_t k;
  const T* x;
  int64_t x_stride;
  int64_t groups;  // of kRowsOfWarp rows, over all products
  // Of each product: the weight, its rows, and its first group.
  struct {
    const W* weight;
    const float* bias;
    Y* y;
    int64_t y_stride;
    int64_t n;
    int64_t first_group;
    bool accumulate;
  } each[kMaxMatmuls];
};

/// Loads 16 bytes of a weight, which nobody reads again.
template <int N, class W>
__device__ __forceinline__ Packed<N, W> load_once(const W* p) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
  Packed<N, W> packed;
  memcpy(&packed, &raw, sizeof(raw));
  return packed;
}

// Blocks stay until all rows are done: x is brought to shared memory once a block, not once for
// every few rows.
template <int kM, class T, class W, class Y>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(const FewRows<T, W, Y> a) {
  constexpr int kVector = 16 / sizeof(W);
  constexpr int kFactors = kVector < static_cast<int>(16 / sizeof(T)) ? kVector : 16 / sizeof(T);
  constexpr int kUnroll = 4;
  constexpr int kStep = 32 * kVector;  // columns of a warp's load
  extern __shared__ uint4 shared[];
  T* x = reinterpret_cast<T*>(shared);  // (kM, k)
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  await_inputs();
  for (int64_t i = threadIdx.x; i < a.k; i += kThreads) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      x[m * a.k + i] = a.x[m * a.x_stride + i];
    }
  }
  __syncthreads();
  int product = 0;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + warp; group < a.groups;
       group += static_cast<int64_t>(gridDim.x) * kWarps) {
    while (product + 1 < a.count && group >= a.each[product + 1].first_group) {
      ++product;
    }
    const auto& p = a.each[product];
    const int64_t first = (group - p.first_group) * kRowsOfWarp;
    const W* row[kRowsOfWarp];
    float sum[kRowsOfWarp][kM] = {};
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      row[r] = p.weight + (first + r < p.n ? first + r : p.n - 1) * a.k;
    }
    const auto add = [&](const Packed<kVector, W>(&w)[kRowsOfWarp], int64_t c) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        float wide[kVector];
#pragma unroll
        for (int q = 0; q < kVector; q += kFactors) {
          float part[kFactors];
          load_n(x + m * a.k + c + q, part);
#pragma unroll
          for (int i = 0; i < kFactors; ++i) {
            wide[q + i] = part[i];
          }
        }
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) {
#pragma unroll
          for (int q = 0; q < kVector; ++q) {
            sum[r][m] += load(&w[r].value[q]) * wide[q];
          }
        }
      }
    };
    int64_t c = lane * kVector;
    for (; c + (kUnroll - 1) * kStep < a.k; c += kUnroll * kStep) {
      Packed<kVector, W> w[kUnroll][kRowsOfWarp];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) {
          w[u][r] = load_once<kVector>(row[r] + c + u * kStep);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        add(w[u], c + u * kStep);
      }
    }
    for (; c < a.k; c += kStep) {
      Packed<kVector, W> w[kRowsOfWarp];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        w[r] = load_once<kVector>(row[r] + c);
      }
      add(w, c);
    }
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float total = warp_sum(sum[r][m]);
        if (lane == 0 && first + r < p.n) {
          Y* y = p.y + m * p.y_stride + first + r;
          const float start =
              (p.accumulate ? load(y) : 0.0F) + (p.bias != nullptr ? p.bias[first + r] : 0.0F);
          store(y, start + total);
        }
      }
    }
  }
}

/// Most shared memory x may take: two blocks of it fit on a multiprocessor of sm_90.
constexpr size_t kSharedBytes = 112 * 1024;

template <class T, class W, class Y>
void launch_few_rows(const FewRows<T, W, Y>& a, int64_t rows, const Launch& on) {
  const auto shared = static_cast<size_t>(rows * a.k) * sizeof(T);
  const auto with = [&](auto kernel) {
    const int64_t blocks = ceil_div(a.groups, kWarps);
    const int64_t resident = resident_blocks(kernel, kThreads, shared);
    const dim3 grid(static_cast<unsigned>(blocks < resident ? blocks : resident));
    // What takes long does not go ahead: beside what is left of the kernel before, blocks come to
    // lie unevenly (measured 10 % slower).
    if (2 * blocks > resident) {
      launch(on, "matmul", kernel, grid, dim3(kThreads), shared, a);
    } else {
      launch_ahead(on, "matmul", kernel, grid, dim3(kThreads), shared, a);
    }
  };
  switch (rows) {
    case 1:
      return with(few_rows_kernel<1, T, W, Y>);
    case 2:
      return with(few_rows_kernel<2, T, W, Y>);
    case 3:
      return with(few_rows_kernel<3, T, W, Y>);
    default:
      return with(few_rows_kernel<4, T, W, Y>);
  }
}

template <class W, class T>
const W* elements(const MatmulWeight<T>& weight) {
  if constexpr (std::is_same_v<W, bf16>) {
    return weight.narrow.data;
  } else {
    return weight.wide.data;
  }
}

template <class W, class T, class Y>
bool few_rows_of(const MatmulsTo<T, Y>& all, const Launch& on) {
  const MatmulTo<T, Y>& first = all.each[0];
  FewRows<T, W, Y> a{};
  a.count = all.count;
  a.k = first.weight.inputs();
  a.x = first.x.data;
  a.x_stride = first.x.rows.outer_stride;
  const int64_t unit = 16 / static_cast<int64_t>(sizeof(W) < sizeof(T) ? sizeof(W) : sizeof(T));
  if (a.k % unit != 0 || static_cast<size_t>(first.x.count() * a.k) * sizeof(T) >
                             std::min(kSharedBytes, most_shared())) {
    return false;
  }
  for (int64_t i = 0; i < all.count; ++i) {
    const MatmulTo<T, Y>& p = all.each[i];
    const W* weight = elements<W>(p.weight);
    if (weight == nullptr || reinterpret_cast<uintptr_t>(weight) % 16 != 0) {
      return false;
    }
    a.each[i] = {weight,       p.bias.data, p.y.data,    p.y.rows.outer_stride,
                 p.y.channels, a.groups,    p.accumulate};
    a.groups += ceil_div(p.y.channels, kRowsOfWarp);
  }
  launch_few_rows(a, first.x.count(), on);
  return true;
}

template <class To, class From>
__global__ void convert(To* to, const From* from, int64_t count) {
  constexpr int kEach = 8;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
  if (i + kEach <= count) {
    float value[kEach];
#pragma unroll
    for (int part = 0; part < kEach; part += 4) {
      float four[4];
      load_n(from + i + part, four);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        value[part + q] = four[q];
      }
    }
#pragma unroll
    for (int part = 0; part < kEach; part += 4) {
      const float four[4] = {value[part], value[part + 1], value[part + 2], value[part + 3]};
      store_n(to + i + part, four);
    }
  } else {
    for (int64_t j = i; j < count; ++j) {
      store(to + j, load(from + j));
    }
  }
}

// A thread for each element: of addresses that cannot be read 16 bytes at a time.
template <class To, class From>
__global__ void convert_each(To* to, const From* from, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    store(to + i, load(from + i));
  }
}

// A thread for each element of c.
template <class In, class Out>
__global__ void plain(PlainProduct<In, Out> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.m * p.n) {
    return;
  }
  const int64_t row = i / p.n;
  const int64_t column = i % p.n;
  float sum = 0.0F;
  for (int64_t k = 0; k < p.k; ++k) {
    sum +=
        load(p.a + row * p.a_row + k * p.a_column) * load(p.b + k * p.b_row + column * p.b_column);
  }
  Out* c = p.c + row * p.c_row + column;
  store(c, (p.accumulate ? load(c) : 0.0F) + sum);
}

// A thread for V neighbouring columns of a row.
template <class T, int V>
__global__ void bias_rows(View<T> y, const float* bias) {
  const int64_t packs = y.channels / V;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  await_inputs();
  if (i < y.count() * packs) {
    const int64_t c = i % packs * V;
    T* to = y.row(i / packs) + c;
    float sum[V];
    float added[V];
    load_n<V>(to, sum);
    load_all<V>(bias + c, added);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v] += added[v];
    }
    store_n<V>(to, sum);
  }
}

// Block (c, part): the sums of a range of rows over 32 columns; then the parts, in order.
constexpr int kBiasColumns = 32;
constexpr int kBiasLanes = kThreads / kBiasColumns;
template <class T>
__global__ void bias_parts(View<T> dy, int64_t rows_of_part, int64_t column_blocks, float* part) {
  __shared__ float lanes[kBiasLanes][kBiasColumns];
  const int64_t block = blockIdx.x;
  const int64_t c = block % column_blocks * kBiasColumns + threadIdx.x % kBiasColumns;
  const int64_t lane = threadIdx.x / kBiasColumns;
  const int64_t begin = block / column_blocks * rows_of_part;
  const int64_t end = begin + rows_of_part < dy.count() ? begin + rows_of_part : dy.count();
  float sum = 0.0F;
  for (int64_t r = begin + lane; c < dy.channels && r < end; r += kBiasLanes) {
    sum += load(dy.row(r) + c);
  }
  lanes[lane][threadIdx.x % kBiasColumns] = sum;
  __syncthreads();
  if (lane == 0 && c < dy.channels) {
    for (int i = 1; i < kBiasLanes; ++i) {
      sum += lanes[i][threadIdx.x];
    }
    part[block / column_blocks * dy.channels + c] = sum;
  }
}
__global__ void bias_sums(const float* part, int64_t parts, int64_t channels, float* out) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c < channels) {
    float sum = 0.0F;
    for (int64_t p = 0; p < parts; ++p) {
      sum += part[p * channels + c];
    }
    out[c] += sum;
  }
}

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(ceil_div(count, kThreads));
}

template <class T>
void grad_bias(const MatmulGradBias<T>& a, const Launch& on) {
  constexpr int64_t kRowsOfPart = 256;
  const int64_t parts = ceil_div(a.dy.count(), kRowsOfPart);
  const int64_t columns = ceil_div(a.dy.channels, kBiasColumns);
  auto* part = scratch<float>(on, parts * a.dy.channels);
  launch(on, "matmul's bias gradient", bias_parts<T>, dim3(static_cast<unsigned>(parts * columns)),
         dim3(kThreads), 0, a.dy, kRowsOfPart, columns, part);
  launch(on, "matmul's bias gradient", bias_sums, dim3(blocks_for(a.dy.channels)), dim3(kThreads),
         0, part, parts, a.dy.channels, a.out);
}

}  // namespace

template <class T, class Y>
bool few_rows(const MatmulsTo<T, Y>& all, const Launch& on) {
  const MatmulTo<T, Y>& first = all.each[0];
  if (first.x.count() == 0 || first.x.channels == 0) {
    return false;
  }
  if constexpr (sizeof(T) == sizeof(bf16)) {
    if (first.x.count() <= kStreamedRows && stream_rows(all, on)) {
      return true;
    }
  }
  if (first.x.count() > kFewRows) {
    return false;
  }
  return first.weight.narrow.defined() ? few_rows_of<bf16>(all, on) : few_rows_of<float>(all, on);
}
template bool few_rows(const Matmuls<float>&, const Launch&);
template bool few_rows(const Matmuls<bf16>&, const Launch&);
template bool few_rows(const UnroundedMatmuls<bf16>&, const Launch&);

template <class T>
const T* weight_as(const MatmulWeight<T>& weight, const Launch& on) {
  const T* own = elements<T>(weight);
  if (own != nullptr) {
    return own;
  }
  using Other = std::conditional_t<std::is_same_v<T, float>, bf16, float>;
  const Other* from = elements<Other>(weight);
  const int64_t count = weight.narrow.defined() ? weight.narrow.count() * weight.narrow.channels
                                                : weight.wide.count() * weight.wide.channels;
  T* to = scratch<T>(on, count);
  const bool vectors = aligned(from);
  launch(on, "matmul's weight", vectors ? convert<T, Other> : convert_each<T, Other>,
         dim3(blocks_for(vectors ? ceil_div(count, 8) : count)), dim3(kThreads), 0, to, from,
         count);
  return to;
}
template const float* weight_as(const MatmulWeight<float>&, const Launch&);
template const bf16* weight_as(const MatmulWeight<bf16>&, const Launch&);

template <class In, class Out>
void plain_product(const PlainProduct<In, Out>& p, const Launch& on) {
  launch(on, "matmul", plain<In, Out>, dim3(blocks_for(p.m * p.n)), dim3(kThreads), 0, p);
}
template void plain_product(const PlainProduct<float, float>&, const Launch&);
template void plain_product(const PlainProduct<bf16, bf16>&, const Launch&);
template void plain_product(const PlainProduct<bf16, float>&, const Launch&);

template <class T>
void add_bias(const View<T>& y, const float* bias, const Launch& on) {
  constexpr int kWide = 16 / sizeof(T);
  const bool packs = y.channels % kWide == 0 && y.rows.outer_stride % kWide == 0 &&
                     (y.rows.inner == 1 || y.rows.inner_stride % kWide == 0) && aligned(y.data) &&
                     aligned(bias);
  launch_ahead(on, "matmul's bias", packs ? bias_rows<T, kWide> : bias_rows<T, 1>,
               dim3(blocks_for(y.count() * y.channels / (packs ? kWide : 1))), dim3(kThreads), 0, y,
               bias);
}
template void add_bias(const View<float>&, const float*, const Launch&);
template void add_bias(const View<bf16>&, const float*, const Launch&);

void matmul_grad_bias(const MatmulGradBias<float>& a, const Launch& on) {
  grad_bias(a, on);
}
void matmul_grad_bias(const MatmulGradBias<bf16>& a, const Launch& on) {
  grad_bias(a, on);
}

}  // namespace cambium::cuda
