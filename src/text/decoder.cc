#include "text/decoder.h"

#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "text/pattern.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

using nlohmann::json;

int hex_digit(char c) {
  if (c >= '0' && c <= '9') {
    return c - '0';
  }
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/// The byte that "<0x0A>" stands for, or -1 of any other token.
int byte_value(std::string_view token) {
  if (token.size() == 6 && token.starts_with("<0x") && token[5] == '>') {
    const int high = hex_digit(token[3]);
    const int low = hex_digit(token[4]);
    return high >= 0 && low >= 0 ? high * 16 + low : -1;
  }
  return -1;
}

std::string byte_of(std::string token) {
  const int value = byte_value(token);
  return value >= 0 ? std::string(1, static_cast<char>(value)) : token;
}

std::string byte_level(std::string token) {
  std::string bytes;
  return alphabet_to_bytes(token, bytes) ? bytes : token;
}

void append_steps(const json& spec, TokenDecoder& out) {
  const std::string type = spec.at("type").get<std::string>();
  if (type == "Sequence") {
    for (const json& item : spec.at("decoders")) {
      append_steps(item, out);
    }
  } else if (type == "ByteLevel") {
    out.steps.emplace_back(byte_level);
  } else if (type == "ByteFallback") {
    out.steps.emplace_back(byte_of);
    out.byte_fallback = true;
  } else if (type == "Fuse") {
    // Tokens are put together in any case.
  } else if (type == "Replace") {
    const auto pattern = std::make_shared<const Pattern>(Pattern::from_json(spec.at("pattern")));
    out.steps.emplace_back([pattern, content = spec.at("content").get<std::string>()](
                               std::string token) { return pattern->replace(token, content); });
  } else if (type == "Strip" && spec.value("stop", json(0)) == 0 &&
             spec.value("start", json(0)) == 1) {
    out.strip_start = spec.at("content").get<std::string>();
  } else if (type == "Metaspace") {
    const std::string mark = spec.value("replacement", "\u2581");
    const auto pattern = std::make_shared<const Pattern>(Pattern::from_string(mark));
    out.steps.emplace_back([pattern](std::string token) { return pattern->replace(token, " "); });
    if (spec.value("prepend_scheme", "always") != "never") {
      out.first_mark = mark;
    }
  } else {
    fail(
        "[tokenizer] decoder type {:?} is not supported; expected Sequence, ByteLevel, "
        "ByteFallback, "
        "Fuse, Replace, Strip of one character at the start, or Metaspace",
        type);
  }
}

}  // namespace

std::string TokenDecoder::first_token(std::string text) const {
  if (!first_mark.empty()) {
    text = Pattern::from_string(first_mark).replace(text, "");
  }
  return token(std::move(text));
}

bool TokenDecoder::is_byte(std::string_view spelling) {
  return byte_value(spelling) >= 0;
}

TokenDecoder make_decoder(const json& spec) {
  TokenDecoder out;
  if (spec.is_null()) {
    out.separator = std::string(1, ' ');
  } else {
    append_steps(spec, out);
  }
  return out;
}

}  // namespace cambium::text
