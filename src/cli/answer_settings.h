// What a line of prompts may say of its own answer, in place of the command's options.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "cli/options.h"

namespace cambium {

struct AnswerSettings {
  SamplingOptions sampling;
  int64_t max_new_tokens = 256;
  int64_t logprobs = 0;           // as GenerationRequest's
  std::vector<std::string> stop;  // texts that end the answer and are no part of it
};

/// `settings` with what the object `json` names: temperature, top_k, top_p, min_p,
/// repetition_penalty, presence_penalty, frequency_penalty, seed, max_new_tokens, logprobs, and
/// stop, a text or a list of them. Error, which begins with `where`, for any other key or value.
AnswerSettings settings_of_line(const nlohmann::json& json, const std::string& where,
                                AnswerSettings settings);

}  // namespace cambium
