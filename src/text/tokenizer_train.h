// Making a byte-level BPE tokenizer from text, for models trained from scratch (Sennrich et al.
// 2016, arXiv 1508.07909, over bytes as in GPT-2).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace cambium {

/// Words with the blank before them, digits one by one, runs of punctuation, newlines. The last
/// blank of a run goes to the word behind it.
extern const char* const kDefaultSplitPattern;

struct BpeTraining {
  /// Ids in all: special tokens, 256 bytes, and one for every merge learnt.
  int64_t vocab_size = 4096;
  /// Get the first ids, in order.
  std::vector<std::string> special_tokens;
  /// In Oniguruma's dialect. Digits are single tokens whatever it says.
  std::string pattern = kDefaultSplitPattern;
  /// A pair seen less often is not joined; the vocabulary may then stay smaller.
  int64_t min_count = 2;
};

/// The text of a tokenizer.json that Hugging Face's library loads too. The same texts in any order
/// give the same file.
std::string train_bpe(std::span<const std::string> texts, const BpeTraining& training);

struct TokenizerFiles {
  std::string tokenizer_json;
  std::string config_json;
};

/// train_bpe with the default pattern, and a tokenizer_config.json that names the first special
/// token as the end token and holds the chat template (empty: none). Error when there is no special
/// token or vocab_size is below special.size() + 256.
TokenizerFiles train_tokenizer(const std::vector<std::string>& texts, int64_t vocab_size,
                               const std::vector<std::string>& special,
                               const std::string& chat_template);

}  // namespace cambium
