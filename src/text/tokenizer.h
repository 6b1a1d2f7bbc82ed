// Text to token ids and back, as a Hugging Face `tokenizer.json` describes it.
//
// The file is obeyed exactly: added tokens are cut out first, the rest is normalised, split by the
// pre-tokeniser, encoded by byte pair encoding and wrapped by the post-processor. A part that is
// not supported is an error when loading, never a different result.
//
// Not done here, on purpose: the file's `truncation` and `padding` (a language model never wants
// them silently), sampling of merges (`dropout`), and offsets back into the text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cambium {

/// One turn of a chat; anything richer (tool calls, reasoning) goes in as JSON text.
struct ChatMessage {
  std::string role;
  std::string content;
};

/// Immutable and cheap to copy (copies share the tables). Every method may be called from many
/// threads at once.
class Tokenizer {
 public:
  /// Reads DIR/tokenizer.json and, where present, DIR/tokenizer_config.json (begin and end tokens,
  /// chat template), DIR/chat_template.jinja or chat_template.json (these win over the template in
  /// the configuration) and DIR/generation_config.json (more end tokens).
  static Tokenizer load(const std::filesystem::path& dir);

  /// The same from texts; `config_json` may be empty.
  static Tokenizer parse(std::string_view tokenizer_json, std::string_view config_json = {});

  /// Special tokens spelled out in `text` are recognised. `add_special` adds what the
  /// post-processor adds (often a begin token). Bytes that are not UTF-8 count as U+FFFD.
  std::vector<int32_t> encode(std::string_view text, bool add_special) const;

  /// Whether tokenizer_config.json adds other tokens around a text than tokenizer.json's own
  /// post-processor, as the files of Llama's tokenizer classes may.
  bool has_config_post_processor() const;
  /// encode() with what tokenizer.json's post-processor adds, whatever tokenizer_config.json says.
  std::vector<int32_t> encode_by_file(std::string_view text) const;

  /// Valid UTF-8: bytes that do not form a character become U+FFFD. Ids outside the vocabulary are
  /// skipped. `skip_special` leaves out the tokens marked special.
  std::string decode(std::span<const int32_t> ids, bool skip_special) const;

  /// One more than the largest id. A model may have more rows (padding), never fewer.
  int32_t vocab_size() const;
  /// The id of a token by its spelling in the file ("Ġthe", "<|im_end|>").
  std::optional<int32_t> token_id(std::string_view token) const;
  /// The spelling in the file; empty for an id that has no token.
  const std::string& token_text(int32_t id) const;
  /// The bytes that the token stands for in decoded text; may be part of a character.
  const std::string& token_bytes(int32_t id) const;
  bool is_special(int32_t id) const;

  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  std::optional<int32_t> pad_id() const;
  /// Every token that ends a turn or text: eos_id and those of generation_config.json. May be
  /// empty.
  const std::vector<int32_t>& eos_ids() const;

  /// A hash of vocabulary, merges and added tokens: equal for tokenizers that share their ids.
  /// Data, teacher and student must agree in it.
  uint64_t fingerprint() const;

  bool has_chat_template() const;
  /// The template's source; empty when there is none.
  const std::string& chat_template() const;
  /// The prompt text for `messages_json`, a JSON array of message objects. `tools_json` is a JSON
  /// array or empty; `kwargs_json` an object of further template variables or empty. Throws Error
  /// when there is no template or when the template refuses the messages. Encode the result with
  /// add_special false: templates write their own begin token.
  std::string apply_chat_template(std::string_view messages_json, std::string_view tools_json = {},
                                  bool add_generation_prompt = true,
                                  std::string_view kwargs_json = {}) const;
  std::string apply_chat_template(std::span<const ChatMessage> messages,
                                  bool add_generation_prompt = true) const;
  /// Error unless the chat template can write a question, after a system message where there is
  /// one: for callers to ask before they begin. The message begins with `where` and ends with
  /// `instead`, what can be done without a template.
  void expect_chat(const std::string& where, const std::string& instead,
                   const std::string& system = {}) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  static Tokenizer load_files(const std::filesystem::path& dir);
  explicit Tokenizer(std::shared_ptr<const Impl> impl);
  std::shared_ptr<const Impl> impl_;
};

/// Decodes tokens as they are generated. The pieces put together are exactly what decode() gives
/// for all ids at once; a character whose bytes are still incomplete is held back.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special = true);

  /// The text that became certain with this token; empty while a character is incomplete.
  std::string push(int32_t id);
  /// What is held back, made valid UTF-8, at the end of generation.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  bool started_ = false;
  std::string held_;
  std::string run_;  // of byte tokens

  void append(std::string_view bytes);
  void end_run();
};

}  // namespace cambium
