#include "text/tokenizer.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <utility>

#include "base/checksum.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/chat_template.h"
#include "text/decoder.h"
#include "text/normalizer.h"
#include "text/post_processor.h"
#include "text/pretokenizer.h"
#include "text/tokenizer_parts.h"
#include "text/unicode.h"
#include "text/unigram.h"

namespace cambium {
namespace {

using nlohmann::json;
using text::added_token;
using text::bpe_config;
using text::checked_id;
using text::kMaxId;
using text::named_token;
using text::unigram_config;

/// The special tokens that tokenizer_config.json names.
constexpr const char* kNamedTokens[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                        "pad_token", "cls_token", "mask_token"};

}  // namespace

struct Tokenizer::Impl {
  text::Normalizer normalizer;
  text::PreTokenizer pretokenizer;
  std::optional<text::Bpe> bpe;  // or
  std::optional<text::Unigram> unigram;
  text::PostProcessor post;
  std::optional<text::PostProcessor> file_post;  // of tokenizer.json, where the other replaces it
  text::TokenDecoder decoder;
  std::optional<text::AddedTokenMatcher> raw_added;         // looked for in the text as given
  std::optional<text::AddedTokenMatcher> normalized_added;  // looked for after normalising

  // By id; an id without a token has no spelling.
  std::vector<std::string> spelling;
  std::vector<std::string> bytes;
  std::vector<bool> special;
  std::map<std::string, int32_t, std::less<>> ids;

  std::optional<int32_t> bos, eos, pad;
  std::vector<int32_t> eos_ids;
  uint64_t fingerprint = 0;
  uint64_t rules = 0;

  std::vector<std::pair<std::string, std::string>> special_names;  // template variables
  std::optional<ChatTemplate> chat;
  std::optional<ChatTemplate> tool_chat;  // a template of its own for requests with tools

  void read_model(const json& file, const json& config);
  void read_config(const json& config);
  void hash_rules(const json& file, const json& config);
  void read_chat_template(const json& value);
  void add_spelling(const std::string& token, int32_t id);
  void encode_between(std::string_view piece, bool at_start, std::vector<int32_t>& out) const;
  void encode_pieces(std::string_view piece, bool at_start, std::vector<int32_t>& out) const;
};

void Tokenizer::Impl::add_spelling(const std::string& token, int32_t id) {
  const auto place = static_cast<size_t>(id);
  if (spelling.size() <= place) {
    spelling.resize(place + 1);
    special.resize(place + 1);
  }
  expect(spelling[place].empty() || spelling[place] == token,
         "[tokenizer] id {} belongs to both {:?} and {:?}", id, spelling[place], token);
  const auto [known, fresh] = ids.emplace(token, id);
  expect(fresh || known->second == id, "[tokenizer] token {:?} has two ids, {} and {}", token,
         known->second, id);
  spelling[place] = token;
}

void Tokenizer::Impl::read_model(const json& file, const json& config) {
  normalizer = text::make_normalizer(file.value("normalizer", json()));
  pretokenizer = text::make_pretokenizer(file.value("pre_tokenizer", json()));
  post = text::make_post_processor(file.value("post_processor", json()));
  decoder = text::make_decoder(file.value("decoder", json()));

  const json& spec = file.at("model");
  const std::string type = spec.value("type", spec.contains("merges") ? "BPE" : "(none)");
  text::BpeConfig model;
  if (type == "Unigram") {
    const text::UnigramConfig pieces = unigram_config(spec);
    unigram.emplace(pieces);
    for (size_t id = 0; id < pieces.vocab.size(); ++id) {
      add_spelling(pieces.vocab[id].first, static_cast<int32_t>(id));
    }
  } else {
    expect(type == "BPE", "[tokenizer] expected model type BPE or Unigram, got {:?}", type);
    model = bpe_config(spec, pretokenizer.byte_level);
    bpe.emplace(model);
    for (const auto& [token, id] : model.vocab) {
      add_spelling(token, id);
    }
  }

  std::vector<text::AddedToken> raw;
  std::vector<text::AddedToken> normalized;
  std::set<std::string> seen;
  const auto add = [&](text::AddedToken token) {
    if (token.content.empty() || !seen.insert(token.content).second) {
      return;
    }
    // The vocabulary's id counts where both have the token.
    if (const auto known = ids.find(token.content); known != ids.end()) {
      token.id = known->second;
    }
    add_spelling(token.content, token.id);
    special[static_cast<size_t>(token.id)] = token.special;
    if (token.normalized) {
      if (normalizer) {
        token.content = normalizer(std::move(token.content));
      }
      normalized.push_back(std::move(token));
    } else {
      raw.push_back(std::move(token));
    }
  };
  for (const json& row : file.value("added_tokens", json::array())) {
    text::AddedToken token = added_token(row);
    token.id = checked_id(row.at("id"), token.content);
    add(std::move(token));
  }
  // transformers adds these to what tokenizer.json has.
  const json more = config.value("added_tokens_decoder", json::object());
  for (const auto& [id, row] : more.items()) {
    text::AddedToken token = added_token(row);
    token.id = checked_id(parse_json<json>(id, "an id of added_tokens_decoder"), token.content);
    add(std::move(token));
  }
  // Special tokens that are named and nowhere defined take the next free ids.
  const auto name_token = [&](const std::string& content) {
    if (!content.empty() && !ids.contains(content)) {
      text::AddedToken token;
      token.content = content;
      token.special = true;
      token.id = static_cast<int32_t>(spelling.size());
      expect(token.id < kMaxId, "[tokenizer] expected fewer than {} tokens", kMaxId);
      add(std::move(token));
    }
  };
  for (const char* key : kNamedTokens) {
    name_token(named_token(config, key).value_or(""));
  }
  const auto others = config.find("additional_special_tokens");
  if (others != config.end() && others->is_array()) {
    for (const json& token : *others) {
      name_token(named_token({{"token", token}}, "token").value_or(""));
    }
  }
  std::erase_if(normalized, [](const auto& token) { return token.content.empty(); });
  raw_added.emplace(std::move(raw));
  normalized_added.emplace(std::move(normalized));

  for (const std::string& token : spelling) {
    bytes.push_back(decoder.token(token));
  }
  // transformers' Llama tokenizers make their post-processor anew from these two keys.
  const std::string made_by = config.value("tokenizer_class", "");
  const bool rebuilt = made_by == "LlamaTokenizer" || made_by == "LlamaTokenizerFast" ||
                       made_by == "CodeLlamaTokenizer" || made_by == "CodeLlamaTokenizerFast";
  if (rebuilt && (config.contains("add_bos_token") || config.contains("add_eos_token"))) {
    const auto wrap = [&](const char* key, const char* name, bool fallback) {
      std::vector<int32_t> out;
      const auto flag = config.find(key);
      const bool wanted = flag != config.end() && flag->is_boolean() ? flag->get<bool>() : fallback;
      const auto token = named_token(config, name);
      if (wanted && token && ids.contains(*token)) {
        out.push_back(ids.find(*token)->second);
      }
      return out;
    };
    file_post = std::exchange(post, {wrap("add_bos_token", "bos_token", true),
                                     wrap("add_eos_token", "eos_token", false)});
    if (file_post->before == post.before && file_post->after == post.after) {
      file_post.reset();
    }
  }
  const text::PostProcessor& own = file_post ? *file_post : post;
  for (const auto* wrap : {&own.before, &own.after}) {
    for (const int32_t id : *wrap) {
      expect(id >= 0 && static_cast<size_t>(id) < spelling.size(),
             "[tokenizer] post_processor adds id {}, but the vocabulary has {} ids", id,
             spelling.size());
    }
  }

  Checksum sum;
  const auto hash_text = [&](std::string_view s) {
    const uint64_t length = s.size();
    sum.update(std::as_bytes(std::span(&length, 1)));
    sum.update(std::as_bytes(std::span(s)));
  };
  for (const std::string& token : spelling) {
    hash_text(token);
  }
  if (unigram) {
    for (const json& token : spec.at("vocab")) {
      hash_text(token.at(1).dump());
    }
  }
  for (const auto& [left, right] : model.merges) {
    hash_text(left);
    hash_text(right);
  }
  fingerprint = sum.digest();
}

void Tokenizer::Impl::hash_rules(const json& file, const json& config) {
  Checksum sum;
  const auto add = [&](const std::string& name, const json& value) {
    const std::string text = fmt::format("{}={};", name, value.dump());
    sum.update(std::as_bytes(std::span(text)));
  };
  for (const auto& [name, value] : file.items()) {
    if (name != "model") {
      add(name, value);
    }
  }
  for (const auto& [name, value] : file.at("model").items()) {
    if (name != "vocab" && name != "merges") {
      add(name, value);
    }
  }
  for (const auto& [name, value] : config.items()) {
    add(name, value);
  }
  rules = sum.digest();
}

void Tokenizer::Impl::read_config(const json& config) {
  const auto id_of = [&](const std::optional<std::string>& token) -> std::optional<int32_t> {
    if (!token) {
      return std::nullopt;
    }
    const auto found = ids.find(*token);
    return found == ids.end() ? std::nullopt : std::optional(found->second);
  };
  bos = id_of(named_token(config, "bos_token"));
  eos = id_of(named_token(config, "eos_token"));
  pad = id_of(named_token(config, "pad_token"));
  if (eos) {
    eos_ids.push_back(*eos);
  }
  for (const char* key : kNamedTokens) {
    if (auto token = named_token(config, key)) {
      special_names.emplace_back(key, *std::move(token));
    }
  }
  if (config.contains("chat_template")) {
    read_chat_template(config.at("chat_template"));
  }
}

void Tokenizer::Impl::read_chat_template(const json& value) {
  if (value.is_string()) {
    chat = ChatTemplate::unread(value.get<std::string>());
  } else if (value.is_array()) {
    for (const json& named : value) {
      const std::string name = named.at("name").get<std::string>();
      if (name == "default") {
        chat = ChatTemplate::unread(named.at("template").get<std::string>());
      } else if (name == "tool_use") {
        tool_chat = ChatTemplate::unread(named.at("template").get<std::string>());
      }
    }
  }
}

void Tokenizer::Impl::encode_between(std::string_view piece, bool at_start,
                                     std::vector<int32_t>& out) const {
  std::string rewritten;
  if (normalizer) {
    rewritten = normalizer(std::string(piece));
    piece = rewritten;
  }
  if (normalized_added->empty()) {
    encode_pieces(piece, at_start, out);
    return;
  }
  std::vector<text::Segment> segments;
  normalized_added->split(piece, segments);
  for (const text::Segment& segment : segments) {
    if (segment.id >= 0) {
      out.push_back(segment.id);
    } else {
      encode_pieces(segment.text, at_start && segment.text.data() == piece.data(), out);
    }
  }
}

void Tokenizer::Impl::encode_pieces(std::string_view piece, bool at_start,
                                    std::vector<int32_t>& out) const {
  text::Pieces pieces;
  pieces.at_start = at_start;
  if (!piece.empty()) {
    pieces.views.push_back(piece);
  }
  pretokenizer.apply(pieces);
  for (const std::string_view one : pieces.views) {
    if (unigram) {
      unigram->encode(one, out);
    } else {
      bpe->encode(one, out);
    }
  }
}

Tokenizer::Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

namespace {

/// Rethrows what a wrongly shaped file makes the JSON library throw as an Error.
template <class Body>
void with_json_errors(const char* what, Body&& body) {
  try {
    body();
  } catch (const json::exception& e) {
    fail("[tokenizer] {} does not have the expected shape: {}", what, json_problem(e));
  }
}

}  // namespace

Tokenizer Tokenizer::parse(std::string_view tokenizer_json, std::string_view config_json) {
  const json file = parse_json<json>(tokenizer_json, "tokenizer.json");
  const json config = config_json.empty() ? json::object()
                                          : parse_json<json>(config_json, "tokenizer_config.json",
                                                             {.python = true});
  auto impl = std::make_shared<Impl>();
  with_json_errors("tokenizer.json", [&] { impl->read_model(file, config); });
  with_json_errors("tokenizer_config.json", [&] { impl->read_config(config); });
  impl->hash_rules(file, config);
  return Tokenizer(std::move(impl));
}

Tokenizer Tokenizer::load(const std::filesystem::path& dir) {
  try {
    return load_files(dir);
  } catch (const Error& error) {
    fail("{}: {}", dir.string(), error.what());
  }
}

Tokenizer Tokenizer::load_files(const std::filesystem::path& dir) {
  const auto main = dir / "tokenizer.json";
  if (!std::filesystem::exists(main)) {
    const bool packed = std::filesystem::exists(dir / "tokenizer.json.xz");
    fail("[tokenizer] expected {}{}", main.string(),
         packed ? ", found only tokenizer.json.xz; unpack it: xz -dk tokenizer.json.xz"
                : ", which does not exist");
  }
  const auto optional_file = [&](const char* name) {
    std::string text;
    if (std::filesystem::exists(dir / name)) {
      text = read_text_file((dir / name).string());
      expect(!text.empty(), "{} is empty: a copy was cut short; copy it again or remove it", name);
    }
    return text;
  };
  Tokenizer loaded = parse(read_text_file(main.string()), optional_file("tokenizer_config.json"));
  auto impl = std::const_pointer_cast<Impl>(loaded.impl_);  // not shared with anyone yet
  if (std::string source = optional_file("chat_template.jinja"); !source.empty()) {
    impl->chat = ChatTemplate::unread(std::move(source));
    impl->tool_chat.reset();
  } else if (std::string wrapped = optional_file("chat_template.json"); !wrapped.empty()) {
    const json value = parse_json<json>(wrapped, "chat_template.json");
    with_json_errors("chat_template.json", [&] {
      if (value.contains("chat_template")) {
        impl->read_chat_template(value.at("chat_template"));
      }
    });
  }
  if (std::string generation = optional_file("generation_config.json"); !generation.empty()) {
    const json value = parse_json<json>(generation, "generation_config.json", {.python = true});
    expect(value.is_object(), "[tokenizer] generation_config.json: expected an object, got {}",
           value.type_name());
    const json eos = value.value("eos_token_id", json());
    for (const json& row : eos.is_array() ? eos : json::array({eos})) {
      if (row.is_null()) {
        continue;
      }
      const int32_t id = checked_id(row, "eos_token_id of generation_config.json");
      if (std::find(impl->eos_ids.begin(), impl->eos_ids.end(), id) == impl->eos_ids.end()) {
        impl->eos_ids.push_back(id);
      }
    }
  }
  return loaded;
}

std::vector<int32_t> Tokenizer::encode(std::string_view input, bool add_special) const {
  std::string repaired;
  if (!text::is_valid_utf8(input)) {
    repaired = text::to_valid_utf8(input);
    input = repaired;
  }
  std::vector<int32_t> out;
  out.reserve(input.size() / 4 + 8);
  if (add_special) {
    out = impl_->post.before;
  }
  std::vector<text::Segment> segments;
  impl_->raw_added->split(input, segments);
  for (const text::Segment& segment : segments) {
    if (segment.id >= 0) {
      out.push_back(segment.id);
    } else {
      impl_->encode_between(segment.text, segment.text.data() == input.data(), out);
    }
  }
  if (add_special) {
    out.insert(out.end(), impl_->post.after.begin(), impl_->post.after.end());
  }
  return out;
}

bool Tokenizer::has_config_post_processor() const {
  return impl_->file_post.has_value();
}

std::vector<int32_t> Tokenizer::encode_by_file(std::string_view text) const {
  const text::PostProcessor& post = impl_->file_post ? *impl_->file_post : impl_->post;
  std::vector<int32_t> out = post.before;
  const std::vector<int32_t> inside = encode(text, false);
  out.insert(out.end(), inside.begin(), inside.end());
  out.insert(out.end(), post.after.begin(), post.after.end());
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  StreamDecoder stream(*this, skip_special);
  std::string out;
  for (const int32_t id : ids) {
    out += stream.push(id);
  }
  return out + stream.finish();
}

int32_t Tokenizer::vocab_size() const {
  return static_cast<int32_t>(impl_->spelling.size());
}

std::optional<int32_t> Tokenizer::token_id(std::string_view token) const {
  const auto found = impl_->ids.find(token);
  return found == impl_->ids.end() ? std::nullopt : std::optional(found->second);
}

namespace {

const std::string& at_or_empty(const std::vector<std::string>& table, int32_t id) {
  static const std::string empty;
  return id >= 0 && static_cast<size_t>(id) < table.size() ? table[static_cast<size_t>(id)] : empty;
}

}  // namespace

const std::string& Tokenizer::token_text(int32_t id) const {
  return at_or_empty(impl_->spelling, id);
}
const std::string& Tokenizer::token_bytes(int32_t id) const {
  return at_or_empty(impl_->bytes, id);
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && impl_->special[static_cast<size_t>(id)];
}

std::optional<int32_t> Tokenizer::bos_id() const {
  return impl_->bos;
}
std::optional<int32_t> Tokenizer::eos_id() const {
  return impl_->eos;
}
std::optional<int32_t> Tokenizer::pad_id() const {
  return impl_->pad;
}
const std::vector<int32_t>& Tokenizer::eos_ids() const {
  return impl_->eos_ids;
}
uint64_t Tokenizer::fingerprint() const {
  return impl_->fingerprint;
}

uint64_t Tokenizer::rules_fingerprint() const {
  const auto source = [](const std::optional<ChatTemplate>& chat) {
    return chat ? std::string_view(chat->source()) : std::string_view();
  };
  Checksum sum;
  sum.update(std::as_bytes(std::span(&impl_->rules, 1)));
  sum.update(std::as_bytes(std::span(impl_->eos_ids)));
  for (const std::string_view text : {source(impl_->chat), source(impl_->tool_chat)}) {
    const uint64_t length = text.size();
    sum.update(std::as_bytes(std::span(&length, 1)));
    sum.update(std::as_bytes(std::span(text)));
  }
  return sum.digest();
}

bool Tokenizer::has_chat_template() const {
  return impl_->chat || impl_->tool_chat;
}

const std::string& Tokenizer::chat_template() const {
  static const std::string none;
  return impl_->chat ? impl_->chat->source() : none;
}

std::string Tokenizer::apply_chat_template(std::string_view messages_json,
                                           std::string_view tools_json, bool add_generation_prompt,
                                           std::string_view kwargs_json) const {
  const auto& chosen = !tools_json.empty() && tools_json != "null" && impl_->tool_chat
                           ? impl_->tool_chat
                           : impl_->chat;
  expect(
      chosen.has_value(),
      "[chat_template] the tokenizer has none; expected chat_template in tokenizer_config.json or "
      "a file chat_template.jinja");
  return chosen->render(impl_->special_names, messages_json, tools_json, add_generation_prompt,
                        kwargs_json);
}

std::string Tokenizer::apply_chat_template(std::span<const ChatMessage> messages,
                                           bool add_generation_prompt) const {
  json list = json::array();
  for (const ChatMessage& message : messages) {
    list.push_back({{"role", message.role}, {"content", text::to_valid_utf8(message.content)}});
  }
  return apply_chat_template(list.dump(), {}, add_generation_prompt, {});
}

void Tokenizer::expect_chat(const std::string& where, const std::string& instead,
                            const std::string& system) const {
  expect(has_chat_template(), "{}: the tokenizer has no chat template; {}", where, instead);
  std::vector<ChatMessage> messages;
  if (!system.empty()) {
    messages.push_back({"system", system});
  }
  messages.push_back({"user", "Hello"});
  try {
    apply_chat_template(messages);
  } catch (const Error& error) {
    fail("{}: the chat template cannot be used: {}; {}", where, shortened(error.what()), instead);
  }
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

std::string StreamDecoder::push(int32_t id) {
  const auto& decoder = tokenizer_.impl_->decoder;
  const std::string& spelling = tokenizer_.token_text(id);
  if (spelling.empty() || (skip_special_ && tokenizer_.is_special(id))) {
    return {};
  }
  if (decoder.byte_fallback && text::TokenDecoder::is_byte(spelling)) {
    run_ += tokenizer_.token_bytes(id);
    return {};
  }
  end_run();
  if (started_) {
    append(tokenizer_.token_bytes(id));
  } else {
    append(decoder.first_mark.empty() ? tokenizer_.token_bytes(id) : decoder.first_token(spelling));
  }
  const size_t ready = held_.size() - text::incomplete_utf8_suffix(held_);
  std::string out = text::to_valid_utf8(std::string_view(held_).substr(0, ready));
  held_.erase(0, ready);
  return out;
}

void StreamDecoder::append(std::string_view bytes) {
  const auto& decoder = tokenizer_.impl_->decoder;
  if (!started_ && !decoder.strip_start.empty() && bytes.starts_with(decoder.strip_start)) {
    bytes.remove_prefix(decoder.strip_start.size());
  } else if (started_) {
    held_ += decoder.separator;
  }
  started_ = true;
  held_ += bytes;
}

// Whether a run of byte tokens is text is known at its end.
void StreamDecoder::end_run() {
  if (run_.empty()) {
    return;
  }
  std::string text = std::exchange(run_, {});
  if (!text::is_valid_utf8(text)) {
    const size_t bytes = text.size();
    text.clear();
    for (size_t i = 0; i < bytes; ++i) {
      text += "\uFFFD";
    }
  }
  append(text);
}

std::string StreamDecoder::finish() {
  end_run();
  std::string out = text::to_valid_utf8(held_);
  held_.clear();
  started_ = false;
  return out;
}

}  // namespace cambium
