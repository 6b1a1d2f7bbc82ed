#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <deque>
#include <mutex>

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

std::string too_old(int device) {
  cudaDeviceProp properties{};
  check("asking for the device's properties", cudaGetDeviceProperties(&properties, device));
  return why_too_old(properties.name, properties.major, properties.minor);
}

/// Devices before the first that is too old, whose name `why` has then.
const Found& found() {
  static const Found result = [] {
    Found f;
    const cudaError_t status = cudaGetDeviceCount(&f.count);
    if (status != cudaSuccess) {
      f.count = 0;
      int driver = 0;
      cudaDriverGetVersion(&driver);
      f.why = why_no_devices(driver, CUDART_VERSION, cudaGetErrorString(status));
      cudaGetLastError();
    } else if (f.count == 0) {
      f.why = "the machine has no NVIDIA GPU";
    }
    for (int i = 0; i < f.count; ++i) {
      if (std::string why = too_old(i); !why.empty()) {
        f = {i, std::move(why)};  // CUDA_VISIBLE_DEVICES can leave it out
      }
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

/// Copies on a stream of their own.
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

// Whether a recorder has this thread's work: a copy that does not know of it cannot be recorded.
bool only_recorded() {
  if (WorkRecorder* recorder = recorder_in_use(); recorder != nullptr) {
    recorder->refuse();
    return true;
  }
  return false;
}

// Of the one that is a CUDA device.
cudaStream_t stream_of_either(Device a, Device b) {
  return compute_stream(a.kind == Device::kCuda ? a : b);
}

}  // namespace

CUstream_st* compute_stream(Device device) {
  if (device.kind != Device::kCuda) {
    return nullptr;
  }
  // Never destroyed: the driver may be gone before the program ends.
  static std::array<std::atomic<cudaStream_t>, 256> streams;
  static std::mutex mutex;
  std::atomic<cudaStream_t>& known = streams[device.index];
  if (cudaStream_t stream = known.load(std::memory_order_acquire); stream != nullptr) {
    return stream;
  }
  const std::lock_guard lock(mutex);
  if (known.load() == nullptr) {
    select(device);
    cudaStream_t stream = nullptr;
    check("making a stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    known.store(stream, std::memory_order_release);
  }
  return known.load();
}

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
  if (bytes == 0 || only_recorded()) {
    return;
  }
  select(from_device);
  select(to_device);
  const auto size = static_cast<size_t>(bytes);
  if (to_device.kind == Device::kCuda && from_device.kind == Device::kCuda) {
    check("copying on the device",
          cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, compute_stream(to_device)));
  } else {
    const cudaStream_t stream = stream_of_either(to_device, from_device);
    check("copying to or from the device",
          cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream));
    check("copying to or from the device", cudaStreamSynchronize(stream));
  }
}

void copy_from_pinned(void* to, Device to_device, const void* from, int64_t bytes) {
  if (bytes > 0) {
    select(to_device);
    check("copying to the device",
          cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                          compute_stream(to_device)));
  }
}

void fill_memory(void* memory, Device device, int byte, int64_t bytes) {
  if (bytes > 0 && !only_recorded()) {
    select(device);
    check("filling memory",
          cudaMemsetAsync(memory, byte, static_cast<size_t>(bytes), compute_stream(device)));
  }
}

void copy_memory_2d(void* to, Device to_device, int64_t to_stride, const void* from,
                    Device from_device, int64_t from_stride, int64_t width, int64_t height) {
  if (width == 0 || height == 0 || only_recorded()) {
    return;
  }
  select(from_device);
  select(to_device);
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const bool both = to_device.kind == Device::kCuda && from_device.kind == Device::kCuda;
  const cudaStream_t stream = stream_of_either(to_device, from_device);
  check("copying rows",
        cudaMemcpy2DAsync(to, size(to_stride), from, size(from_stride), size(width), size(height),
                          both ? cudaMemcpyDeviceToDevice : cudaMemcpyDefault, stream));
  if (!both) {
    check("copying rows", cudaStreamSynchronize(stream));
  }
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
