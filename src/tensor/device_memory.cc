#include "tensor/device_memory.h"

#include "base/error.h"

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
void wait_for(Device) {}

}  // namespace cambium

#endif
