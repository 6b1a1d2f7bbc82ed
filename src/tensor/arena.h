// Arena: memory for the tensors of a step. Allocation moves a pointer; mark() and release() free
// everything since the mark at once. Blocks are kept, so that from the second step on nothing is
// allocated from the system; after reserve() not in the first either. Buffer: one owned allocation,
// for parameters and caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "tensor/device_memory.h"
#include "tensor/tensor.h"

namespace cambium {

struct FreeMemory {
  Device device;
  MemoryKind kind = MemoryKind::kDevice;
  int64_t bytes = 0;
  void operator()(void* p) const;
};

/// What the buffers of this program take of a device, or pinned of the host for it: bytes now and
/// the most at once, and how many buffers were ever made. Any thread may ask.
struct MemoryUse {
  int64_t bytes = 0;
  int64_t peak_bytes = 0;
  int64_t allocations = 0;
};
MemoryUse memory_use(Device device, MemoryKind kind = MemoryKind::kDevice);

/// Owns aligned memory; moves, does not copy. Freshly zeroed.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes, Device device = {});
  /// Memory of the host that kernels of a CUDA device read and write in place; not zeroed. Of the
  /// CPU it is any memory.
  static Buffer pinned(int64_t bytes, Device device);
  /// Not zeroed.
  static Buffer uninitialised(int64_t bytes, Device device);
  void* data() const;
  int64_t bytes() const { return bytes_; }

 private:
  static Buffer of_device(int64_t bytes, Device device, MemoryKind kind);

  std::unique_ptr<void, FreeMemory> memory_;  // data() is its first aligned address
  int64_t bytes_ = 0;
};

/// A tensor with memory of its own; the gradient of bf16 is f32, as a weight's is.
struct OwnedTensor {
  OwnedTensor() = default;
  OwnedTensor(Dtype dtype, std::span<const int64_t> shape, bool with_grad = false,
              Device device = {});
  OwnedTensor(Dtype dtype, std::initializer_list<int64_t> shape, bool with_grad = false,
              Device device = {})
      : OwnedTensor(dtype, std::span(shape.begin(), shape.size()), with_grad, device) {}
  /// Gives it a zeroed gradient, or takes the one it has away.
  void want_grad(bool wanted);

  Buffer data;
  std::shared_ptr<const Buffer> block;  // in place of data: memory that other tensors lie in too
  Buffer grad;
  std::unique_ptr<GradientMemory> grad_memory;
  Tensor view;
};

class Arena {
 public:
  explicit Arena(Device device = {}) : device_(device) {}
  /// For what the host writes and kernels of `device` read, or the other way round: pinned memory.
  static Arena for_host(Device device) { return Arena(device, MemoryKind::kPinned); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  struct Mark {
    size_t block = 0;
    int64_t offset = 0;
    int64_t used = 0;
  };

  /// Uninitialised memory, aligned to 64 bytes, on a device to 256, valid until a mark before it is
  /// released.
  void* allocate(int64_t bytes);
  Mark mark() const { return {block_, offset_, used_}; }
  void release(Mark mark);
  /// Takes one block now in which `bytes` can be in use at once: what allocates no more than that
  /// takes nothing from the system. While nothing is in use.
  void reserve(int64_t bytes);
  /// The most bytes that were in use at once.
  int64_t peak_bytes() const { return peak_; }
  int64_t used_bytes() const { return used_; }
  Device device() const { return device_; }

  /// Of the arena's device; not of an arena for_host().
  Tensor empty(Dtype dtype, std::span<const int64_t> shape);
  Tensor empty(Dtype dtype, std::initializer_list<int64_t> shape) {
    return empty(dtype, std::span(shape.begin(), shape.size()));
  }

 private:
  Arena(Device device, MemoryKind kind) : device_(device), kind_(kind) {}
  Buffer block_of(int64_t bytes) const;
  void join_blocks();

  Device device_;
  MemoryKind kind_ = MemoryKind::kDevice;
  std::vector<Buffer> blocks_;
  size_t block_ = 0;    // block in use
  int64_t offset_ = 0;  // next free byte in it
  int64_t used_ = 0;
  int64_t peak_ = 0;
};

/// Releases what was allocated during its life.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace cambium
