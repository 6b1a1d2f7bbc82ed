// A model against a few values of its reference implementation, where whole logits would be too
// large to keep: real models have 150,000 tokens.
#pragma once

#include <string>
#include <vector>

#include "model/model.h"

namespace cambium {

struct ValuesRow {
  std::string text;  // its first characters
  int64_t tokens = 0;
  double nll_error = 0.0;    // largest difference of a token's negative log-likelihood
  double logit_error = 0.0;  // largest difference of the listed logits after the last token
  int64_t greedy_same = 0;   // leading tokens of the greedy continuation that agree
  int64_t greedy_tokens = 0;
  bool ok = false;
};

struct ValuesConfig {
  double max_nll_error = 1e-3;
  double max_logit_error = 1e-2;
};

/// Reads {"cases": [{"text", "ids", "nll" (of each next token), "last_top_ids", "last_top_logits",
/// "greedy"}]}; "text" and what follows "nll" may be missing. An Error says what the file should
/// hold.
std::vector<ValuesRow> verify_values(Model& model, const std::string& json_file,
                                     const ValuesConfig& config = {});

}  // namespace cambium
