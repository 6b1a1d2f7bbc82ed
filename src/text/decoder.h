// The `decoder` part of tokenizer.json: how tokens become text again.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace cambium::text {

struct TokenDecoder {
  /// Each rewrites the bytes of one token.
  std::vector<std::function<std::string(std::string)>> steps;
  /// Put between tokens.
  std::string separator;
  /// Taken away once from the start of the whole text when it is there.
  std::string strip_start;

  std::string token(std::string text) const {
    for (const auto& step : steps) {
      text = step(std::move(text));
    }
    return text;
  }
};

/// `spec` is the JSON value (null allowed). Throws Error for a type that is not supported.
TokenDecoder make_decoder(const nlohmann::json& spec);

}  // namespace cambium::text
