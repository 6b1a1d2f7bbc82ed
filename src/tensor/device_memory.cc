#include "tensor/device_memory.h"

#include <cstring>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "tensor/device_memory_queues.h"

namespace cambium {
namespace {

class HostCopies : public CopyQueue {
 public:
  void copy(void* to, const void* from, int64_t bytes) override {
    if (bytes > 0) {
      std::memcpy(to, from, static_cast<size_t>(bytes));
    }
  }
  int64_t mark() override { return 0; }
  void wait(int64_t /*mark*/) override {}
};

struct Note {
  std::mutex mutex;
  std::string text;
};
Note& note() {
  static Note the_note;
  return the_note;
}

}  // namespace

void set_memory_note(std::string text) {
  const std::lock_guard lock(note().mutex);
  note().text = std::move(text);
}

std::string memory_note() {
  const std::lock_guard lock(note().mutex);
  return note().text;
}

std::string why_no_devices(int driver, int built, std::string_view says) {
  if (driver == 0) {
    return fmt::format("no NVIDIA driver was found; one for CUDA {} or newer is needed",
                       built / 1000);
  }
  if (driver / 1000 < built / 1000) {
    return fmt::format("the NVIDIA driver is for CUDA {}.{}; one for CUDA {} or newer is needed",
                       driver / 1000, driver % 1000 / 10, built / 1000);
  }
  return fmt::format("{} (the NVIDIA driver is for CUDA {}.{})", says, driver / 1000,
                     driver % 1000 / 10);
}

std::string why_too_old(std::string_view gpu, int major, int minor) {
  constexpr int kLeastMajor = 8;
  return major >= kLeastMajor
             ? ""
             : fmt::format("the {} has compute capability {}.{}; {}.0 or newer is needed", gpu,
                           major, minor, kLeastMajor);
}

std::unique_ptr<CopyQueue> CopyQueue::on(Device device) {
  if (device.kind == Device::kCpu) {
    return std::make_unique<HostCopies>();
  }
  return cuda_copy_queue(device);
}

std::unique_ptr<WorkRecorder> WorkRecorder::on(Device device, int64_t upload_bytes) {
  return device.kind == Device::kCuda ? cuda_recorder(device, upload_bytes) : nullptr;
}

}  // namespace cambium

#if !CAMBIUM_CUDA

namespace cambium {
namespace {

[[noreturn]] void no_cuda(const char* who, Device device) {
  fail("[{}] this build has no memory on {}; take the cpu", who, device.describe());
}

}  // namespace

int cuda_devices() {
  return 0;
}
std::string why_no_cuda() {
  return "this build has no CUDA kernels";
}
CudaDeviceInfo cuda_device_info(Device device) {
  no_cuda("device", device);
}
void* allocate_memory(Device device, MemoryKind, int64_t) {
  no_cuda("buffer", device);
}
void free_memory(Device, MemoryKind, void*) {}
void copy_memory(void*, Device to_device, const void*, Device, int64_t) {
  no_cuda("copy", to_device);
}
void copy_from_pinned(void*, Device to_device, const void*, int64_t) {
  no_cuda("copy", to_device);
}
void fill_memory(void*, Device device, int, int64_t) {
  no_cuda("fill", device);
}
void copy_memory_2d(void*, Device to_device, int64_t, const void*, Device, int64_t, int64_t,
                    int64_t) {
  no_cuda("copy", to_device);
}
void queue_failed(const char* what, int status) {
  fail("[cuda] {} failed with status {}", what, status);
}
CUstream_st* compute_stream(Device) {
  return nullptr;
}
void wait_for(Device) {}
std::unique_ptr<CopyQueue> cuda_copy_queue(Device device) {
  no_cuda("copy", device);
}
std::unique_ptr<WorkRecorder> cuda_recorder(Device device, int64_t) {
  no_cuda("recorder", device);
}

}  // namespace cambium

#endif
