// What CUDA kernels share: loads and stores in fp32, sums in a fixed order, launches that name what
// failed, segments on the device. Included by *_cuda.cu only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <utility>

#include "ops/cuda_launch.h"
#include "ops/kernel.h"
#include "ops/segment_walk.h"
#include "ops/shared_limit.h"
#include "tensor/dtype.h"
#include "tensor/view.h"
#include "tensor/work_recorder.h"

namespace cambium::cuda {

// --- Elements. Everything is computed in fp32; bf16 is rounded to nearest even on the way out.
__device__ __forceinline__ float load(const float* p) {
  return *p;
}
__device__ __forceinline__ float load(const bf16* p) {
  return __uint_as_float(static_cast<uint32_t>(p->bits) << 16);
}
__device__ __forceinline__ void store(float* p, float value) {
  *p = value;
}
__device__ __forceinline__ void store(bf16* p, float value) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
/// *p += value
template <class T>
__device__ __forceinline__ void add_to(T* p, float value) {
  store(p, load(p) + value);
}

/// N consecutive elements as one access where N * sizeof(T) is 4, 8 or 16 bytes; p is aligned to
/// it.
template <int N, class T>
struct alignas(N * sizeof(T)) Packed {
  T value[N];
};
template <int N, class T>
__device__ __forceinline__ void load_n(const T* p, float (&out)[N]) {
  const auto packed = *reinterpret_cast<const Packed<N, T>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    out[i] = load(&packed.value[i]);
  }
}
template <int N, class T>
__device__ __forceinline__ void store_n(T* p, const float (&in)[N]) {
  Packed<N, T> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    store(&packed.value[i], in[i]);
  }
  *reinterpret_cast<Packed<N, T>*>(p) = packed;
}

/// N elements, 16 bytes at a time.
template <int N, class T>
__device__ __forceinline__ void load_all(const T* p, float (&out)[N]) {
  constexpr int kStep = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    float part[kStep];
    load_n<kStep>(p + i, part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      out[i + j] = part[j];
    }
  }
}
template <int N, class T>
__device__ __forceinline__ void store_all(T* p, const float (&in)[N]) {
  constexpr int kStep = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    float part[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      part[j] = in[i + j];
    }
    store_n<kStep>(p + i, part);
  }
}

// --- Sums in a fixed order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x += __shfl_xor_sync(0xffffffffU, x, lanes);
  }
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, lanes));
  }
  return x;
}
/// The sum over a block of kThreads (a multiple of 32), in every thread. All threads call.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ float part[kThreads / 32];
  x = warp_sum(x);
  __syncthreads();  // the array may still be read from an earlier call
  if (threadIdx.x % 32 == 0) {
    part[threadIdx.x / 32] = x;
  }
  __syncthreads();
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    sum += part[i];
  }
  return sum;
}
template <int kThreads>
__device__ __forceinline__ float block_max(float x) {
  __shared__ float part[kThreads / 32];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    part[threadIdx.x / 32] = x;
  }
  __syncthreads();
  float largest = part[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) {
    largest = fmaxf(largest, part[i]);
  }
  return largest;
}

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0F / (1.0F + expf(-x));
}
/// The sigmoid that activations of T take: for bf16 the fast exponential and quotient do, which are
/// exact to a few units of fp32's last place.
template <class T>
__device__ __forceinline__ float sigmoid_of(float x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(1.0F, 1.0F + __expf(-x));
  } else {
    return sigmoid(x);
  }
}
template <class T>
__device__ __forceinline__ float silu_of(float x) {
  return x * sigmoid_of<T>(x);
}
template <class T>
__device__ __forceinline__ float silu_grad_of(float x) {
  const float s = sigmoid_of<T>(x);
  return s * (1.0F + x * (1.0F - s));
}

// --- Launches.
inline bool aligned(const void* p, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}
/// Whether every row of a view, and of its gradient, can be taken `width` elements at a time, which
/// are 16 bytes unless said otherwise.
template <class T>
bool aligned(const View<T>& v, int64_t width = 16 / sizeof(T)) {
  const size_t bytes = static_cast<size_t>(width) * sizeof(T);
  return aligned(v.data, bytes < 16 ? bytes : 16) && aligned(v.grad, bytes < 16 ? bytes : 16) &&
         v.channels % width == 0 && v.rows.outer_stride % width == 0 &&
         (v.rows.inner == 1 || v.rows.inner_stride % width == 0);
}

/// Begins a kernel that launch_ahead() launches: what the kernels before it wrote may be read, and
/// memory they used may be written, only after this. (What no kernel of the forward call writes,
/// such as weights, may be read before.) The kernel after it may then be brought to the device.
__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class N>
constexpr int64_t ceil_div(N n, int64_t by) {
  return (static_cast<int64_t>(n) + by - 1) / by;
}

/// Lets the kernel have `shared` bytes of dynamic shared memory.
template <class... Params>
void allow_shared(const char* operation, void (*kernel)(Params...), dim3 blocks, dim3 threads,
                  size_t shared) {
  if (shared > kSharedOfAll) {
    // What the kernel has besides is at most that, and asked for where it could be too much.
    size_t own = 0;
    if (shared + kSharedOfAll > most_shared()) {
      cudaFuncAttributes attributes{};
      check_launch(operation, {blocks.x, blocks.y, blocks.z}, {threads.x, threads.y, threads.z},
                   shared, cudaFuncGetAttributes(&attributes, kernel));
      own = attributes.sharedSizeBytes;
    }
    check_shared(operation, shared + own);
    check_launch(operation, {blocks.x, blocks.y, blocks.z}, {threads.x, threads.y, threads.z},
                 shared,
                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared)));
  }
}

/// Tells a recorder of the launch; true: it is not to be made.
template <class... Params>
bool only_compared(const Launch& on, void (*kernel)(Params...), dim3 blocks, dim3 threads,
                   size_t shared, const Params&... args) {
  WorkRecorder* recorder = on.recorder;
  if (recorder == nullptr || !recorder->notes()) {
    return false;
  }
  const uint64_t head[] = {reinterpret_cast<uint64_t>(kernel),      blocks.x,
                           (uint64_t{blocks.y} << 32) | blocks.z,   threads.x,
                           (uint64_t{threads.y} << 32) | threads.z, shared};
  recorder->add(head, sizeof(head));
  (recorder->add_value(args), ...);
  return recorder->compares();
}

/// Launches kernel<<<blocks, threads, shared, stream>>>(args...). Does nothing for no blocks. A
/// launch that fails is an Error that names `operation` and the sizes given to it.
template <class... Params, class... Args>
void launch(const Launch& on, const char* operation, void (*kernel)(Params...), dim3 blocks,
            dim3 threads, size_t shared, Args&&... args) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) {
    return;
  }
  if (only_compared<Params...>(on, kernel, blocks, threads, shared, Params(args)...)) {
    return;
  }
  allow_shared(operation, kernel, blocks, threads, shared);
  kernel<<<blocks, threads, shared, on.stream>>>(std::forward<Args>(args)...);
  check_launch(operation, {blocks.x, blocks.y, blocks.z}, {threads.x, threads.y, threads.z}, shared,
               cudaGetLastError());
}

/// The same for a kernel that begins with await_inputs(): where the device can (sm_90), it is
/// brought there while the kernel before it still runs, which hides what a launch costs.
template <class... Params, class... Args>
void launch_ahead(const Launch& on, const char* operation, void (*kernel)(Params...), dim3 blocks,
                  dim3 threads, size_t shared, Args&&... args) {
  if (!launches_ahead()) {
    return launch(on, operation, kernel, blocks, threads, shared, std::forward<Args>(args)...);
  }
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) {
    return;
  }
  if (only_compared<Params...>(on, kernel, blocks, threads, shared, Params(args)...)) {
    return;
  }
  allow_shared(operation, kernel, blocks, threads, shared);
  cudaLaunchAttribute ahead{};
  ahead.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  ahead.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = on.stream;
  config.attrs = &ahead;
  config.numAttrs = 1;
  check_launch(operation, {blocks.x, blocks.y, blocks.z}, {threads.x, threads.y, threads.z}, shared,
               cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...));
}

/// How many blocks of the kernel the device holds at once. The driver is asked once for each
/// device, kernel and size.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, size_t shared) {
  thread_local std::map<std::tuple<int, Kernel, int, size_t>, int64_t> known;
  int device = 0;
  cudaGetDevice(&device);
  const auto [at, is_new] = known.try_emplace({device, kernel, threads, shared}, 0);
  if (!is_new) {
    return at->second;
  }
  if (shared > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared));
  }
  int multiprocessors = 1;
  int blocks = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
  at->second = static_cast<int64_t>(multiprocessors) * (blocks > 0 ? blocks : 1);
  return at->second;
}

/// Scratch memory of the device for `count` elements, until the kernel's host function returns
/// (work queued later runs after it).
template <class T>
T* scratch(const Launch& on, int64_t count) {
  return static_cast<T*>(on.scratch(count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace cambium::cuda
