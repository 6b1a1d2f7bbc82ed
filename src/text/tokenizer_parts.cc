#include "text/tokenizer_parts.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace cambium::text {
namespace {

using nlohmann::json;

std::pair<std::string, std::string> merge_pair(const json& merge) {
  if (merge.is_array() && merge.size() == 2) {
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  }
  if (merge.is_string()) {
    const auto& both = merge.get_ref<const std::string&>();
    const size_t blank = both.find(' ');
    if (blank != std::string::npos && both.find(' ', blank + 1) == std::string::npos) {
      return {both.substr(0, blank), both.substr(blank + 1)};
    }
  }
  fail("[tokenizer] expected a merge \"a b\" or [\"a\", \"b\"], got {}", merge.dump());
}

}  // namespace

int32_t checked_id(const json& value, std::string_view token) {
  expect(value.is_number_integer() && value.get<int64_t>() >= 0 && value.get<int64_t>() < kMaxId,
         "[tokenizer] expected the id of {:?} between 0 and {}, got {}", token, kMaxId - 1,
         value.dump());
  return value.get<int32_t>();
}

AddedToken added_token(const json& spec) {
  AddedToken token;
  token.content = spec.at("content").get<std::string>();
  token.special = spec.value("special", false);
  token.normalized = spec.value("normalized", !token.special);
  token.single_word = spec.value("single_word", false);
  token.lstrip = spec.value("lstrip", false);
  token.rstrip = spec.value("rstrip", false);
  return token;
}

std::optional<std::string> named_token(const json& config, const char* key) {
  const auto found = config.find(key);
  if (found == config.end()) {
    return std::nullopt;
  }
  if (found->is_string()) {
    return found->get<std::string>();
  }
  if (found->is_object() && found->contains("content")) {
    return found->at("content").get<std::string>();
  }
  return std::nullopt;
}

BpeConfig bpe_config(const json& model, bool byte_level) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto found = model.find(key);
    expect(found == model.end() || found->is_null() || found->dump() == "\"\"",
           "[tokenizer] model.{} is not supported, got {}", key,
           found == model.end() ? "" : found->dump());
  }
  const auto dropout = model.find("dropout");
  expect(dropout == model.end() || dropout->is_null() || *dropout == 0.0,
         "[tokenizer] model.dropout makes ids random; set it to null in tokenizer.json");
  BpeConfig config;
  config.byte_level = byte_level;
  config.ignore_merges = model.value("ignore_merges", false);
  config.byte_fallback = model.value("byte_fallback", false);
  config.fuse_unknown = model.value("fuse_unk", false);
  if (model.contains("unk_token") && !model.at("unk_token").is_null()) {
    config.unknown = model.at("unk_token").get<std::string>();
  }
  for (const auto& [token, id] : model.at("vocab").items()) {
    config.vocab.emplace_back(token, checked_id(id, token));
  }
  for (const json& merge : model.at("merges")) {
    config.merges.push_back(merge_pair(merge));
  }
  return config;
}

UnigramConfig unigram_config(const json& model) {
  UnigramConfig config;
  for (const json& token : model.at("vocab")) {
    expect(token.is_array() && token.size() == 2 && token[0].is_string() && token[1].is_number(),
           "[tokenizer] expected a token [\"text\", score] in a Unigram vocabulary, got {}",
           shortened(token.dump()));
    config.vocab.emplace_back(token[0].get<std::string>(), token[1].get<double>());
  }
  expect(config.vocab.size() < static_cast<size_t>(kMaxId),
         "[tokenizer] expected fewer than {} tokens, got {}", kMaxId, config.vocab.size());
  if (const auto id = model.find("unk_id"); id != model.end() && !id->is_null()) {
    config.unknown = checked_id(*id, "unk_id");
  }
  config.byte_fallback = model.value("byte_fallback", false);
  return config;
}

}  // namespace cambium::text
