#include "text/charsmap.h"

#include <utility>

#include "base/error.h"
#include "text/normalizer.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

constexpr size_t kLongestCluster = 5;  // bytes

// A unit of the array. The children of a node lie at its base XOR their label; at the base itself
// lies the value of a node that has one, with the highest bit set, so that it is nobody's child.
bool has_value(uint32_t unit) {
  return ((unit >> 8) & 1U) != 0;
}
uint32_t value_of(uint32_t unit) {
  return unit & 0x7FFFFFFFU;
}
uint32_t label_of(uint32_t unit) {
  return unit & 0x800000FFU;
}
size_t base_of(size_t position, uint32_t unit) {
  return position ^ (static_cast<size_t>(unit >> 10) << ((unit & 0x200U) >> 6));
}

uint32_t little_endian(std::string_view bytes) {
  uint32_t value = 0;
  for (int i = 3; i >= 0; --i) {
    value = value << 8 | static_cast<unsigned char>(bytes[static_cast<size_t>(i)]);
  }
  return value;
}

}  // namespace

Charsmap::Charsmap(std::string_view blob) {
  expect(blob.size() >= sizeof(uint32_t),
         "[tokenizer] the charsmap is cut: expected 4 bytes with the size of its trie, got {}",
         blob.size());
  const size_t bytes = little_endian(blob);
  blob.remove_prefix(sizeof(uint32_t));
  expect(bytes > 0 && bytes % sizeof(uint32_t) == 0,
         "[tokenizer] the charsmap says that its trie has {} bytes; expected a multiple of 4",
         bytes);
  expect(bytes <= blob.size(),
         "[tokenizer] the charsmap is cut: its trie has {} bytes, but only {} follow", bytes,
         blob.size());
  units_.reserve(bytes / sizeof(uint32_t));
  for (size_t at = 0; at < bytes; at += sizeof(uint32_t)) {
    units_.push_back(little_endian(blob.substr(at)));
  }
  pool_ = blob.substr(bytes);
  expect(pool_.empty() || pool_.back() == '\0',
         "[tokenizer] the charsmap is cut: its last replacement has no end");
  expect(is_valid_utf8(pool_), "[tokenizer] the charsmap's replacements are not UTF-8");
  check();
}

// Visits what can be reached from the root. Nodes may share what follows them, but not follow
// themselves. A node's children are those of its base, and a unit can be the child of one base
// only, so that the work is linear.
void Charsmap::check() const {
  const auto base_at = [&](size_t position) {
    const size_t base = base_of(position, units_[position]);
    expect(base < units_.size(),
           "[tokenizer] the charsmap's trie points out of itself: unit {} to {}, of {} units",
           position, base, units_.size());
    return base;
  };
  const auto check_value = [&](size_t base) {
    const size_t value = value_of(units_[base]);
    expect(value < pool_.size(),
           "[tokenizer] the charsmap points to byte {} of its replacements, which have {} bytes",
           value, pool_.size());
    expect((static_cast<unsigned char>(pool_[value]) & 0xC0U) != 0x80U,
           "[tokenizer] the charsmap points into a character, at byte {} of its replacements",
           value);
  };
  constexpr uint32_t kNone = 0xFFFFFFFFU;
  std::vector<uint32_t> child(units_.size(), kNone);    // the first, by base
  std::vector<uint32_t> sibling(units_.size(), kNone);  // the next, by unit
  for (uint32_t position = 0; position < units_.size(); ++position) {
    const uint32_t label = label_of(units_[position]);
    if (label >= 1 && label <= 0xFF && (position ^ label) < units_.size()) {
      sibling[position] = std::exchange(child[position ^ label], position);
    }
  }
  enum class Mark : uint8_t { kNew, kOpen, kDone };
  std::vector<Mark> marks(units_.size());  // by base
  std::vector<size_t> path = {base_at(0)};
  marks[path.back()] = Mark::kOpen;
  while (!path.empty()) {
    const size_t base = path.back();
    const uint32_t position = child[base];
    if (position == kNone) {
      marks[base] = Mark::kDone;
      path.pop_back();
      continue;
    }
    child[base] = sibling[position];
    const size_t next = base_at(position);
    if (has_value(units_[position])) {
      check_value(next);
    }
    expect(marks[next] != Mark::kOpen,
           "[tokenizer] the charsmap's trie goes round in a circle at unit {}", position);
    if (marks[next] == Mark::kNew) {
      marks[next] = Mark::kOpen;
      path.push_back(next);
    }
  }
}

std::optional<std::string_view> Charsmap::replacement(std::string_view part) const {
  size_t base = base_of(0, units_[0]);
  for (const char c : part) {
    const uint32_t label = static_cast<unsigned char>(c);
    const size_t position = base ^ label;
    if (label == 0 || position >= units_.size() || label_of(units_[position]) != label) {
      return std::nullopt;
    }
    base = base_of(position, units_[position]);
    if (has_value(units_[position])) {
      const std::string_view from = std::string_view(pool_).substr(value_of(units_[base]));
      return from.substr(0, from.find('\0'));
    }
  }
  return std::nullopt;
}

std::string Charsmap::normalise(std::string_view text) const {
  std::string out;
  out.reserve(text.size());
  const auto take = [&](std::string_view part) {
    const auto found = replacement(part);
    if (found) {
      out += *found;
      expect_bounded(out.size());
    }
    return found.has_value();
  };
  for (size_t at = 0; at < text.size();) {
    const std::string_view cluster = text.substr(at, grapheme_length(text, at));
    at += cluster.size();
    if (cluster.size() <= kLongestCluster && take(cluster)) {
      continue;
    }
    for (size_t i = 0; i < cluster.size();) {
      const std::string_view character = cluster.substr(i, decode_utf8(cluster, i).length);
      i += character.size();
      if (!take(character)) {
        out += character;
      }
    }
  }
  return out;
}

}  // namespace cambium::text
