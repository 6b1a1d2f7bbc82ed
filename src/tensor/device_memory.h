// Memory of devices: allocated, copied, filled, waited for. The CUDA half (device_memory_cuda.cc)
// is part of builds with CUDA; without it, and without a usable GPU, there is no CUDA device.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "tensor/device.h"

struct CUstream_st;

namespace cambium {

/// How many CUDA devices can be used, up to one that is too old; 0 without a CUDA build or driver.
int cuda_devices();
/// Why there are no more ("this build has no CUDA", "the driver ..."); empty where all are used.
std::string why_no_cuda();
/// "NVIDIA H100 80GB HBM3", and its memory in bytes: free now and in all.
struct CudaDeviceInfo {
  std::string name;
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
};
CudaDeviceInfo cuda_device_info(Device device);

/// Whose memory, and whether the device reads host memory in place (pinned).
enum class MemoryKind : uint8_t { kDevice, kPinned };

/// What an error of memory that ran out says of how the memory was to be used: "weights 28.0 GiB,
/// cache 40.1 GiB". Empty = nothing.
void set_memory_note(std::string note);
std::string memory_note();

/// `bytes` of memory aligned to 256 bytes; Error that names what was asked and what is free. Memory
/// of a CUDA device is not zeroed, pinned memory neither.
void* allocate_memory(Device device, MemoryKind kind, int64_t bytes);
void free_memory(Device device, MemoryKind kind, void* memory);

/// Copies between any two devices (or fills with one byte) in the order of the device's stream; a
/// copy from or to memory of the CPU has been made when this returns.
void copy_memory(void* to, Device to_device, const void* from, Device from_device, int64_t bytes);
/// Copies from pinned memory, which stays as it is until the copy is made, without waiting.
void copy_from_pinned(void* to, Device to_device, const void* from, int64_t bytes);
void fill_memory(void* memory, Device device, int byte, int64_t bytes);
/// Copies `height` pieces of `width` bytes, the strides in bytes.
void copy_memory_2d(void* to, Device to_device, int64_t to_stride, const void* from,
                    Device from_device, int64_t from_stride, int64_t width, int64_t height);
/// Error: `what` could not be queued; `status` is a cudaError_t.
[[noreturn]] void queue_failed(const char* what, int status);
/// The stream of a CUDA device (its cudaStream_t) that all of its work is queued on, in the order
/// of the calls; null of other devices. It does not wait for the runtime's default stream.
CUstream_st* compute_stream(Device device);
/// Waits until everything queued on the device is done.
void wait_for(Device device);

/// Copies from pinned memory to a device on a stream of their own: they run beside what the device
/// computes and are not in order with it. On the CPU each is made at once.
class CopyQueue {
 public:
  static std::unique_ptr<CopyQueue> on(Device device);
  /// Waits for all of them.
  virtual ~CopyQueue() = default;
  /// `pinned` stays as it is until the copy is made.
  virtual void copy(void* to, const void* pinned, int64_t bytes) = 0;
  /// Names everything queued so far, and waits for it.
  virtual int64_t mark() = 0;
  virtual void wait(int64_t mark) = 0;
};

}  // namespace cambium
