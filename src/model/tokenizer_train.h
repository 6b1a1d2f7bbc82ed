// Making a byte-level BPE tokenizer from text, for models trained from scratch (Sennrich et al.
// 2016, arXiv 1508.07909, over bytes as in GPT-2).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cambium {

struct TokenizerFiles {
  std::string tokenizer_json;
  std::string config_json;
};

/// Words (a letter run with the blank before it) and runs of other signs are the pieces; digits
/// always stand alone. The vocabulary is `special` (the first is also the end token), the 256
/// bytes, and the most frequent merges up to `vocab_size`. Deterministic. Error when vocab_size is
/// below special.size() + 256.
TokenizerFiles train_tokenizer(const std::vector<std::string>& texts, int64_t vocab_size,
                               const std::vector<std::string>& special,
                               const std::string& chat_template);

}  // namespace cambium
