// The tokenizer inside a GGUF file (byte-level BPE, SentencePiece's BPE and unigram models) as
// Hugging Face's tokenizer files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "files/gguf.h"

namespace cambium {

struct GgufTokenizerFiles {
  std::string tokenizer_json;
  std::string tokenizer_config_json;
  std::string generation_config_json;
  std::vector<std::string> notes;     ///< guesses that were made, for the user
  std::vector<std::string> warnings;  ///< what will be refused later, and what to do about it
};

/// `vocabulary`: rows of the embedding; the tokenizer may have fewer tokens, not more.
GgufTokenizerFiles tokenizer_from_gguf(const Gguf& gguf, int64_t vocabulary);

}  // namespace cambium
