// SentencePiece's precompiled rules of normalisation: a map from pieces of text to what replaces
// them, as a double-array trie (Aoe 1989, in the units of darts-clone) and a pool of strings.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cambium::text {

class Charsmap {
 public:
  /// `blob` is the size of the trie in bytes (32 bits, little-endian), the trie and the pool, whose
  /// strings each end with a zero. Error, with the name of what is wrong, for one that is cut, has
  /// another shape, points out of itself or into a character, or goes round in circles.
  explicit Charsmap(std::string_view blob);

  /// Applied as Hugging Face tokenizers applies it: a grapheme cluster of fewer than 6 bytes is
  /// replaced as a whole, by what the SHORTEST of the map's keys that it begins with says; where
  /// there is none, and in longer clusters, each character is looked up in the same way.
  std::string normalise(std::string_view text) const;

 private:
  std::optional<std::string_view> replacement(std::string_view part) const;
  void check() const;

  std::vector<uint32_t> units_;
  std::string pool_;
};

}  // namespace cambium::text
