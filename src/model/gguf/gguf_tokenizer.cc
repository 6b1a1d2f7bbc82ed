#include "model/gguf/gguf_tokenizer.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "base/base64.h"
#include "base/error.h"
#include "base/text.h"
#include "text/charsmap.h"
#include "text/chat_template.h"

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
constexpr const char* kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kBloom = R"( ?[^(\s|.,!?…。，、।۔،)]+)";
constexpr const char* kDeepseekLetters =
    R"(\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ)"
    R"(\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57})"
    R"(\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE})"
    R"(\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC})"
    R"(\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}ℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮ)"
    R"(ⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+)";

struct PreTokenizer {
  std::vector<const char*> names;  // in tokenizer.ggml.pre
  std::vector<const char*> splits;
  bool ignore_merges = false;  // a whole word that is a token is taken as it is
  bool begin_token = false;    // added even where the file does not say so
  bool compose = false;        // Unicode NFC first
};

const std::vector<PreTokenizer>& pre_tokenizers() {
  static const std::vector<PreTokenizer> rows = {
      {{"gpt-2", "default", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "modern-bert",
        "gigachat", "mellum", "a.x-4.0", "granite-docling", "jina-es", "jina-de", "jina-v2-es",
        "jina-v2-de"},
       {kGpt2}},
      {{"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
        "mellum2"},
       {R"(\p{N})", kGpt2}},
      {{"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"},
       {kLlama3},
       true,
       true},
      {{"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}, {kLlama3}},
      {{"qwen2", "deepseek-r1-qwen", "kormo", "megrez"}, {kQwen2}, false, false, true},
      {{"stablelm2", "hunyuan", "grok-2", "solar-open"}, {kQwen2}},
      {{"tekken"}, {kTekken}, true, true},
      {{"gpt-4o", "llama4", "kanana2"}, {kGpt4o}},
      {{"bailingmoe", "bailingmoe2", "llada-moe"},
       {R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*)"
        R"(|\s*[\r\n]|\s+(?!\S)|\s+)"}},
      {{"seed-coder"},
       {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+)"
        R"(|\s*[\r\n]+|\s+(?!\S)|\s+)"}},
      {{"falcon"}, {R"([\p{P}\$\+<=>\^~\|`]+)", kGpt2, "[0-9][0-9][0-9]"}},
      {{"bloom", "poro-chat", "gpt3-finnish"}, {kBloom}},
      {{"viking"}, {kBloom, R"(\p{N})"}},
      {{"superbpe"}, {R"(\p{N}+)", R"((?=(\d{3})+(?!\d)))"}},
      {{"deepseek-v3", "hunyuan-dense"}, {R"(\p{N}{1,3})", "[一-龥\u3040-ゟ゠-ヿ]+", kDeepseek3}},
      {{"deepseek-llm"},
       {"[\r\n]", kDeepseekLetters, R"(\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+)", R"(\s+$)",
        "[一-龥ࠀ-一가-\xed\x9f\xbf]+", R"(\p{N}+)"}},
      {{"deepseek-coder"},
       {"[\r\n]", R"(\s?\p{L}+)", R"(\s?\p{P}+)", "[一-龥ࠀ-一가-\xed\x9f\xbf]+", R"(\p{N})"}},
  };
  return rows;
}

const PreTokenizer& pre_tokenizer(const Gguf& gguf, const std::string& name) {
  std::vector<std::string> known;
  for (const PreTokenizer& row : pre_tokenizers()) {
    for (const char* row_name : row.names) {
      if (name == row_name) {
        return row;
      }
      known.emplace_back(row_name);
    }
  }
  fail("{}: the pre-tokeniser 'tokenizer.ggml.pre' is '{}', which is not known; expected one of {}",
       gguf.path(), name, join(known, ", "));
}

/// A request's tools, to try a template with.
constexpr const char* kSomeTools = R"([{"type": "function", "function": {"name": "add",
  "description": "adds", "parameters": {"type": "object", "properties":
  {"a": {"type": "number", "description": "one"}}, "required": ["a"]}}}])";

constexpr const char* kCharsmapKey = "tokenizer.ggml.precompiled_charsmap";

enum class VocabularyKind : uint8_t {
  kByteLevel,  // "gpt2": byte-level BPE
  kPieces,     // "llama": SentencePiece's BPE, whose merges follow from scores
  kUnigram,    // "t5": SentencePiece's unigram model
};

/// What the file says about its vocabulary, checked.
struct Vocabulary {
  VocabularyKind kind;
  std::vector<std::string> tokens;
  std::vector<int64_t> types;
  std::vector<std::string> merges;  // "left right", of byte-level BPE
  std::vector<double> scores;       // of SentencePiece
};

Vocabulary read_vocabulary(const Gguf& gguf, int64_t rows) {
  const std::string& path = gguf.path();
  const std::string model = gguf.text("tokenizer.ggml.model").value_or("(none)");
  expect(model == "gpt2" || model == "llama" || model == "t5",
         "{}: the tokenizer ('tokenizer.ggml.model') is '{}'; only byte-level BPE ('gpt2') and "
         "SentencePiece ('llama', and 't5' for its unigram model) can be imported",
         path, model);
  auto tokens = gguf.texts("tokenizer.ggml.tokens");
  expect(tokens.has_value(), "{}: the key 'tokenizer.ggml.tokens' is missing", path);
  Vocabulary vocabulary{model == "gpt2"    ? VocabularyKind::kByteLevel
                        : model == "llama" ? VocabularyKind::kPieces
                                           : VocabularyKind::kUnigram,
                        std::move(*tokens),
                        {},
                        {},
                        {}};
  if (model == "gpt2") {
    auto merges = gguf.texts("tokenizer.ggml.merges");
    expect(merges.has_value(), "{}: the key 'tokenizer.ggml.merges' is missing", path);
    vocabulary.merges = std::move(*merges);
  } else {
    auto scores = gguf.numbers("tokenizer.ggml.scores");
    expect(scores.has_value(), "{}: the key 'tokenizer.ggml.scores' is missing", path);
    expect(scores->size() == vocabulary.tokens.size(),
           "{}: 'tokenizer.ggml.scores' has {} entries for {} tokens", path, scores->size(),
           vocabulary.tokens.size());
    vocabulary.scores = std::move(*scores);
  }
  vocabulary.types = gguf.integers("tokenizer.ggml.token_type")
                         .value_or(std::vector<int64_t>(vocabulary.tokens.size(), kNormalToken));
  expect(vocabulary.types.size() == vocabulary.tokens.size(),
         "{}: 'tokenizer.ggml.token_type' has {} entries for {} tokens", path,
         vocabulary.types.size(), vocabulary.tokens.size());
  expect(static_cast<int64_t>(vocabulary.tokens.size()) <= rows,
         "{}: there are {} tokens, but token_embd.weight has only {} rows", path,
         vocabulary.tokens.size(), rows);
  return vocabulary;
}

/// Token ids by text; BPE over them needs every merge's parts and result.
void check_vocabulary(const Gguf& gguf, const Vocabulary& vocabulary) {
  std::unordered_map<std::string_view, size_t> ids;
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const auto [found, added] = ids.emplace(vocabulary.tokens[id], id);
    expect(added, "{}: the tokens {} and {} are both '{}'", gguf.path(), found->second, id,
           vocabulary.tokens[id]);
  }
  for (size_t i = 0; i < vocabulary.merges.size(); ++i) {
    const std::string_view merge = vocabulary.merges[i];
    // Byte-level tokens have no space in them (byte 32 is spelled 'Ġ').
    const size_t space = merge.find(' ');
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
std::optional<int64_t> special_id(const Gguf& gguf, const Vocabulary& vocabulary,
                                  const std::string& key) {
  const std::optional<int64_t> id = gguf.integer(key);
  expect(!id || (*id >= 0 && *id < static_cast<int64_t>(vocabulary.tokens.size())),
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

/// SentencePiece joins the neighbours whose whole has the highest score, so every way to join two
/// pieces into a third is a merge, ranked by the third's score; equal ones by the ids of the parts.
Json merges_of_pieces(const Vocabulary& vocabulary) {
  std::unordered_map<std::string_view, size_t> ids;
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (vocabulary.types[id] == kNormalToken) {
      ids.emplace(vocabulary.tokens[id], id);
    }
  }
  struct Merge {
    double score;
    size_t left, right;
  };
  std::vector<Merge> merges;
  for (const auto& [piece, id] : ids) {
    for (size_t cut = 1; cut < piece.size(); ++cut) {
      const auto left = ids.find(piece.substr(0, cut));
      const auto right = ids.find(piece.substr(cut));
      if (left != ids.end() && right != ids.end()) {
        merges.push_back({vocabulary.scores[id], left->second, right->second});
      }
    }
  }
  std::sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::tuple(-a.score, a.left, a.right) < std::tuple(-b.score, b.left, b.right);
  });
  Json json = Json::array();
  for (const Merge& merge : merges) {
    json.push_back({vocabulary.tokens[merge.left], vocabulary.tokens[merge.right]});
  }
  return json;
}

/// The unigram vocabulary. What stands for nothing at the end is left out: such tokens fill the
/// embedding up, and the model would cut text into them. Scores of tokens that are no ordinary
/// pieces do not lower that of the unknown, which is counted from the lowest.
Json unigram_model(const Gguf& gguf, const Vocabulary& vocabulary, std::optional<int64_t> unknown) {
  size_t count = vocabulary.tokens.size();
  while (count > 0 && vocabulary.types[count - 1] == kUnusedToken) {
    --count;
  }
  double lowest = std::numeric_limits<double>::infinity();
  for (size_t id = 0; id < count; ++id) {
    if (vocabulary.types[id] == kNormalToken) {
      lowest = std::min(lowest, vocabulary.scores[id]);
    }
  }
  Json vocab = Json::array();
  for (size_t id = 0; id < count; ++id) {
    const double score = vocabulary.scores[id];
    vocab.push_back({vocabulary.tokens[id], vocabulary.types[id] == kNormalToken || lowest > 0.0
                                                ? score
                                                : std::max(score, lowest)});
  }
  expect(!unknown || *unknown < static_cast<int64_t>(count),
         "{}: the unknown token {} is one of those that stand for nothing", gguf.path(),
         unknown.value_or(0));
  const bool bytes = std::any_of(vocabulary.types.begin(), vocabulary.types.end(),
                                 [](int64_t type) { return type == kByteToken; });
  return {{"type", "Unigram"},
          {"unk_id", unknown ? Json(*unknown) : Json()},
          {"vocab", std::move(vocab)},
          {"byte_fallback", bytes}};
}

/// SentencePiece's own rules of normalisation, then its blanks, as transformers converts them.
Json unigram_normalizer(const Gguf& gguf) {
  Json steps = Json::array();
  const std::string_view key = kCharsmapKey;
  if (const auto numbers = gguf.integers(key)) {
    std::string blob;
    for (const int64_t number : *numbers) {
      expect(number >= -128 && number <= 255, "{}: '{}' should be a list of bytes, but holds {}",
             gguf.path(), key, number);
      blob += static_cast<char>(number & 0xFF);
    }
    try {
      const text::Charsmap check(blob);
    } catch (const Error& error) {
      fail("{}: '{}': {}", gguf.path(), key, error.what());
    }
    steps.push_back({{"type", "Precompiled"}, {"precompiled_charsmap", to_base64(blob)}});
  }
  if (gguf.flag("tokenizer.ggml.remove_extra_whitespaces").value_or(false)) {
    steps.push_back({{"type", "Strip"}, {"strip_left", false}, {"strip_right", true}});
    steps.push_back({{"type", "Replace"}, {"pattern", {{"Regex", " {2,}"}}}, {"content", "▁"}});
  }
  return steps.empty() ? Json() : Json{{"type", "Sequence"}, {"normalizers", steps}};
}

/// Puts the begin and end tokens around a text (and around each of a pair).
Json template_json(const Vocabulary& vocabulary, std::optional<int64_t> bos,
                   std::optional<int64_t> eos) {
  Json single = Json::array();
  Json pair = Json::array();
  Json tokens = Json::object();
  const auto add = [&](Json* list, std::optional<int64_t> id, int type) {
    if (!id) {
      return;
    }
    const std::string& text = vocabulary.tokens[static_cast<size_t>(*id)];
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

/// The tokens that end an answer: those that the file names by key, and the control tokens whose
/// names say so. Older files name the end of text alone, while the chat template ends turns with
/// another token.
std::vector<int64_t> end_tokens(const Vocabulary& vocabulary, std::optional<int64_t> eos,
                                std::optional<int64_t> eot) {
  static const std::set<std::string_view> kNames = {"<|eot_id|>",
                                                    "<|im_end|>",
                                                    "<|end|>",
                                                    "<end_of_turn>",
                                                    "<|eom_id|>",
                                                    "<|end_of_text|>",
                                                    "<EOT>",
                                                    "_<EOT>",
                                                    "<|return|>",
                                                    "<|endoftext|>",
                                                    "<|eos|>",
                                                    "<|END_OF_TURN_TOKEN|>",
                                                    "<|end_of_turn|>",
                                                    "<end_of_utterance>",
                                                    "<｜end▁of▁sentence｜>"};
  std::vector<int64_t> ids;
  const auto add = [&](int64_t id) {
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) {
      ids.push_back(id);
    }
  };
  if (eos) {
    add(*eos);
  }
  if (eot) {
    add(*eot);
  }
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const bool special =
        vocabulary.types[id] == kControlToken || vocabulary.types[id] == kUserDefinedToken;
    if (special && kNames.contains(vocabulary.tokens[id])) {
      add(static_cast<int64_t>(id));
    }
  }
  return ids;
}

/// The chat template, or with more of them a list of names and templates; null without any.
Json chat_templates(const Gguf& gguf) {
  static constexpr std::string_view kKey = "tokenizer.chat_template";
  Json list = Json::array();
  const auto main = gguf.text(kKey);
  if (main) {
    list.push_back({{"name", "default"}, {"template", *main}});
  }
  for (const auto& [key, value] : gguf.metadata()) {
    if (key.starts_with(std::string(kKey) + ".")) {
      list.push_back(
          {{"name", key.substr(kKey.size() + 1)}, {"template", gguf.text(key).value_or("")}});
    }
  }
  if (list.size() == 1 && main) {
    return *main;
  }
  return list.empty() ? Json() : list;
}

/// Every template is kept as it is; what one of them cannot do is said now and not when it is used.
void check_templates(const Json& templates, const Json& config, GgufTokenizerFiles* files) {
  std::vector<std::pair<std::string, std::string>> tokens;
  for (const char* key : {"bos_token", "eos_token", "unk_token", "pad_token"}) {
    if (config.contains(key)) {
      tokens.emplace_back(key, config.at(key).get<std::string>());
    }
  }
  const Json list = templates.is_array()
                        ? templates
                        : Json::array({{{"name", "default"}, {"template", templates}}});
  for (const Json& one : list) {
    const std::string name = one.at("name").get<std::string>();
    const bool for_tools = name == "tool_use";
    if (name != "default" && !for_tools) {
      files->notes.push_back(fmt::format(
          "The chat template '{}' is kept, but nothing here uses it.", printable(name)));
      continue;
    }
    try {
      const ChatTemplate check(one.at("template").get<std::string>());
      check.render(tokens, R"([{"role": "user", "content": "Hello"}])", for_tools ? kSomeTools : "",
                   true, "");
    } catch (const Error& error) {
      files->warnings.push_back(fmt::format(
          "The chat template '{}' cannot be used: {}. {} A chat_template.jinja in the folder is "
          "taken in its place.",
          name, shortened(error.what()),
          for_tools ? "Requests with tools will be refused; those without use 'default'."
                    : "`cambium chat`, --chat and conversations as training data will be refused; "
                      "`cambium generate` and plain text do without."));
    }
  }
}

}  // namespace

const char* gpt2_split() {
  return kGpt2;
}

std::string pre_tokenizer_name(const TextCut& cut) {
  for (const PreTokenizer& row : pre_tokenizers()) {
    if (std::equal(row.splits.begin(), row.splits.end(), cut.splits.begin(), cut.splits.end()) &&
        row.ignore_merges == cut.ignore_merges && row.compose == cut.compose) {
      return row.names.front();
    }
  }
  return {};
}

bool is_pre_tokenizer(const std::string& name) {
  return std::any_of(pre_tokenizers().begin(), pre_tokenizers().end(),
                     [&](const PreTokenizer& row) {
                       return std::any_of(row.names.begin(), row.names.end(),
                                          [&](const char* known) { return name == known; });
                     });
}

GgufTokenizerFiles tokenizer_from_gguf(const Gguf& gguf, int64_t vocabulary_rows) {
  const Vocabulary vocabulary = read_vocabulary(gguf, vocabulary_rows);
  check_vocabulary(gguf, vocabulary);
  GgufTokenizerFiles files;
  const bool pieces = vocabulary.kind == VocabularyKind::kPieces;
  const bool unigram = vocabulary.kind == VocabularyKind::kUnigram;
  const bool byte_level = vocabulary.kind == VocabularyKind::kByteLevel;
  const std::optional<std::string> pre_name = gguf.text("tokenizer.ggml.pre");
  const PreTokenizer& pre =
      pre_tokenizer(gguf, byte_level ? pre_name.value_or("default") : "default");
  if (byte_level && (!pre_name || *pre_name == "default")) {
    files.notes.emplace_back(
        "The file does not say how text is cut before encoding; GPT-2's rule is assumed.");
  }

  if (!unigram && gguf.integers(kCharsmapKey)) {
    files.notes.push_back(fmt::format(
        "'{}' is not used: vocabularies of this type have no normalisation in other programs.",
        kCharsmapKey));
  }

  const auto bos = special_id(gguf, vocabulary, "tokenizer.ggml.bos_token_id");
  // A unigram vocabulary that does not say so has T5's.
  const auto or_t5 = [&](const char* key, int64_t id) {
    const auto said = special_id(gguf, vocabulary, key);
    const bool there = id < static_cast<int64_t>(vocabulary.tokens.size());
    return !said && unigram && there ? std::optional(id) : said;
  };
  const auto eos = or_t5("tokenizer.ggml.eos_token_id", 1);
  const auto eot = special_id(gguf, vocabulary, "tokenizer.ggml.eot_token_id");
  const auto unknown = or_t5("tokenizer.ggml.unknown_token_id", 2);
  const auto padding = or_t5("tokenizer.ggml.padding_token_id", 0);
  const bool add_bos =
      gguf.flag("tokenizer.ggml.add_bos_token").value_or(pieces || pre.begin_token);
  const bool add_eos = gguf.flag("tokenizer.ggml.add_eos_token").value_or(unigram);
  expect(!add_bos || bos,
         "{}: a begin token is wanted, but 'tokenizer.ggml.bos_token_id' is missing", gguf.path());
  expect(!add_eos || eos,
         "{}: an end token is wanted, but 'tokenizer.ggml.eos_token_id' is missing", gguf.path());

  Json added = Json::array();
  Json vocab = Json::object();
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const std::string& text = vocabulary.tokens[id];
    const int64_t type = vocabulary.types[id];
    vocab[text] = id;
    if (type != kControlToken && type != kUserDefinedToken && type != kUnknownToken) {
      continue;
    }
    added.push_back({{"id", id},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", type != kUserDefinedToken}});
  }
  Json model =
      unigram ? unigram_model(gguf, vocabulary, unknown)
              : Json{{"type", "BPE"},
                     {"dropout", nullptr},
                     {"unk_token", nullptr},
                     {"continuing_subword_prefix", nullptr},
                     {"end_of_word_suffix", nullptr},
                     {"fuse_unk", pieces},
                     {"byte_fallback", pieces},
                     {"ignore_merges", pre.ignore_merges},
                     {"vocab", std::move(vocab)},
                     {"merges", pieces ? merges_of_pieces(vocabulary) : Json(vocabulary.merges)}};
  Json normalizer = pre.compose ? Json{{"type", "NFC"}} : Json();
  Json cut = pieces ? Json() : pre_tokenizer_json(pre);
  Json decoder = {{"type", "ByteLevel"},
                  {"add_prefix_space", true},
                  {"trim_offsets", true},
                  {"use_regex", true}};
  if (unigram) {
    const bool prefix = gguf.flag("tokenizer.ggml.add_space_prefix").value_or(false);
    normalizer = unigram_normalizer(gguf);
    cut = {{"type", "Metaspace"},
           {"replacement", "▁"},
           {"prepend_scheme", prefix ? "always" : "never"},
           {"split", true}};
    decoder = cut;
  }
  if (pieces) {
    const bool prefix = gguf.flag("tokenizer.ggml.add_space_prefix").value_or(true);
    if (unknown) {
      model["unk_token"] = vocabulary.tokens[static_cast<size_t>(*unknown)];
    }
    Json steps = Json::array();
    if (prefix) {
      steps.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
    }
    steps.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}});
    normalizer = {{"type", "Sequence"}, {"normalizers", steps}};
    Json back =
        Json::array({{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
                     {{"type", "ByteFallback"}},
                     {{"type", "Fuse"}}});
    if (prefix) {
      back.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    }
    decoder = {{"type", "Sequence"}, {"decoders", back}};
  }
  const Json tokenizer = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", normalizer},
      {"pre_tokenizer", cut},
      {"post_processor",
       add_bos || add_eos
           ? template_json(vocabulary, add_bos ? bos : std::nullopt, add_eos ? eos : std::nullopt)
           : Json()},
      {"decoder", decoder},
      {"model", model},
  };
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"clean_up_tokenization_spaces", false},
                 {"add_bos_token", add_bos},
                 {"add_eos_token", add_eos}};
  const auto name_token = [&](const char* key, std::optional<int64_t> id) {
    if (id) {
      config[key] = vocabulary.tokens[static_cast<size_t>(*id)];
    }
  };
  name_token("bos_token", bos);
  name_token("eos_token", eos);
  name_token("unk_token", unknown);
  name_token("pad_token", padding);
  const std::string architecture = gguf.text("general.architecture").value_or("llama");
  if (const auto length = gguf.integer(architecture + ".context_length")) {
    config["model_max_length"] = *length;
  }
  if (const Json templates = chat_templates(gguf); !templates.is_null()) {
    config["chat_template"] = templates;
    check_templates(templates, config, &files);
  } else {
    files.notes.emplace_back("The file has no chat template; chat needs one.");
  }
  Json generation = Json::object();
  if (bos) {
    generation["bos_token_id"] = *bos;
  }
  const std::vector<int64_t> ends = end_tokens(vocabulary, eos, eot);
  if (ends.size() > 1) {
    generation["eos_token_id"] = ends;
  } else if (!ends.empty()) {
    generation["eos_token_id"] = ends.front();
  }
  if (padding) {
    generation["pad_token_id"] = *padding;
  }
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
