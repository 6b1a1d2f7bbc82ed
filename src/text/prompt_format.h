// How a question stands in front of its answer for models without a chat template. Training and
// evaluation share it, so that a model is asked in exactly the form it has learned.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace cambium {

/// "question\n"; the answer follows, then the tokenizer's end token.
inline std::string question_prompt(std::string_view question) {
  return std::string(question) + "\n";
}

/// The prompt's tokens, from which generation continues with the answer. Prompt and answer are
/// encoded apart, so that the prompt's tokens do not depend on what follows.
inline std::vector<int32_t> question_tokens(const Tokenizer& tokenizer, std::string_view question) {
  return tokenizer.encode(question_prompt(question), true);
}

}  // namespace cambium
