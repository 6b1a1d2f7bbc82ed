// Compares a tokenizer with what another implementation produced.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace cambium {

/// One kind of check.
struct TokenizerCheck {
  size_t total = 0;
  size_t failed = 0;
};

struct TokenizerReport {
  TokenizerCheck encode;
  TokenizerCheck encode_special;  // with what the post-processor adds
  TokenizerCheck decode;
  TokenizerCheck chat;
  /// The first disagreements, a line or more each: the input, what was expected, what came.
  std::vector<std::string> mismatches;
  /// What to know about a reference that agrees; empty mostly.
  std::string note;

  size_t total() const { return encode.total + encode_special.total + decode.total + chat.total; }
  size_t failed() const {
    return encode.failed + encode_special.failed + decode.failed + chat.failed;
  }
  bool ok() const { return failed() == 0 && total() > 0; }
};

/// `reference_file` is JSON: {"cases": [{"text", "ids", "ids_with_special", "decoded"}...],
/// "chats":
/// [{"messages", "tools", "add_generation_prompt", "prompt"}...]}; a prompt of null means that the
/// template must refuse the messages. Fields that a case lacks are not checked. Where
/// tokenizer_config.json replaces tokenizer.json's post-processor (transformers does so, the
/// tokenizers library reads one file only), the special tokens of the reference are those of the
/// one or the other, in all of its cases; a note says when it is tokenizer.json alone. Throws Error
/// when a file cannot be read.
TokenizerReport verify_tokenizer(const std::filesystem::path& dir,
                                 const std::filesystem::path& reference_file,
                                 size_t max_mismatches = 10);

}  // namespace cambium
