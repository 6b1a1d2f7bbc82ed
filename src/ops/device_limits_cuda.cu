#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <map>

#include "ops/cuda_launch.h"
#include "ops/cuda_warpgroup.cuh"
#include "ops/shared_limit.h"

namespace cambium::cuda {
namespace {

// All kernels are compiled for the same devices, and this one tells by its threads what the code
// that the driver took for the current device was compiled for.
enum ProbeThreads { kOfSm80 = 32, kOfSm90 = 64, kOfWarpgroups = 128 };
#if __CUDA_ARCH__ >= 900
constexpr int kThreads = kWarpgroups ? kOfWarpgroups : kOfSm90;
#else
constexpr int kThreads = kOfSm80;
#endif
__global__ void __launch_bounds__(kThreads) probe() {}

int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

int threads_of_probe() {
  thread_local std::map<int, int> known;
  const auto [at, is_new] = known.try_emplace(current_device(), 0);
  if (is_new) {
    cudaFuncAttributes of{};
    if (cudaFuncGetAttributes(&of, probe) == cudaSuccess) {
      at->second = of.maxThreadsPerBlock;
    } else {
      cudaGetLastError();  // the launch that follows says what is wrong
    }
  }
  return at->second;
}

}  // namespace

bool launches_ahead() {
  return threads_of_probe() >= kOfSm90;
}

bool has_warpgroups() {
  return threads_of_probe() >= kOfWarpgroups;
}

size_t most_shared() {
  thread_local std::map<int, size_t> known;
  const auto [at, is_new] = known.try_emplace(current_device(), 0);
  if (is_new) {
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, at->first);
    at->second = shared_limit(static_cast<size_t>(bytes), std::getenv("CAMBIUM_CUDA_SHARED"));
  }
  return at->second;
}

}  // namespace cambium::cuda
