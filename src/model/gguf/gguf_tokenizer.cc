#include "model/gguf/gguf_tokenizer.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>

#include "base/error.h"
#include "base/text.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

// How models cut text before byte pair encoding. The expressions are those of the models' own
// tokenizer.json; each one isolates its matches in what the one before left whole.
constexpr const char* kGpt2 =
    R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDeepseek3 =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+)"
    R"(| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct PreTokenizer {
  std::vector<const char*> names;  // in tokenizer.ggml.pre
  std::vector<const char*> splits;
  bool ignore_merges = false;  // a whole word that is a token is taken as it is
  bool begin_token = false;    // added even where the file does not say so
  bool compose = false;        // Unicode NFC first
};

const std::vector<PreTokenizer>& pre_tokenizers() {
  static const std::vector<PreTokenizer> rows = {
      {{"gpt-2", "default", "phi-2", "mpt", "olmo"}, {kGpt2}},
      {{"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"},
       {R"(\p{N})", kGpt2}},
      {{"llama-bpe", "llama3", "llama-v3", "falcon3"}, {kLlama3}, true, true},
      {{"dbrx", "smaug-bpe"}, {kLlama3}},
      {{"qwen2", "deepseek-r1-qwen"}, {kQwen2}, false, false, true},
      {{"stablelm2"}, {kQwen2}},
      {{"tekken"}, {kTekken}, true, true},
      {{"deepseek-v3"}, {R"(\p{N}{1,3})", "[一-龥\u3040-ゟ゠-ヿ]+", kDeepseek3}},
      {{"deepseek-coder"},
       {"[\r\n]", R"(\s?\p{L}+)", R"(\s?\p{P}+)", "[一-龥ࠀ-一가-퟿]+", R"(\p{N})"}},
  };
  return rows;
}

const PreTokenizer& pre_tokenizer(const Gguf& gguf, const std::string& name) {
  std::vector<std::string> known;
  for (const PreTokenizer& row : pre_tokenizers()) {
    for (const char* row_name : row.names) {
      if (name == row_name) return row;
      known.emplace_back(row_name);
    }
  }
  fail("{}: the pre-tokeniser 'tokenizer.ggml.pre' is '{}', which is not known; expected one of {}",
       gguf.path(), name, join(known, ", "));
}

enum TokenType : std::int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4 };

/// What the file says about its vocabulary, checked.
struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<std::int64_t> types;
  std::vector<std::string> merges;  // "left right"
};

Vocabulary read_vocabulary(const Gguf& gguf, std::int64_t rows) {
  const std::string& path = gguf.path();
  const std::string model = gguf.text("tokenizer.ggml.model").value_or("(none)");
  expect(model == "gpt2",
         "{}: the tokenizer ('tokenizer.ggml.model') is '{}'; only byte-level BPE ('gpt2') can be "
         "imported",
         path, model);
  auto tokens = gguf.texts("tokenizer.ggml.tokens");
  auto merges = gguf.texts("tokenizer.ggml.merges");
  expect(tokens.has_value(), "{}: the key 'tokenizer.ggml.tokens' is missing", path);
  expect(merges.has_value(), "{}: the key 'tokenizer.ggml.merges' is missing", path);
  Vocabulary vocabulary{std::move(*tokens), {}, std::move(*merges)};
  vocabulary.types = gguf.integers("tokenizer.ggml.token_type")
                         .value_or(std::vector<std::int64_t>(vocabulary.tokens.size(), kNormal));
  expect(vocabulary.types.size() == vocabulary.tokens.size(),
         "{}: 'tokenizer.ggml.token_type' has {} entries for {} tokens", path,
         vocabulary.types.size(), vocabulary.tokens.size());
  expect(static_cast<std::int64_t>(vocabulary.tokens.size()) <= rows,
         "{}: there are {} tokens, but token_embd.weight has only {} rows", path,
         vocabulary.tokens.size(), rows);
  return vocabulary;
}

/// Token ids by text; BPE over them needs every merge's parts and result.
void check_vocabulary(const Gguf& gguf, const Vocabulary& vocabulary) {
  std::unordered_map<std::string_view, std::size_t> ids;
  for (std::size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const auto [found, added] = ids.emplace(vocabulary.tokens[id], id);
    expect(added, "{}: the tokens {} and {} are both '{}'", gguf.path(), found->second, id,
           vocabulary.tokens[id]);
  }
  for (std::size_t i = 0; i < vocabulary.merges.size(); ++i) {
    const std::string_view merge = vocabulary.merges[i];
    // Byte-level tokens have no space in them (byte 32 is spelled 'Ġ').
    const std::size_t space = merge.find(' ');
    const bool two = space != std::string_view::npos && space > 0 && space + 1 < merge.size() &&
                     merge.find(' ', space + 1) == std::string_view::npos;
    expect(two, "{}: merge {} is '{}', expected two tokens and a space between them", gguf.path(),
           i, merge);
    const std::string whole =
        std::string(merge.substr(0, space)) + std::string(merge.substr(space + 1));
    for (const std::string_view part :
         {merge.substr(0, space), merge.substr(space + 1), std::string_view(whole)}) {
      expect(ids.contains(part), "{}: merge {} ('{}') needs the token '{}', which does not exist",
             gguf.path(), i, merge, part);
    }
  }
}

/// A token that the file names by id ("bos"), or nothing.
std::optional<std::int64_t> special_id(const Gguf& gguf, const Vocabulary& vocabulary,
                                       const std::string& key) {
  const std::optional<std::int64_t> id = gguf.integer(key);
  expect(!id || (*id >= 0 && *id < static_cast<std::int64_t>(vocabulary.tokens.size())),
         "{}: '{}' is {}, but there are {} tokens", gguf.path(), key, id.value_or(0),
         vocabulary.tokens.size());
  return id;
}

Json pre_tokenizer_json(const PreTokenizer& pre) {
  Json steps = Json::array();
  for (const char* split : pre.splits) {
    steps.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", split}}},
                     {"behavior", "Isolated"},
                     {"invert", false}});
  }
  steps.push_back({{"type", "ByteLevel"},
                   {"add_prefix_space", false},
                   {"trim_offsets", true},
                   {"use_regex", false}});
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

/// Puts the begin and end tokens around a text (and around each of a pair).
Json template_json(const Vocabulary& vocabulary, std::optional<std::int64_t> bos,
                   std::optional<std::int64_t> eos) {
  Json single = Json::array();
  Json pair = Json::array();
  Json tokens = Json::object();
  const auto add = [&](Json* list, std::optional<std::int64_t> id, int type) {
    if (!id) return;
    const std::string& text = vocabulary.tokens[static_cast<std::size_t>(*id)];
    list->push_back({{"SpecialToken", {{"id", text}, {"type_id", type}}}});
    tokens[text] = {{"id", text}, {"ids", {*id}}, {"tokens", {text}}};
  };
  const auto part = [&](Json* list, const char* name, int type) {
    add(list, bos, type);
    list->push_back({{"Sequence", {{"id", name}, {"type_id", type}}}});
    add(list, eos, type);
  };
  part(&single, "A", 0);
  part(&pair, "A", 0);
  part(&pair, "B", 1);
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", pair},
          {"special_tokens", tokens}};
}

}  // namespace

GgufTokenizerFiles tokenizer_from_gguf(const Gguf& gguf, std::int64_t vocabulary_rows) {
  const Vocabulary vocabulary = read_vocabulary(gguf, vocabulary_rows);
  check_vocabulary(gguf, vocabulary);
  GgufTokenizerFiles files;
  const std::optional<std::string> pre_name = gguf.text("tokenizer.ggml.pre");
  const PreTokenizer& pre = pre_tokenizer(gguf, pre_name.value_or("default"));
  if (!pre_name || *pre_name == "default") {
    files.notes.emplace_back(
        "The file does not say how text is cut before encoding; GPT-2's rule is assumed.");
  }

  const auto bos = special_id(gguf, vocabulary, "tokenizer.ggml.bos_token_id");
  const auto eos = special_id(gguf, vocabulary, "tokenizer.ggml.eos_token_id");
  const auto eot = special_id(gguf, vocabulary, "tokenizer.ggml.eot_token_id");
  const auto unknown = special_id(gguf, vocabulary, "tokenizer.ggml.unknown_token_id");
  const auto padding = special_id(gguf, vocabulary, "tokenizer.ggml.padding_token_id");
  const bool add_bos = gguf.flag("tokenizer.ggml.add_bos_token").value_or(pre.begin_token);
  const bool add_eos = gguf.flag("tokenizer.ggml.add_eos_token").value_or(false);
  expect(!add_bos || bos,
         "{}: a begin token is wanted, but 'tokenizer.ggml.bos_token_id' is missing", gguf.path());
  expect(!add_eos || eos,
         "{}: an end token is wanted, but 'tokenizer.ggml.eos_token_id' is missing", gguf.path());

  Json added = Json::array();
  Json vocab = Json::object();
  for (std::size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const std::string& text = vocabulary.tokens[id];
    const std::int64_t type = vocabulary.types[id];
    vocab[text] = id;
    if (type != kControl && type != kUserDefined && type != kUnknown) continue;
    added.push_back({{"id", id},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", type != kUserDefined}});
  }
  const Json tokenizer = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", pre.compose ? Json{{"type", "NFC"}} : Json()},
      {"pre_tokenizer", pre_tokenizer_json(pre)},
      {"post_processor",
       add_bos || add_eos
           ? template_json(vocabulary, add_bos ? bos : std::nullopt, add_eos ? eos : std::nullopt)
           : Json()},
      {"decoder",
       {{"type", "ByteLevel"},
        {"add_prefix_space", true},
        {"trim_offsets", true},
        {"use_regex", true}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"ignore_merges", pre.ignore_merges},
        {"vocab", vocab},
        {"merges", vocabulary.merges}}},
  };
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"clean_up_tokenization_spaces", false},
                 {"add_bos_token", add_bos},
                 {"add_eos_token", add_eos}};
  const auto name_token = [&](const char* key, std::optional<std::int64_t> id) {
    if (id) config[key] = vocabulary.tokens[static_cast<std::size_t>(*id)];
  };
  name_token("bos_token", bos);
  name_token("eos_token", eos);
  name_token("unk_token", unknown);
  name_token("pad_token", padding);
  if (const auto length = gguf.integer("llama.context_length"))
    config["model_max_length"] = *length;
  if (const auto chat = gguf.text("tokenizer.chat_template")) {
    config["chat_template"] = *chat;
  } else {
    files.notes.emplace_back("The file has no chat template; chat needs one.");
  }
  Json generation = Json::object();
  if (bos) generation["bos_token_id"] = *bos;
  if (eos) generation["eos_token_id"] = *eos;
  if (eos && eot && *eot != *eos) generation["eos_token_id"] = {*eos, *eot};
  if (padding) generation["pad_token_id"] = *padding;
  try {
    files.tokenizer_json = tokenizer.dump(1) + "\n";
    files.tokenizer_config_json = config.dump(2) + "\n";
    files.generation_config_json = generation.dump(2) + "\n";
  } catch (const Json::type_error& error) {
    fail("{}: the tokenizer has text that is not UTF-8: {}", gguf.path(), error.what());
  }
  return files;
}

}  // namespace cambium
