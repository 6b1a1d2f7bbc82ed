// The parts of tokenizer files that are values of their own. Error for what is not supported or out
// of range; a wrong shape is the JSON library's exception.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/unigram.h"

namespace cambium::text {

/// Ids index tables, so a stray huge one must not make us allocate.
inline constexpr int64_t kMaxId = int64_t{1} << 24;

/// The id of `token`, which errors name.
int32_t checked_id(const nlohmann::json& value, std::string_view token);

/// A row of added_tokens, but for its id.
AddedToken added_token(const nlohmann::json& spec);

/// A token named in tokenizer_config.json: a string or an object with its content.
std::optional<std::string> named_token(const nlohmann::json& config, const char* key);

/// What tokenizer.json's `model` says.
BpeConfig bpe_config(const nlohmann::json& model, bool byte_level);
UnigramConfig unigram_config(const nlohmann::json& model);

}  // namespace cambium::text
