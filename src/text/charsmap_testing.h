// Charsmaps for tests.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cambium::testing {

/// The bytes of a 32-bit number, little-endian.
inline std::string le32(uint32_t value) {
  std::string bytes;
  for (int i = 0; i < 4; ++i) {
    bytes += static_cast<char>(value >> (8 * i) & 0xFF);
  }
  return bytes;
}

inline std::string charsmap_of(const std::vector<uint32_t>& units, const std::string& pool) {
  std::string blob = le32(static_cast<uint32_t>(units.size() * 4));
  for (const uint32_t unit : units) {
    blob += le32(unit);
  }
  return blob + pool;
}

/// A trie of the keys, each node's children at the first base where all of them fit.
class CharsmapBuilder {
 public:
  explicit CharsmapBuilder(const std::map<std::string, std::string>& rules) {
    std::map<std::string, uint32_t> values;
    for (const auto& [key, replacement] : rules) {
      values[key] = static_cast<uint32_t>(pool_.size());
      pool_ += replacement + '\0';
    }
    units_.resize(1);
    used_ = {true};
    place(values, "", 0);
    // Whole blocks, as every child of a base stands in the base's own block of 256.
    units_.resize((units_.size() + 255) / 256 * 256);
  }
  std::string blob() const { return charsmap_of(units_, pool_); }
  std::vector<uint32_t>& units() { return units_; }
  const std::string& pool() const { return pool_; }
  /// Where the unit of a prefix of a key stands.
  uint32_t position(const std::string& prefix) const { return positions_.at(prefix); }

 private:
  static std::map<unsigned char, bool> children(const std::map<std::string, uint32_t>& values,
                                                const std::string& prefix) {
    std::map<unsigned char, bool> labels;
    for (const auto& [key, value] : values) {
      if (key.size() > prefix.size() && key.starts_with(prefix)) {
        labels[static_cast<unsigned char>(key[prefix.size()])] = true;
      }
    }
    return labels;
  }
  bool is_free(uint32_t position) const { return position >= used_.size() || !used_[position]; }
  void use(uint32_t position, uint32_t unit) {
    if (position >= units_.size()) {
      units_.resize(position + 1);
      used_.resize(position + 1);
    }
    units_[position] |= unit;
    used_[position] = true;
  }
  void place(const std::map<std::string, uint32_t>& values, const std::string& prefix,
             uint32_t position) {
    positions_[prefix] = position;
    const auto labels = children(values, prefix);
    const auto value = values.find(prefix);
    uint32_t base = 1;
    const auto fits = [&] {
      bool all = is_free(base);
      for (const auto& [label, there] : labels) {
        all = all && is_free(base ^ label);
      }
      return all;
    };
    while (!fits()) {
      ++base;
    }
    use(position, (position ^ base) << 10 | (value == values.end() ? 0U : 1U << 8));
    use(base, value == values.end() ? 0x80000000U : 0x80000000U | value->second);
    for (const auto& [label, there] : labels) {
      use(base ^ label, label);
    }
    for (const auto& [label, there] : labels) {
      place(values, prefix + static_cast<char>(label), base ^ label);
    }
  }

  std::vector<uint32_t> units_;
  std::vector<bool> used_;
  std::string pool_;
  std::map<std::string, uint32_t> positions_;
};

}  // namespace cambium::testing
