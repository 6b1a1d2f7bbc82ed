// The unigram model of SentencePiece: a piece of text is cut into the tokens whose scores (log
// probabilities) have the largest sum. Kudo 2018, arXiv 1804.10959; ties and unknown characters as
// in Hugging Face tokenizers.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/token_table.h"

namespace cambium::text {

struct UnigramConfig {
  /// Spelling and score; the place in the list is the id.
  std::vector<std::pair<std::string, double>> vocab;
  /// Id of the token for what no token spells, or -1: then such text is an Error.
  int32_t unknown = -1;
  /// What no token spells becomes tokens "<0xNN>" of its bytes, where all of them exist.
  bool byte_fallback = false;
};

class Unigram {
 public:
  explicit Unigram(const UnigramConfig& config);

  /// Appends the tokens of `piece`, which is UTF-8. Thread-safe.
  void encode(std::string_view piece, std::vector<int32_t>& out) const;

 private:
  void unknown(std::string_view part, std::vector<int32_t>& out) const;

  MergeTable children_;         // (node, byte) -> node of the trie of spellings; the root is 0
  std::vector<int32_t> token_;  // by node: the id of the spelling that ends there, or -1
  std::vector<double> scores_;
  double unknown_score_ = 0.0;
  int32_t unknown_;
  int32_t byte_ids_[256];  // the token of a byte, -1 if none
  bool byte_fallback_;
};

}  // namespace cambium::text
