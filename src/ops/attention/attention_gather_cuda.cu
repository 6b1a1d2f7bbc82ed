// Keys and values of segments from their pages into rows that lie together, as bf16, for kernels
// that know no pages. A block copies a tile of rows of either keys or values: it looks up where the
// rows are once, then every thread has kLoads loads of 16 bytes under way at a time. Every byte is
// read and written once.
#include "ops/attention/attention_cuda.cuh"

namespace cambium::cuda::attention {
namespace {

constexpr int kLoads = 4;

/// Stored numbers as bf16, times their head's scale where they have one.
template <int N, class E>
__device__ __forceinline__ void store_widened(const Packed<N, E>& from, float scale, bf16* to) {
  if constexpr (std::is_same_v<E, bf16>) {
    *reinterpret_cast<Packed<N, E>*>(to) = from;
  } else {
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = load(&from.value[i]) * scale;
    }
    store_all<N>(to, x);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Gather<E> g) {
  constexpr int kN = 16 / sizeof(E);  // numbers of a load
  __shared__ int64_t key_rows[kGatherRows];
  await_inputs();
  const int part = static_cast<int>(blockIdx.x % 2);
  const GatherTile tile = g.tiles.items[blockIdx.x / 2];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < tile.rows) {
    key_rows[thread] =
        thread < tile.keys ? g.layout.key_row(tile.segment, tile.first + thread) : -1;
  }
  __syncthreads();
  const View<E>& from = g.from[part];
  const float* scale = g.scale[part];
  const auto dim = static_cast<int>(from.channels);
  const int chunks = g.heads * dim / kN;  // of a row
  const int count = tile.rows * chunks;
  bf16* to = g.to[part] + int64_t{tile.to} * g.heads * dim;
  for (int first = thread; first < count; first += kLoads * kThreads) {
    Packed<kN, E> x[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int i = first + j * kThreads;
      const int64_t row = i < count ? key_rows[i / chunks] : -1;
      x[j] = {};
      if (row >= 0) {
        x[j] =
            *reinterpret_cast<const Packed<kN, E>*>(from.row(row, g.first_head) + i % chunks * kN);
      }
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int i = first + j * kThreads;
      if (i < count) {
        const int head = g.first_head + i % chunks * kN / dim;
        store_widened(x[j], scale == nullptr ? 1.0F : scale[head], to + int64_t{i} * kN);
      }
    }
  }
}

}  // namespace

template <class E>
void gather(const Gather<E>& g, const Launch& on) {
  launch_ahead(on, "attention", gather_kernel<E>, dim3(static_cast<unsigned>(2 * g.tiles.count)),
               dim3(kThreads), 0, g);
}
template void gather(const Gather<bf16>&, const Launch&);

}  // namespace cambium::cuda::attention
