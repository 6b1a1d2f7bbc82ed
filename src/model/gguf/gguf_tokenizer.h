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

/// How a byte-level tokenizer cuts and joins text, as tokenizer.json says it.
struct TextCut {
  std::vector<std::string> splits;  ///< expressions, each isolates its matches in what is left
  bool ignore_merges = false;
  bool compose = false;  ///< Unicode NFC first
};

/// GPT-2's expression, which ByteLevel stands for with use_regex.
const char* gpt2_split();
/// The name of this cut in tokenizer.ggml.pre; empty where there is none.
std::string pre_tokenizer_name(const TextCut& cut);
/// Whether the name is known here.
bool is_pre_tokenizer(const std::string& name);

/// The kinds of tokens in tokenizer.ggml.token_type.
enum GgufTokenType : int32_t {
  kNormalToken = 1,
  kUnknownToken = 2,
  kControlToken = 3,
  kUserDefinedToken = 4,
  kUnusedToken = 5,
  kByteToken = 6
};

}  // namespace cambium
