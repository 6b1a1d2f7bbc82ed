// The host side of CUDA kernels' launches: errors, and metadata of segments on the device. Free of
// the CUDA runtime's headers and of fmt, so that .cc and .cu files both include it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "ops/kernel.h"
#include "ops/segment_walk.h"

namespace cambium::cuda {

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

/// Error that names the operation and its launch where `status` (a cudaError_t) is one.
void check_launch(const char* operation, Extent blocks, Extent threads, size_t shared, int status);
/// Error that names the operation where a block cannot have so much shared memory, a kernel's own
/// counted.
void check_shared(const char* operation, size_t shared);

/// Whether the kernels that the current device runs were compiled for sm_90 or newer: they come
/// before the one before them is done, and copy in the background. A newer device that has only PTX
/// for sm_80 to take does neither.
bool launches_ahead();
/// Whether they have products of warpgroups (ops/cuda_warpgroup.cuh), as sm_90a alone has.
bool has_warpgroups();

/// The most shared memory that a block may have on the current device, bytes: 99 KiB of sm_86, 89
/// and 120, 163 of sm_80, 227 of sm_90. CAMBIUM_CUDA_SHARED=KiB lowers it, so that a device with
/// more takes the kernels of one with less.
size_t most_shared();

/// Gives memory back in the order of its stream; null: it is not to be given back.
struct DeviceFree {
  CUstream_st* stream = nullptr;
  void operator()(void* p) const;
};

/// Memory of the device for a plan (ops/segment_plans.h): filled from the host when made; in a step
/// that has a recorder it is that step's.
class DeviceArray {
 public:
  DeviceArray() = default;
  /// Copies `bytes` from the host in the order of the stream.
  DeviceArray(const void* host, int64_t bytes, const Launch& on);
  template <class T>
  const T* as() const {
    return static_cast<const T*>(memory_.get());
  }
  template <class T>
  T* as_mutable() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  std::unique_ptr<void, DeviceFree> memory_;
};

/// What a kernel wants to know of segments: their arrays on the device, and what the host worked
/// out of them once a forward call.
struct DeviceSegments {
  SegmentWalk walk;                  // its pointers are of the device; for kernels by value
  const int32_t* segment = nullptr;  // (tokens): the segment of each token; of the device
  int64_t tokens = 0;
  int64_t longest = 0;  // the most tokens of a segment
  std::shared_ptr<const void> owner;
};

/// The segments on the device: made by the first call of a forward pass, from `segments.plans` for
/// the others.
DeviceSegments on_device(const SegmentWalk& segments, const Launch& on);

}  // namespace cambium::cuda
