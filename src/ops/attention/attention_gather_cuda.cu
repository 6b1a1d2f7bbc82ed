// Keys and values of segments from their pages into rows that lie together, as bf16, for kernels
// that know no pages. A block copies a tile of rows of either keys or values: it looks up where the
// rows are once, then every thread has kLoads loads of 16 bytes under way at a time. Every byte is
// read and written once.
#include "ops/attention/attention_cuda.cuh"

namespace cambium::cuda::attention {
namespace {

constexpr int kLoads = 4;

/// 16 bytes of stored numbers as bf16; those of fp8 times the factor of their row.
__device__ __forceinline__ void store_widened(const uint4& from, uint32_t /*factor*/, bf16* to,
                                              bf16 /*type*/) {
  *reinterpret_cast<uint4*>(to) = from;
}
__device__ __forceinline__ void store_widened(const uint4& from, uint32_t factor, bf16* to,
                                              f8e4m3 /*type*/) {
  const uint2 x[4] = {widen_four(from.x, factor), widen_four(from.y, factor),
                      widen_four(from.z, factor), widen_four(from.w, factor)};
  reinterpret_cast<uint4*>(to)[0] = make_uint4(x[0].x, x[0].y, x[1].x, x[1].y);
  reinterpret_cast<uint4*>(to)[1] = make_uint4(x[2].x, x[2].y, x[3].x, x[3].y);
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
  const bf16* scales = g.scales[part];
  const auto dim = static_cast<int>(from.channels);
  const int chunks = g.heads * dim / kN;  // of a row
  const int count = tile.rows * chunks;
  bf16* to = g.to[part] + int64_t{tile.to} * g.heads * dim;
  for (int first = thread; first < count; first += kLoads * kThreads) {
    uint4 x[kLoads];
    bf16 scale[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int i = first + j * kThreads;
      const int64_t row = i < count ? key_rows[i / chunks] : -1;
      x[j] = make_uint4(0, 0, 0, 0);
      scale[j] = {0};
      if (row >= 0) {
        const int at = i % chunks * kN;
        x[j] = *reinterpret_cast<const uint4*>(from.row(row, g.first_head) + at);
        if constexpr (sizeof(E) == 1) {
          scale[j] = scales[row * from.rows.inner + g.first_head + at / dim];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int i = first + j * kThreads;
      if (i < count) {
        store_widened(x[j], factor_of(scale[j]), to + int64_t{i} * kN, E{});
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
template void gather(const Gather<f8e4m3>&, const Launch&);

}  // namespace cambium::cuda::attention
