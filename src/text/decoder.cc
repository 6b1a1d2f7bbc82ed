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

/// "<0x0A>" is the byte 10; any other token is itself.
std::string byte_fallback(std::string token) {
  if (token.size() == 6 && token.starts_with("<0x") && token[5] == '>') {
    const int high = hex_digit(token[3]);
    const int low = hex_digit(token[4]);
    if (high >= 0 && low >= 0) {
      return std::string(1, static_cast<char>(high * 16 + low));
    }
  }
  return token;
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
    out.steps.emplace_back(byte_fallback);
  } else if (type == "Fuse") {
    // Tokens are put together in any case.
  } else if (type == "Replace") {
    const auto pattern = std::make_shared<const Pattern>(Pattern::from_json(spec.at("pattern")));
    out.steps.emplace_back([pattern, content = spec.at("content").get<std::string>()](
                               std::string token) { return pattern->replace(token, content); });
  } else if (type == "Strip" && spec.value("stop", 0) == 0 && spec.value("start", 0) == 1) {
    out.strip_start = spec.at("content").get<std::string>();
  } else if (type == "Metaspace") {
    const std::string mark = spec.value("replacement", "\u2581");
    const auto pattern = std::make_shared<const Pattern>(Pattern::from_string(mark));
    out.steps.emplace_back([pattern](std::string token) { return pattern->replace(token, " "); });
    if (spec.value("prepend_scheme", "always") != "never") {
      out.strip_start = " ";
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

TokenDecoder make_decoder(const json& spec) {
  TokenDecoder out;
  if (spec.is_null()) {
    out.separator = " ";
  } else {
    append_steps(spec, out);
  }
  return out;
}

}  // namespace cambium::text
