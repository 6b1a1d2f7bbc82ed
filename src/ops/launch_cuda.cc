#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "base/error.h"
#include "ops/cuda_launch.h"
#include "ops/segment_plans.h"
#include "tensor/work_recorder.h"

namespace cambium::cuda {
namespace {

struct SegmentArrays {
  struct Key {
    int64_t count;
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray memory;
  DeviceSegments segments;
};

SegmentArrays make(const SegmentWalk& from, const Launch& on) {
  const auto count = static_cast<size_t>(from.count);
  const auto tokens = static_cast<size_t>(from.tokens());
  // start (count + 1), position (count), slot (count), segment (tokens), in one copy
  std::vector<int32_t> host(3 * count + 1 + tokens);
  int32_t* start = host.data();
  int32_t* position = start + count + 1;
  int32_t* slot = position + count;
  int32_t* segment = slot + count;
  start[0] = 0;
  std::copy_n(from.start, count == 0 ? 0 : count + 1, start);
  std::copy_n(from.position, count, position);
  SegmentArrays made{{from.count}, {}, {}};
  for (int64_t s = 0; s < from.count; ++s) {
    slot[s] = static_cast<int32_t>(from.row(s));
    std::fill(segment + from.begin(s), segment + from.begin(s) + from.length(s),
              static_cast<int32_t>(s));
    made.segments.longest = std::max(made.segments.longest, from.length(s));
  }
  made.memory = DeviceArray(host.data(), static_cast<int64_t>(host.size() * sizeof(int32_t)), on);
  const auto* at = made.memory.as<int32_t>();
  made.segments.walk = {from.count, at, at + count + 1, at + 2 * count + 1, nullptr};
  made.segments.segment = at + 3 * count + 1;
  made.segments.tokens = from.tokens();
  return made;
}

}  // namespace

void check_launch(const char* operation, Extent blocks, Extent threads, size_t shared, int status) {
  if (status != cudaSuccess) {
    fail(
        "[{}] its CUDA kernel failed: {} (launched as {} x {} x {} blocks of {} x {} x {} threads, "
        "{} bytes of shared memory)",
        operation, cudaGetErrorString(static_cast<cudaError_t>(status)), blocks.x, blocks.y,
        blocks.z, threads.x, threads.y, threads.z, shared);
  }
}

void check_shared(const char* operation, size_t shared) {
  expect(shared <= most_shared(),
         "[{}] its CUDA kernel takes {} bytes of shared memory, this device gives a block {}; take "
         "smaller heads or --device cpu",
         operation, shared, most_shared());
}

// Keeps freed metadata for the next step instead of giving it back to the driver.
void keep_pool() {
  int device = 0;
  cudaMemPool_t pool = nullptr;
  uint64_t all = UINT64_MAX;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetDefaultMemPool(&pool, device) == cudaSuccess) {
    cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all);
  }
}

DeviceArray::DeviceArray(const void* host, int64_t bytes, const Launch& on) {
  if (on.recorder != nullptr) {
    if (void* uploaded = on.recorder->upload(host, bytes); uploaded != nullptr) {
      memory_ = {uploaded, DeviceFree{}};
      return;
    }
  }
  static std::once_flag once;
  std::call_once(once, keep_pool);
  void* memory = nullptr;
  const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  cudaError_t status = cudaMallocAsync(&memory, size, on.stream);
  expect(status == cudaSuccess, "[cuda] {} bytes of metadata could not be allocated: {}", bytes,
         cudaGetErrorString(status));
  memory_ = {memory, DeviceFree{on.stream}};
  status =
      cudaMemcpyAsync(memory, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, on.stream);
  expect(status == cudaSuccess, "[cuda] {} bytes of metadata could not be copied: {}", bytes,
         cudaGetErrorString(status));
}

void DeviceFree::operator()(void* p) const {
  if (stream != nullptr) {
    cudaFreeAsync(p, stream);
  }
}

DeviceSegments on_device(const SegmentWalk& segments, const Launch& on) {
  const auto plan =
      plan_for<SegmentArrays>(segments.plans, {segments.count}, [&] { return make(segments, on); });
  DeviceSegments result = plan->segments;
  result.owner = plan;
  return result;
}

}  // namespace cambium::cuda
