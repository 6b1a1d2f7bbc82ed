// WorkRecorder: steps of work on a CUDA device that come again and again, each queued as a whole.
//
// A step is host code that works out sizes and lists and launches kernels. Where it does the same
// as an earlier one, but for what it uploads, the device has it as a graph: the host code runs with
// its launches left out and only compared, by a digest of what would be launched, what is to be
// uploaded goes up in one copy, and the graph is launched. So nothing has to say when two steps are
// alike, and a step that is not is queued as any other work.
//
// Included by .cu files: free of fmt.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>

namespace cambium {

struct Device;

class WorkRecorder {
 public:
  /// How many steps were queued each way, and graphs made.
  struct Counts {
    int64_t launched = 0;  // as a graph that was there
    int64_t made = 0;      // as a graph made for it
    int64_t queued = 0;    // call by call
  };

  /// A recorder for a device, with room for `upload_bytes` of a step's uploads; null for a device
  /// that has no graphs.
  static std::unique_ptr<WorkRecorder> on(Device device, int64_t upload_bytes);
  WorkRecorder() = default;
  WorkRecorder(const WorkRecorder&) = delete;
  WorkRecorder& operator=(const WorkRecorder&) = delete;
  /// Waits for what was queued.
  virtual ~WorkRecorder() = default;

  /// Queues what `work` does, and then copies `fetched` (bytes of the device) to `to` (pinned).
  /// Where `repeats` says that more steps like it will come, `work` may be called twice, from the
  /// same beginning: it takes the same memory and makes the same uploads each time, and reads
  /// nothing from the device. It writes no weights: its kernels may read them before those ahead of
  /// them are done. What an earlier step but one uploaded is done with: it waits for
  /// that.
  virtual void step(bool repeats, const std::function<void()>& work, void* to, const void* fetched,
                    int64_t bytes) = 0;
  /// Waits until all steps are done but the newest `running`.
  virtual void wait(int64_t running) = 0;
  const Counts& counts() const { return counts_; }

  // --- For what is queued in a step.
  /// Whether what is queued is told to add(), and whether it is not to be queued.
  bool notes() const { return mode_ != Mode::kQueue; }
  bool compares() const { return mode_ == Mode::kCompare; }
  /// Adds to the digest. Two values are the same if their bytes are: no padding.
  void add(const void* bytes, size_t count) {
    const auto* at = static_cast<const unsigned char*>(bytes);
    for (; count >= sizeof(uint64_t); count -= sizeof(uint64_t), at += sizeof(uint64_t)) {
      uint64_t word = 0;
      std::memcpy(&word, at, sizeof(word));
      add_word(word);
    }
    if (count > 0) {
      uint64_t word = 0;
      std::memcpy(&word, at, count);
      add_word(word ^ (static_cast<uint64_t>(count) << 56));
    }
  }
  template <class T>
  void add_value(T value) {
    static_assert(std::is_trivially_copyable_v<T>);
#if !defined(__clang__) || __has_builtin(__builtin_clear_padding)
    if constexpr (std::is_class_v<T>) {
      __builtin_clear_padding(&value);
    }
#endif
    add(&value, sizeof(value));
  }
  /// Called, while it compares, by work that cannot be recorded.
  void refuse() {
    refused_ = true;
  }
  /// Where kernels find a copy of the host's bytes, as long as the step's work runs; null where the
  /// room for uploads is full.
  virtual void* upload(const void* bytes, int64_t count) = 0;

 protected:
  enum class Mode : uint8_t { kQueue, kCompare, kRecord };
  struct Digest {
    uint64_t a = 0, b = 0;
    bool operator==(const Digest&) const = default;
  };

  Mode mode_ = Mode::kQueue;
  bool refused_ = false;
  Digest digest_;
  Counts counts_;

 private:
  // Two independent multiplicative hashes of the sequence of words.
  void add_word(uint64_t word) {
    digest_.a = (digest_.a ^ word) * 0x9E3779B97F4A7C15U;
    digest_.a ^= digest_.a >> 29;
    digest_.b = (digest_.b + word) * 0xD6E8FEB86659FD93U;
    digest_.b ^= digest_.b >> 32;
  }
};

}  // namespace cambium
