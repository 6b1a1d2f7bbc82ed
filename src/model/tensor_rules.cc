#include "model/tensor_rules.h"

#include "base/error.h"
#include "model/spec.h"

namespace cambium {
namespace {

std::string fill(std::string_view pattern, const std::vector<std::string_view>& captures) {
  std::string text;
  size_t next = 0;
  for (const char c : pattern) {
    if (c == '*') {
      CAMBIUM_CHECK(next < captures.size(), "{} has more stars than its rule", pattern);
      text += captures[next++];
    } else {
      text += c;
    }
  }
  return text;
}

/// Layer of "layers.N....".
const LayerSpec* layer_of(const ModelSpec& spec, std::string_view ours) {
  std::vector<std::string_view> captures;
  if (!match_pattern("layers.*.*", ours, &captures)) {
    return nullptr;
  }
  return &spec.layers.at(std::stoul(std::string(captures[0])));
}

}  // namespace

bool match_pattern(std::string_view pattern, std::string_view text,
                   std::vector<std::string_view>* captures) {
  while (!pattern.empty()) {
    if (pattern.front() != '*') {
      if (text.empty() || text.front() != pattern.front()) {
        return false;
      }
      pattern.remove_prefix(1);
      text.remove_prefix(1);
      continue;
    }
    pattern.remove_prefix(1);
    // A star takes up to where the literal text after it first stands.
    const std::string_view literal = pattern.substr(0, pattern.find('*'));
    const size_t end = literal.empty() ? text.size() : text.find(literal, 1);
    if (text.empty() || end == std::string_view::npos) {
      return false;
    }
    if (captures != nullptr) {
      captures->push_back(text.substr(0, end));
    }
    text.remove_prefix(end);
  }
  return text.empty();
}

std::vector<StoredName> stored_names(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                     const std::string& ours) {
  std::vector<StoredName> names;
  for (const TensorRule& rule : rules) {
    std::vector<std::string_view> captures;
    if ((rule.tied && !spec.tied_head) || !match_pattern(rule.ours, ours, &captures)) {
      continue;
    }
    if (!rule.mixer.empty()) {
      const LayerSpec* layer = layer_of(spec, ours);
      if (layer == nullptr || !layer->mixes_by(rule.mixer)) {
        continue;
      }
    }
    names.push_back({fill(rule.theirs, captures), rule.part, rule.parts});
  }
  CAMBIUM_CHECK(!names.empty(), "no rule of {} names the tensor of {}", spec.family, ours);
  return names;
}

}  // namespace cambium
