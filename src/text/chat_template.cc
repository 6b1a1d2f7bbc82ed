#include "text/chat_template.h"

#include <mutex>

#include "base/error.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/parser.h"

namespace cambium {

struct ChatTemplate::Program {
  std::once_flag once;  // not spent by an attempt that throws
  jinja::Body body;
};

ChatTemplate::ChatTemplate(std::string source) : ChatTemplate(unread(std::move(source))) {
  program();
}

ChatTemplate ChatTemplate::unread(std::string source) {
  ChatTemplate made;
  made.source_ = std::move(source);
  made.program_ = std::make_shared<Program>();
  return made;
}

const ChatTemplate::Program& ChatTemplate::program() const {
  std::call_once(program_->once, [&] { program_->body = jinja::parse(source_); });
  return *program_;
}

std::string ChatTemplate::render(
    const std::vector<std::pair<std::string, std::string>>& special_tokens,
    std::string_view messages_json, std::string_view tools_json, bool add_generation_prompt,
    std::string_view kwargs_json) const {
  std::vector<std::pair<std::string, jinja::Value>> variables;
  const jinja::Value messages = jinja::from_json(messages_json, "messages");
  expect(messages.is_list(), "[chat_template] expected messages as an array, got a {}",
         messages.type_name());
  variables.emplace_back("messages", messages);
  const jinja::Value tools =
      tools_json.empty() ? jinja::Value::none() : jinja::from_json(tools_json, "tools");
  expect(tools.is_list() || tools.is_none(), "[chat_template] expected tools as an array, got a {}",
         tools.type_name());
  variables.emplace_back("tools", tools);
  variables.emplace_back("documents", jinja::Value::none());
  variables.emplace_back("add_generation_prompt", add_generation_prompt);
  for (const auto& [name, token] : special_tokens) {
    variables.emplace_back(name, token);
  }
  if (!kwargs_json.empty()) {
    const jinja::Value more = jinja::from_json(kwargs_json, "chat_template_kwargs");
    expect(more.is_dict(), "[chat_template] expected chat_template_kwargs as an object, got a {}",
           more.type_name());
    for (const auto& [name, value] : more.as_dict().items()) {
      variables.emplace_back(name.as_string(), value);
    }
  }
  return jinja::render(program().body, variables);
}

}  // namespace cambium
