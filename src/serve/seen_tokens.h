// SeenTokens: the tokens of a sequence, each once, with how often it was generated.
#pragma once

#include <span>
#include <unordered_map>
#include <vector>

#include "ops/sampling/sampling.h"

namespace cambium {

class SeenTokens {
 public:
  void add(int32_t token, bool generated) {
    const auto [at, fresh] = place_.try_emplace(token, tokens_.size());
    if (fresh) {
      tokens_.push_back({token, 0});
    }
    tokens_[at->second].generated += generated ? 1 : 0;
  }
  std::span<const SeenToken> tokens() const { return tokens_; }

 private:
  std::vector<SeenToken> tokens_;              // in the order they came
  std::unordered_map<int32_t, size_t> place_;  // in tokens_
};

}  // namespace cambium
