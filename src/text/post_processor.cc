#include "text/post_processor.h"

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace cambium::text {
namespace {

using nlohmann::json;

int32_t token_id(const json& value) {
  expect(
      value.is_number_integer() && value.get<int64_t>() >= 0 && value.get<int64_t>() <= INT32_MAX,
      "[tokenizer] post_processor: expected the id of a token, got {}", value.dump());
  return value.get<int32_t>();
}

PostProcessor from_template(const json& spec) {
  PostProcessor out;
  bool seen_text = false;
  for (const json& item : spec.at("single")) {
    if (item.contains("Sequence")) {
      expect(!seen_text, "[tokenizer] post_processor puts the text twice: {}", spec.dump());
      seen_text = true;
      continue;
    }
    const std::string name = item.at("SpecialToken").at("id").get<std::string>();
    const json& special = spec.at("special_tokens");
    expect(special.contains(name), "[tokenizer] post_processor names {:?}, not in special_tokens",
           name);
    for (const json& id : special.at(name).at("ids")) {
      (seen_text ? out.after : out.before).push_back(token_id(id));
    }
  }
  expect(seen_text, "[tokenizer] post_processor leaves the text out: {}", spec.dump());
  return out;
}

}  // namespace

PostProcessor make_post_processor(const json& spec) {
  if (spec.is_null()) {
    return {};
  }
  const std::string type = spec.at("type").get<std::string>();
  if (type == "TemplateProcessing") {
    return from_template(spec);
  }
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    return {{token_id(spec.at("cls").at(1))}, {token_id(spec.at("sep").at(1))}};
  }
  if (type == "ByteLevel") {  // only moves offsets
    return {};
  }
  if (type == "Sequence") {  // a later processor wraps the result of an earlier one
    PostProcessor out;
    for (const json& item : spec.at("processors")) {
      const PostProcessor step = make_post_processor(item);
      out.before.insert(out.before.begin(), step.before.begin(), step.before.end());
      out.after.insert(out.after.end(), step.after.begin(), step.after.end());
    }
    return out;
  }
  fail(
      "[tokenizer] post_processor type {:?} is not supported; expected TemplateProcessing, "
      "ByteLevel, "
      "Sequence, BertProcessing or RobertaProcessing",
      type);
}

}  // namespace cambium::text
