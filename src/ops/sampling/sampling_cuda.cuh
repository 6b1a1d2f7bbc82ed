// Private to the operation on CUDA: a row of logits under one block.
#pragma once

#include "ops/cuda.cuh"
#include "ops/sampling/sampling_kernels.h"

namespace cambium::cuda {

inline constexpr int kThreads = 1024;
inline constexpr int kWarps = kThreads / 32;
inline constexpr unsigned kAll = 0xffffffffU;

using Units = unsigned long long;

/// Floats in their order as whole numbers; NaN below all.
__device__ __forceinline__ uint32_t order(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0F);  // no negative zero
  return isnan(x) ? 0 : (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ __forceinline__ float from_order(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffU : ~key);
}
__device__ __forceinline__ uint64_t listed_token(float x, int64_t i) {
  return static_cast<uint64_t>(order(x)) << 32 | static_cast<uint32_t>(~i);
}
__device__ __forceinline__ uint32_t key_of(uint64_t token) {
  return static_cast<uint32_t>(token >> 32);
}
__device__ __forceinline__ int32_t index_of(uint64_t token) {
  return static_cast<int32_t>(~static_cast<uint32_t>(token));
}

template <class N>
__device__ __forceinline__ N warp_total(N x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x += __shfl_xor_sync(kAll, x, lanes);
  }
  return x;
}
/// The sum over the block in every thread, in a fixed order; `part` (kWarps) is shared.
template <class N>
__device__ __forceinline__ N block_total(N x, N* part) {
  x = warp_total(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    part[threadIdx.x / 32] = x;
  }
  __syncthreads();
  return warp_total(part[threadIdx.x % 32]);
}
__device__ __forceinline__ uint64_t block_largest(uint64_t x, Units* part) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = max(x, __shfl_xor_sync(kAll, x, lanes));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    part[threadIdx.x / 32] = x;
  }
  __syncthreads();
  x = part[threadIdx.x % 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = max(x, __shfl_xor_sync(kAll, x, lanes));
  }
  return x;
}
/// Calls f(logit, index) for the share of `thread` of `threads` in [begin, end).
template <int V, class T, class F>
__device__ __forceinline__ void visit_row(const T* logits, int64_t begin, int64_t end, int thread,
                                          int threads, const F& f) {
  for (int64_t i = begin + static_cast<int64_t>(thread) * V; i < end;
       i += static_cast<int64_t>(threads) * V) {
    if (i + V <= end) {
      float x[V];
      load_n<V>(logits + i, x);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        f(x[v], i + v);
      }
    } else {
      for (int64_t j = i; j < end; ++j) {
        f(load(logits + j), j);
      }
    }
  }
}

/// e^(x - largest) of many x, summed in packs of eight in fp32 and then in fp64: of one thread.
struct ExpSum {
  double sum = 0.0;
  float pack = 0.0F;
  int in_pack = 0;

  __device__ __forceinline__ void add(float e) {
    pack += e;
    if (++in_pack == 8) {
      sum += static_cast<double>(pack);
      pack = 0.0F;
      in_pack = 0;
    }
  }
  __device__ __forceinline__ double total() const { return sum + static_cast<double>(pack); }
};

/// Whether rows can be read 16 bytes at a time, up to their last elements.
template <class T>
bool rows_are_packs(const View<T>& logits) {
  constexpr int kWidth = 16 / sizeof(T);
  return aligned(logits.data) && logits.rows.outer_stride % kWidth == 0 &&
         logits.rows.inner_stride % kWidth == 0;
}

}  // namespace cambium::cuda
