#include "text/token_table.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <bit>

#include "base/error.h"

namespace cambium::text {

uint64_t hash_bytes(std::string_view bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

void TokenTable::reserve(size_t count, size_t bytes) {
  CAMBIUM_CHECK(count_ == 0, "the table cannot grow");
  slots_.assign(std::bit_ceil(count * 2 + 2), Slot{});
  bytes_.reserve(bytes);
}

bool TokenTable::insert(std::string_view text, int32_t id) {
  CAMBIUM_CHECK(2 * (count_ + 1) <= slots_.size(), "reserved for too few tokens");
  const uint64_t hash = hash_bytes(text);
  if (find(text, hash) >= 0) {
    return false;
  }
  size_t i = hash & (slots_.size() - 1);
  while (slots_[i].id >= 0) {
    i = (i + 1) & (slots_.size() - 1);
  }
  slots_[i] = {hash, static_cast<uint32_t>(bytes_.size()), static_cast<uint32_t>(text.size()), id};
  bytes_ += text;
  ++count_;
  return true;
}

int32_t TokenTable::find(std::string_view text, uint64_t hash) const {
  if (slots_.empty()) {
    return -1;
  }
  for (size_t i = hash & (slots_.size() - 1);; i = (i + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[i];
    if (slot.id < 0) {
      return -1;
    }
    if (slot.hash == hash && text == std::string_view(bytes_).substr(slot.offset, slot.length)) {
      return slot.id;
    }
  }
}

void MergeTable::reserve(size_t count) {
  const size_t size = std::bit_ceil(count * 3 / 2 + 2);
  slots_.assign(size, Slot{});
  mask_ = size - 1;
  shift_ = 64 - std::countr_zero(size);
}

void MergeTable::insert(int32_t left, int32_t right, Merge merge) {
  const uint64_t key = pair_key(left, right);
  size_t i = place(key);
  while (slots_[i].key != kFree && slots_[i].key != key) {
    i = (i + 1) & mask_;
  }
  slots_[i] = {key, merge};
}

}  // namespace cambium::text
