#include "model/gguf/gguf_tokenizer_export.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "model/gguf/gguf_tokenizer.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

Json read_json(const std::filesystem::path& path) {
  return std::filesystem::exists(path)
             ? parse_json<Json>(read_text_file(path.string()), path.string(), {.python = true})
             : Json::object();
}

std::string type_of(const Json& step) {
  return step.is_object() ? step.value("type", "") : "";
}

/// The steps of a "Sequence", or the one step; none of null.
Json steps_of(const Json& part, const char* list) {
  if (part.is_null()) {
    return Json::array();
  }
  return type_of(part) == "Sequence" ? part.at(list) : Json::array({part});
}

/// Error that names the step which no name stands for.
TextCut cut_of(const Json& tokenizer, const std::string& where) {
  TextCut cut;
  cut.ignore_merges = tokenizer.at("model").value("ignore_merges", false);
  for (const Json& step : steps_of(tokenizer.value("normalizer", Json()), "normalizers")) {
    expect(type_of(step) == "NFC", "{}: the normalizer {} has no place in a GGUF file", where,
           type_of(step));
    cut.compose = true;
  }
  bool bytes = false;
  for (const Json& step : steps_of(tokenizer.value("pre_tokenizer", Json()), "pretokenizers")) {
    const std::string type = type_of(step);
    if (type == "Digits" && step.value("individual_digits", false)) {
      cut.splits.emplace_back(R"(\p{N})");
    } else if (type == "Split" && step.at("pattern").contains("Regex") &&
               step.value("behavior", "") == "Isolated" && !step.value("invert", false)) {
      cut.splits.push_back(step["pattern"]["Regex"].get<std::string>());
    } else if (type == "ByteLevel" && !step.value("add_prefix_space", true)) {
      bytes = true;
      if (step.value("use_regex", true)) {
        cut.splits.emplace_back(gpt2_split());
      }
    } else {
      fail("{}: the pre-tokenizer {} has no place in a GGUF file", where, step.dump());
    }
  }
  expect(bytes,
         "{}: expected byte-level BPE; other tokenizers (SentencePiece and its like) cannot be "
         "written as GGUF",
         where);
  return cut;
}

/// "left right" of either spelling.
std::vector<std::string> merges_of(const Json& model) {
  std::vector<std::string> merges;
  for (const Json& merge : model.at("merges")) {
    merges.push_back(merge.is_array()
                         ? merge.at(0).get<std::string>() + " " + merge.at(1).get<std::string>()
                         : merge.get<std::string>());
  }
  return merges;
}

struct Tokens {
  std::vector<std::string> texts;
  std::vector<int32_t> types;

  void put(int64_t id, const std::string& text, int32_t type, const std::string& where) {
    expect(id >= 0 && id < std::ssize(texts),
           "{}: token {} is outside the model's vocabulary of {}", where, id, texts.size());
    texts[static_cast<size_t>(id)] = text;
    types[static_cast<size_t>(id)] = type;
  }
};

Tokens tokens_of(const Json& tokenizer, int64_t vocabulary, const std::string& where) {
  Tokens tokens;
  for (int64_t id = 0; id < vocabulary; ++id) {
    tokens.texts.push_back(fmt::format("[PAD{}]", id));
    tokens.types.push_back(kUnusedToken);
  }
  for (const auto& [text, id] : tokenizer.at("model").at("vocab").items()) {
    tokens.put(id.get<int64_t>(), text, kNormalToken, where);
  }
  for (const Json& added : tokenizer.value("added_tokens", Json::array())) {
    tokens.put(added.at("id").get<int64_t>(), added.at("content").get<std::string>(),
               added.value("special", false) ? kControlToken : kUserDefinedToken, where);
  }
  return tokens;
}

/// The id of a token that tokenizer_config.json names, by its text or an object with it.
std::optional<int64_t> named(const Json& config, const char* key, const Tokens& tokens) {
  const Json value = config.value(key, Json());
  const Json text = value.is_object() ? value.value("content", Json()) : value;
  if (!text.is_string()) {
    return std::nullopt;
  }
  const auto it = std::find(tokens.texts.begin(), tokens.texts.end(), text.get<std::string>());
  return it == tokens.texts.end() ? std::nullopt : std::optional(it - tokens.texts.begin());
}

/// Whether the tokenizer puts a special token before (or after) a text.
bool adds(const Json& tokenizer, bool first) {
  for (const Json& step : steps_of(tokenizer.value("post_processor", Json()), "processors")) {
    if (type_of(step) == "TemplateProcessing" && !step.at("single").empty()) {
      const Json& single = step["single"];
      return (first ? single.front() : single.back()).contains("SpecialToken");
    }
  }
  return false;
}

}  // namespace

void put_tokenizer(GgufKeys& keys, const std::filesystem::path& folder, const ModelSpec& spec,
                   const std::string& pre) {
  const std::filesystem::path path = folder / "tokenizer.json";
  if (!std::filesystem::exists(path)) {
    keys.text("tokenizer.ggml.model", "none");
    return;
  }
  const std::string where = path.string();
  expect(pre.empty() || is_pre_tokenizer(pre), "--pre: '{}' is not one of llama.cpp's names", pre);
  const Json config = read_json(folder / "tokenizer_config.json");
  try {
    const Json tokenizer = read_json(path);
    const Json& model = tokenizer.at("model");
    expect(model.value("type", "BPE") == "BPE",
           "{}: expected byte-level BPE, got {}; it cannot be written as GGUF", where,
           model.value("type", ""));
    std::string name = pre;
    if (name.empty()) {
      name = pre_tokenizer_name(cut_of(tokenizer, where));
      expect(
          !name.empty(),
          "{}: llama.cpp has no name for how this tokenizer cuts text; give the nearest by --pre "
          "(such as qwen2 or smollm), and texts may then become other tokens there",
          where);
    }
    const Tokens tokens = tokens_of(tokenizer, spec.vocab, where);
    keys.text("tokenizer.ggml.model", "gpt2");
    keys.text("tokenizer.ggml.pre", name);
    keys.texts("tokenizer.ggml.tokens", tokens.texts);
    keys.i32s("tokenizer.ggml.token_type", tokens.types);
    keys.texts("tokenizer.ggml.merges", merges_of(model));
    const auto put_id = [&](const char* key, std::optional<int64_t> id, int64_t otherwise) {
      if (const int64_t value = id.value_or(otherwise); value >= 0) {
        keys.u32(fmt::format("tokenizer.ggml.{}_token_id", key), static_cast<uint32_t>(value));
      }
    };
    const int64_t end = spec.eos_ids.empty() ? -1 : spec.eos_ids.front();
    put_id("bos", named(config, "bos_token", tokens), spec.bos_id);
    put_id("eos", named(config, "eos_token", tokens), end);
    put_id("padding", named(config, "pad_token", tokens), -1);
    keys.flag("tokenizer.ggml.add_bos_token", adds(tokenizer, true));
    keys.flag("tokenizer.ggml.add_eos_token", adds(tokenizer, false));
  } catch (const Json::exception& problem) {
    fail("{}: {}", where, json_problem(problem));
  }
  const std::filesystem::path chat = folder / "chat_template.jinja";
  const Json inside = config.value("chat_template", Json());
  if (std::filesystem::exists(chat)) {
    keys.text("tokenizer.chat_template", read_text_file(chat.string()));
  } else if (inside.is_string()) {
    keys.text("tokenizer.chat_template", inside.get<std::string>());
  }
}

}  // namespace cambium
