// The `decoder` part of tokenizer.json: how tokens become text again.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "text/normalizer.h"

namespace cambium::text {

struct TokenDecoder {
  /// Each rewrites the bytes of one token.
  std::vector<std::function<std::string(std::string)>> steps;
  /// Put between tokens.
  std::string separator;
  /// Tokens "<0xNN>" are bytes: a run of them that is no UTF-8 becomes a replacement character for
  /// each.
  bool byte_fallback = false;
  /// Every one of these in the first token goes, instead of becoming a blank (Metaspace).
  std::string first_mark;
  /// Taken away once from the start of the whole text when it is there.
  std::string strip_start;

  std::string token(std::string text) const {
    for (const auto& step : steps) {
      text = step(std::move(text));
      expect_bounded(text.size());
    }
    return text;
  }
  /// The same of a token that is the first.
  std::string first_token(std::string text) const;
  /// Whether a spelling is "<0xNN>".
  static bool is_byte(std::string_view spelling);
};

/// `spec` is the JSON value (null allowed). Throws Error for a type that is not supported.
TokenDecoder make_decoder(const nlohmann::json& spec);

}  // namespace cambium::text
