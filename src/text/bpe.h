// Byte pair encoding: a piece of text starts as single symbols, and the neighbouring pair with the
// lowest rank (the leftmost of equals) is joined until no pair can be.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/token_table.h"

namespace cambium::text {

struct BpeConfig {
  /// Vocabulary: spelling and id, spellings distinct.
  std::vector<std::pair<std::string, int32_t>> vocab;
  /// Pairs of spellings, best first. The joined spelling must be in the vocabulary.
  std::vector<std::pair<std::string, std::string>> merges;
  /// Take a whole piece that is in the vocabulary without merging.
  bool ignore_merges = false;
  /// Symbols outside the vocabulary become tokens "<0xNN>" of their bytes.
  bool byte_fallback = false;
  /// Spelling of the token for symbols outside the vocabulary; empty: they vanish.
  std::string unknown;
  /// Neighbouring unknown symbols become one token.
  bool fuse_unknown = false;
  /// Pieces are raw bytes and the vocabulary spells them in the byte alphabet; else pieces are
  /// UTF-8 and each character is a symbol.
  bool byte_level = false;
};

class Bpe {
 public:
  explicit Bpe(const BpeConfig& config);

  /// Appends the tokens of `piece`. Thread-safe; recent short pieces are remembered per thread.
  void encode(std::string_view piece, std::vector<int32_t>& out) const;

 private:
  void merge(std::string_view piece, std::vector<int32_t>& out) const;
  void symbols(std::string_view piece, std::vector<int32_t>& out) const;
  void merge_short(std::vector<int32_t>& ids) const;
  void merge_long(std::vector<int32_t>& ids) const;

  TokenTable table_;
  MergeTable merges_;
  int32_t byte_ids_[256];  // the token of a byte, -1 if none
  int32_t unknown_ = -1;
  bool ignore_merges_;
  bool byte_fallback_;
  bool fuse_unknown_;
  bool byte_level_;
  uint32_t instance_;  // tells the thread's memory which vocabulary an entry belongs to
};

}  // namespace cambium::text
