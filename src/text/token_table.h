// Two flat hash tables, built once and then only read: token text -> id, and merge pair -> result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cambium::text {

uint64_t hash_bytes(std::string_view bytes);

/// Text -> id, open addressing.
class TokenTable {
 public:
  /// `count`: how many tokens will be added at most; `bytes`: their length together.
  void reserve(size_t count, size_t bytes);
  /// Returns false and changes nothing when the text is there already.
  bool insert(std::string_view text, int32_t id);
  /// The id, or -1.
  int32_t find(std::string_view text) const { return find(text, hash_bytes(text)); }
  int32_t find(std::string_view text, uint64_t hash) const;

 private:
  struct Slot {
    uint64_t hash = 0;
    uint32_t offset = 0;
    uint32_t length = 0;
    int32_t id = -1;  // -1: free
  };
  std::vector<Slot> slots_;
  std::string bytes_;
  size_t count_ = 0;
};

struct Merge {
  uint32_t rank;
  int32_t id;  // the joined token
};

/// (left id, right id) -> merge.
class MergeTable {
 public:
  static constexpr uint32_t kNoRank = 0xFFFFFFFF;

  void reserve(size_t count);
  /// The last of equal pairs wins.
  void insert(int32_t left, int32_t right, Merge merge);
  /// rank == kNoRank when the pair never merges.
  Merge find(int32_t left, int32_t right) const {
    const uint64_t key = pair_key(left, right);
    for (size_t i = place(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key) {
        return slots_[i].merge;
      }
      if (slots_[i].key == kFree) {
        return {kNoRank, -1};
      }
    }
  }

 private:
  static constexpr uint64_t kFree = ~uint64_t{0};
  struct Slot {
    uint64_t key = kFree;
    Merge merge{kNoRank, -1};
  };
  static uint64_t pair_key(int32_t left, int32_t right) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) |
           static_cast<uint32_t>(right);
  }
  size_t place(uint64_t key) const {
    return static_cast<size_t>((key * 0x9E3779B97F4A7C15ULL) >> shift_) & mask_;
  }
  std::vector<Slot> slots_ = std::vector<Slot>(2);
  size_t mask_ = 1;
  int shift_ = 63;
};

}  // namespace cambium::text
