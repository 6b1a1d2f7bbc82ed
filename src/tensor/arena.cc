#include "tensor/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>

#include "base/text.h"

namespace cambium {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kDeviceAlignment = 256;  // that CUDA's libraries ask of their workspaces
constexpr int64_t kBlockBytes = int64_t{16} << 20;

constexpr int64_t kHugePagesFrom = int64_t{4} << 20;

/// Large pages cost fewer translations to walk through; a system that has none goes on without.
void ask_for_huge_pages(void* memory, int64_t size) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + static_cast<uintptr_t>(size)) / page * page;
  ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

int64_t round_up(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct Counted {
  std::atomic<int64_t> bytes{0}, peak{0}, allocations{0};

  void add(int64_t more) {
    ++allocations;
    const int64_t now = bytes += more;
    int64_t most = peak;
    while (now > most && !peak.compare_exchange_weak(most, now)) {
    }
  }
};

Counted& counted(Device device, MemoryKind kind) {
  static std::array<std::array<Counted, 256>, 6> all;
  const size_t row = 2U * device.kind + (kind == MemoryKind::kPinned ? 1U : 0U);
  return all[row][device.index];
}

// An address that nobody has memory at and no other buffer of the meta device has.
void* meta_memory(int64_t bytes) {
  constexpr int64_t kApart = 4096;
  static std::atomic<int64_t> next{int64_t{1} << 56};
  return reinterpret_cast<void*>(next.fetch_add((bytes / kApart + 2) * kApart));
}

int64_t tensor_bytes(Dtype dtype, std::span<const int64_t> shape) {
  int64_t n = dtype_size(dtype);
  for (const int64_t size : shape) {
    CAMBIUM_CHECK(size >= 0);
    n *= size;
  }
  return n;
}

}  // namespace

MemoryUse memory_use(Device device, MemoryKind kind) {
  const Counted& c = counted(device, kind);
  return {c.bytes, c.peak, c.allocations};
}

void FreeMemory::operator()(void* p) const {
  counted(device, kind).bytes -= bytes;
  if (device.kind == Device::kCpu) {
    std::free(p);
  } else if (device.kind == Device::kCuda) {
    free_memory(device, kind, p);
  }
}

Buffer Buffer::uninitialised(int64_t bytes, Device device) {
  if (device.kind == Device::kCpu) {
    return Buffer(bytes);
  }
  return of_device(bytes, device, MemoryKind::kDevice);
}

Buffer Buffer::pinned(int64_t bytes, Device device) {
  if (device.kind != Device::kCuda) {
    return Buffer(bytes);
  }
  return of_device(bytes, device, MemoryKind::kPinned);
}

Buffer Buffer::of_device(int64_t bytes, Device device, MemoryKind kind) {
  Buffer b;
  b.bytes_ = bytes;
  b.memory_ = {device.kind == Device::kMeta
                   ? meta_memory(bytes)
                   : allocate_memory(device, kind, std::max<int64_t>(bytes, 1)),
               FreeMemory{device, kind, bytes}};
  counted(device, kind).add(bytes);
  return b;
}

Buffer::Buffer(int64_t bytes, Device device) : bytes_(bytes) {
  if (device.kind != Device::kCpu) {
    *this = uninitialised(bytes, device);
    if (device.kind == Device::kCuda) {
      fill_memory(data(), device, 0, bytes);
    }
    return;
  }
  // Large memory comes as pages that the system zeroes when they are first touched.
  const int64_t size = round_up(std::max<int64_t>(bytes, 1)) + kAlignment;
  void* memory = std::calloc(static_cast<size_t>(size), 1);
  expect(memory != nullptr, "[buffer] out of memory: {} were asked for ({} bytes)",
         human_bytes(static_cast<uint64_t>(bytes)), bytes);
  memory_ = {memory, FreeMemory{device, MemoryKind::kDevice, bytes}};
  counted(device, MemoryKind::kDevice).add(bytes);
  if (size >= kHugePagesFrom) {
    ask_for_huge_pages(memory_.get(), size);
  }
}

void* Buffer::data() const {
  const auto at = reinterpret_cast<uintptr_t>(memory_.get());
  constexpr auto kTo = static_cast<uintptr_t>(kAlignment);
  return reinterpret_cast<void*>((at + kTo - 1) / kTo * kTo);
}

OwnedTensor::OwnedTensor(Dtype dtype, std::span<const int64_t> shape, bool with_grad, Device device)
    : data(tensor_bytes(dtype, shape), device) {
  view = Tensor::of(dtype, device, shape, data.data());
  want_grad(with_grad);
}

void OwnedTensor::want_grad(bool wanted) {
  view.grad_dtype = sum_dtype(view.dtype);
  grad = wanted ? Buffer(view.numel() * dtype_size(view.grad_dtype), view.device) : Buffer();
  grad_memory = wanted ? std::make_unique<GradientMemory>(
                             GradientMemory{view.device, grad.data(), grad.bytes(), false})
                       : nullptr;
  view.grad = grad.data();
  view.grad_memory = grad_memory.get();
}

// Blocks of a device that came one by one become one, of the most bytes that were in use: a step of
// other sizes would pass by those that are too small for one of its tensors and take the rest anew.
void Arena::join_blocks() {
  if (used_ > 0 || blocks_.size() < 2 || device_.kind == Device::kCpu) {
    return;
  }
  blocks_.clear();  // before, so that the two are never there at once
  block_ = 0;
  offset_ = 0;
  blocks_.push_back(block_of(std::max(peak_, kBlockBytes)));
}

void* Arena::allocate(int64_t bytes) {
  const int64_t to = device_.kind == Device::kCpu ? kAlignment : kDeviceAlignment;
  const int64_t size = (std::max<int64_t>(bytes, 1) + to - 1) / to * to;
  join_blocks();
  while (block_ < blocks_.size() && offset_ + size > blocks_[block_].bytes()) {
    ++block_;
    offset_ = 0;
  }
  if (block_ == blocks_.size()) {
    blocks_.push_back(block_of(std::max(size, kBlockBytes)));
  }
  void* p = static_cast<char*>(blocks_[block_].data()) + offset_;
  offset_ += size;
  used_ += size;
  peak_ = std::max(peak_, used_);
  return p;
}

void Arena::release(Mark mark) {
  CAMBIUM_CHECK(mark.used <= used_);
  block_ = mark.block;
  offset_ = mark.offset;
  used_ = mark.used;
}

void Arena::reserve(int64_t bytes) {
  CAMBIUM_CHECK(used_ == 0 && bytes >= 0);
  if (bytes == 0) {
    return;
  }
  if (std::any_of(blocks_.begin(), blocks_.end(),
                  [&](const Buffer& block) { return block.bytes() >= bytes; })) {
    return;
  }
  blocks_.clear();  // before, so that the two are never there at once
  blocks_.push_back(block_of(bytes));
  block_ = 0;
  offset_ = 0;
}

Buffer Arena::block_of(int64_t bytes) const {
  return kind_ == MemoryKind::kPinned ? Buffer::pinned(bytes, device_)
                                      : Buffer::uninitialised(bytes, device_);
}

Tensor Arena::empty(Dtype dtype, std::span<const int64_t> shape) {
  CAMBIUM_CHECK(kind_ == MemoryKind::kDevice || device_.kind == Device::kCpu);
  return Tensor::of(dtype, device_, shape, allocate(tensor_bytes(dtype, shape)));
}

}  // namespace cambium
