#include "text/normalizer.h"

#include <memory>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "base/base64.h"
#include "base/error.h"
#include "text/charsmap.h"
#include "text/pattern.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

using nlohmann::json;

std::string strip(std::string text, bool left, bool right) {
  size_t begin = 0;
  while (left && begin < text.size()) {
    const Decoded d = decode_utf8(text, begin);
    if (!is_white_space(d.code_point)) {
      break;
    }
    begin += d.length;
  }
  size_t end = text.size();
  while (right && end > begin) {
    size_t previous = end - 1;
    while (previous > begin && (static_cast<unsigned char>(text[previous]) & 0xC0) == 0x80) {
      --previous;
    }
    if (!is_white_space(decode_utf8(text, previous).code_point)) {
      break;
    }
    end = previous;
  }
  return text.substr(begin, end - begin);
}

Normalizer sequence(const json& spec) {
  std::vector<Normalizer> steps;
  for (const json& item : spec.at("normalizers")) {
    if (Normalizer step = make_normalizer(item)) {
      steps.push_back(std::move(step));
    }
  }
  if (steps.empty()) {
    return nullptr;
  }
  return [steps = std::move(steps)](std::string text) {
    for (const Normalizer& step : steps) {
      text = step(std::move(text));
      expect_bounded(text.size());
    }
    return text;
  };
}

Normalizer replace(const json& spec) {
  const auto pattern = std::make_shared<const Pattern>(Pattern::from_json(spec.at("pattern")));
  return [pattern, content = spec.at("content").get<std::string>()](std::string text) {
    return pattern->replace(text, content);
  };
}

}  // namespace

void expect_bounded(size_t bytes) {
  constexpr size_t kMost = size_t{256} << 20;
  expect(bytes <= kMost,
         "[tokenizer] the normalizer or decoder of tokenizer.json makes more than {} MiB of one "
         "text",
         kMost >> 20);
}

Normalizer make_normalizer(const json& spec) {
  if (spec.is_null()) {
    return nullptr;
  }
  const std::string type = spec.at("type").get<std::string>();
  if (type == "Sequence") {
    return sequence(spec);
  }
  if (type == "NFC") {
    return to_nfc;
  }
  if (type == "NFD") {
    return to_nfd;
  }
  if (type == "NFKC") {
    return to_nfkc;
  }
  if (type == "NFKD") {
    return to_nfkd;
  }
  if (type == "Lowercase") {
    return to_lower;
  }
  if (type == "Strip") {
    return [left = spec.at("strip_left").get<bool>(), right = spec.at("strip_right").get<bool>()](
               std::string text) { return strip(std::move(text), left, right); };
  }
  if (type == "Prepend") {
    return [prefix = spec.at("prepend").get<std::string>()](std::string text) {
      return text.empty() ? text : prefix + text;
    };
  }
  if (type == "Replace") {
    return replace(spec);
  }
  if (type == "Precompiled") {
    const auto encoded = spec.at("precompiled_charsmap").get<std::string>();
    const auto map = std::make_shared<const Charsmap>(
        from_base64(encoded, "[tokenizer] the charsmap of normalizer Precompiled"));
    return [map](const std::string& text) { return map->normalise(text); };
  }
  fail(
      "[tokenizer] normalizer type {:?} is not supported; expected Sequence, NFC, NFD, NFKC, NFKD, "
      "Lowercase, Strip, Prepend, Replace or Precompiled",
      type);
}

}  // namespace cambium::text
