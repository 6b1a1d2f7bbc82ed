#include <cuda_runtime_api.h>

#include <deque>

#include "base/error.h"
#include "base/text.h"
#include "tensor/device_memory_queues.h"

namespace cambium {
namespace {

void check(const char* what, cudaError_t status) {
  expect(status == cudaSuccess, "[cuda] {} failed: {}", what, cudaGetErrorString(status));
}

std::string human(int64_t bytes) {
  return human_bytes(static_cast<uint64_t>(bytes));
}

struct Found {
  int count = 0;
  std::string why;
};

const Found& found() {
  static const Found result = [] {
    Found f;
    const cudaError_t status = cudaGetDeviceCount(&f.count);
    if (status != cudaSuccess) {
      f.count = 0;
      int driver = 0;
      cudaDriverGetVersion(&driver);
      f.why = driver == 0
                  ? "no NVIDIA driver was found"
                  : fmt::format("{} (the driver is of CUDA {}.{}, this program of {}.{})",
                                cudaGetErrorString(status), driver / 1000, driver % 1000 / 10,
                                CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
      cudaGetLastError();
    } else if (f.count == 0) {
      f.why = "the machine has no NVIDIA GPU";
    }
    return f;
  }();
  return result;
}

// Makes it the device of what follows; nothing for the CPU.
void select(Device device) {
  if (device.kind == Device::kCuda) {
    expect(device.index < found().count, "[device] expected one of {} CUDA devices, got {}{}{}",
           found().count, device.describe(), found().why.empty() ? "" : ": ", found().why);
    check("choosing the device", cudaSetDevice(device.index));
  }
}

/// Copies on a stream that does not wait for the default one.
class CudaCopies : public CopyQueue {
 public:
  explicit CudaCopies(Device device) : device_(device) {
    select(device);
    check("making a stream", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  CudaCopies(const CudaCopies&) = delete;
  CudaCopies& operator=(const CudaCopies&) = delete;
  ~CudaCopies() override {
    cudaStreamSynchronize(stream_);
    for (cudaEvent_t event : events_) {
      cudaEventDestroy(event);
    }
    cudaStreamDestroy(stream_);
  }

  void copy(void* to, const void* pinned, int64_t bytes) override {
    if (bytes > 0) {
      select(device_);
      check("copying to the device", cudaMemcpyAsync(to, pinned, static_cast<size_t>(bytes),
                                                     cudaMemcpyHostToDevice, stream_));
    }
  }
  int64_t mark() override {
    select(device_);
    cudaEvent_t event = nullptr;
    check("making an event", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    events_.push_back(event);
    check("marking a copy", cudaEventRecord(event, stream_));
    return first_ + static_cast<int64_t>(events_.size()) - 1;
  }
  void wait(int64_t mark) override {
    for (; first_ <= mark && !events_.empty(); ++first_) {
      const cudaError_t status = cudaEventSynchronize(events_.front());
      cudaEventDestroy(events_.front());
      events_.pop_front();
      check("waiting for a copy", status);
    }
  }

 private:
  Device device_;
  cudaStream_t stream_ = nullptr;
  int64_t first_ = 0;  // the mark of the first of these
  std::deque<cudaEvent_t> events_;
};

}  // namespace

std::unique_ptr<CopyQueue> cuda_copy_queue(Device device) {
  return std::make_unique<CudaCopies>(device);
}

int cuda_devices() {
  return found().count;
}

std::string why_no_cuda() {
  return found().why;
}

CudaDeviceInfo cuda_device_info(Device device) {
  select(device);
  cudaDeviceProp properties{};
  check("asking for the device's properties", cudaGetDeviceProperties(&properties, device.index));
  size_t free = 0;
  size_t total = 0;
  check("asking for the device's memory", cudaMemGetInfo(&free, &total));
  return {properties.name, static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

void* allocate_memory(Device device, MemoryKind kind, int64_t bytes) {
  select(device);
  void* memory = nullptr;
  const cudaError_t status =
      kind == MemoryKind::kPinned
          ? cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocPortable)
          : cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    const CudaDeviceInfo info = cuda_device_info(device);
    const std::string note = memory_note();
    fail(
        "[{}] out of memory: {} were asked for{} ({} bytes), {} of {} are free{}; take fewer or "
        "shorter sequences, a smaller batch, or weights in bf16",
        device.describe(), human(bytes), kind == MemoryKind::kPinned ? " of the host" : "", bytes,
        human(info.free_bytes), human(info.total_bytes),
        note.empty() ? "" : " (planned: " + note + ")");
  }
  check("allocating memory", status);
  return memory;
}

void free_memory(Device device, MemoryKind kind, void* memory) {
  if (memory == nullptr || cudaSetDevice(device.index) != cudaSuccess) {
    return;
  }
  kind == MemoryKind::kPinned ? cudaFreeHost(memory) : cudaFree(memory);
}

void copy_memory(void* to, Device to_device, const void* from, Device from_device, int64_t bytes) {
  if (bytes == 0) {
    return;
  }
  select(from_device);
  select(to_device);
  const auto size = static_cast<size_t>(bytes);
  if (to_device.kind == Device::kCuda && from_device.kind == Device::kCuda) {
    check("copying on the device", cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice));
  } else {
    check("copying to or from the device", cudaMemcpy(to, from, size, cudaMemcpyDefault));
  }
}

void copy_from_pinned(void* to, Device to_device, const void* from, int64_t bytes) {
  if (bytes > 0) {
    select(to_device);
    check("copying to the device",
          cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
  }
}

void fill_memory(void* memory, Device device, int byte, int64_t bytes) {
  if (bytes > 0) {
    select(device);
    check("filling memory", cudaMemsetAsync(memory, byte, static_cast<size_t>(bytes)));
  }
}

void copy_memory_2d(void* to, Device to_device, int64_t to_stride, const void* from,
                    Device from_device, int64_t from_stride, int64_t width, int64_t height) {
  if (width == 0 || height == 0) {
    return;
  }
  select(from_device);
  select(to_device);
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const bool both = to_device.kind == Device::kCuda && from_device.kind == Device::kCuda;
  check("copying rows", both
                            ? cudaMemcpy2DAsync(to, size(to_stride), from, size(from_stride),
                                                size(width), size(height), cudaMemcpyDeviceToDevice)
                            : cudaMemcpy2D(to, size(to_stride), from, size(from_stride),
                                           size(width), size(height), cudaMemcpyDefault));
}

void queue_failed(const char* what, int status) {
  fail("[cuda] {} failed: {}", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
}

void wait_for(Device device) {
  if (device.kind == Device::kCuda) {
    select(device);
    check("waiting for the device", cudaDeviceSynchronize());
  }
}

}  // namespace cambium
