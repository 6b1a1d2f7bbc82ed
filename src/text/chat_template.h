// Chat templates: a list of messages becomes the prompt text that a model was trained on.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cambium {

/// A Jinja template as Hugging Face renders it (trim_blocks, lstrip_blocks, `tojson` without ASCII
/// escapes, raise_exception, strftime_now). Immutable; rendering is thread-safe and bounded in
/// steps, output and memory.
class ChatTemplate {
 public:
  /// Throws Error naming the line when `source` is not a template.
  explicit ChatTemplate(std::string source);
  /// Reads nothing yet (rendering will): many commands of a model never render a chat.
  static ChatTemplate unread(std::string source);

  const std::string& source() const { return source_; }

  /// `special_tokens`: variables such as {"bos_token", "<s>"}. The rest as in
  /// Tokenizer::apply_chat_template.
  std::string render(const std::vector<std::pair<std::string, std::string>>& special_tokens,
                     std::string_view messages_json, std::string_view tools_json,
                     bool add_generation_prompt, std::string_view kwargs_json) const;

 private:
  struct Program;
  ChatTemplate() = default;
  const Program& program() const;
  std::string source_;
  std::shared_ptr<Program> program_;
};

}  // namespace cambium
