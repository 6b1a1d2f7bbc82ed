// Configurations of models that have more than text, and the names of their tensors.
#include <set>

#include "base/error.h"
#include "model/families/config.h"

namespace cambium::config {

Json text_config(const Json& config, const std::string& where) {
  const auto it = config.find("text_config");
  expect(it != config.end() && it->is_object(), "{}: expected the object 'text_config'", where);
  Json text = *it;
  if (has(config, "tie_word_embeddings")) {
    text["tie_word_embeddings"] = config["tie_word_embeddings"];
  }
  for (const char* key : {"bos_token_id", "eos_token_id"}) {
    if (!has(text, key) && has(config, key)) {
      text[key] = config[key];
    }
  }
  return text;
}

Json composite_config(Json text, const char* architecture, const char* model_type) {
  text.erase("architectures");
  Json config;
  config["architectures"] = Json::array({architecture});
  config["model_type"] = model_type;
  config["tie_word_embeddings"] = text["tie_word_embeddings"];
  config["text_config"] = std::move(text);
  return config;
}

std::vector<TensorRule> tensors_under(std::vector<TensorRule> rules, std::string_view from,
                                      std::string_view to) {
  static std::set<std::string> names;  // rules point at names that live as long as the program
  for (TensorRule& rule : rules) {
    if (std::string_view theirs = rule.theirs; theirs.starts_with(from)) {
      theirs.remove_prefix(from.size());
      rule.theirs = names.insert(std::string(to) + std::string(theirs)).first->c_str();
    }
  }
  return rules;
}

}  // namespace cambium::config
