// Whether a model computes what a reference says, by every way through it that serving takes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"

namespace cambium {

struct VerifyConfig {
  double max_error = 2e-4;  // largest |difference| of a logit over the reference's deviation
  double max_kl = 1e-3;     // KL(reference || ours), mean over the tokens of a prompt
  bool same_greedy = true;  // greedy answers must be the reference's
  int64_t page_size = 16;
};

/// What a model whose matrices, and on a GPU its activations, are rounded to bf16 is held to: KL
/// alone, 2e-3 a token. Where experts or keys are chosen rounding turns a choice now and then, and
/// that token becomes another one: 0.45, twice what PyTorch's bf16 has on the worst of
/// tests/fixtures.
VerifyConfig bf16_bounds(const ModelSpec& spec);

/// One way of running the prompts: the worst of all prompts it applies to.
struct VerifyRow {
  std::string way;  // "full forward", "split at 63", "token by token"
  int64_t prompts = 0;
  int64_t tokens = 0;
  double error = 0.0;  // over the standard deviation of the prompt's reference logits
  double kl = 0.0;
  int64_t same_choice = 0;  // tokens with the reference's largest logit
  int64_t greedy_tokens = 0;
  int64_t greedy_same = 0;  // of the reference's continuations, up to the first difference
  bool ok = false;
};

struct VerifyReport {
  std::vector<VerifyRow> rows;
  bool ok() const;
};

/// Runs tokens.K, logits.K and, where there, greedy.K of a .safetensors file (K = 0, 1, ...).
/// Error when the file has none or does not fit the model.
VerifyReport verify_model(Model& model, const std::string& reference_file,
                          const VerifyConfig& config = {});

/// Whether a cache changes what the model says: its own logits of each text, read at once and
/// without one, are the reference for the same text through a cache by the same ways.
/// `label`: of the progress line; empty = none.
VerifyReport verify_cached(Model& model, const std::vector<std::vector<int32_t>>& texts,
                           const VerifyConfig& config = {}, const std::string& label = "");

}  // namespace cambium
