#include "model/chat_template.h"

#include "base/error.h"

namespace cambium {

struct ChatTemplate::Program {};

ChatTemplate::ChatTemplate(std::string source) : source_(std::move(source)) {}

std::string ChatTemplate::render(const std::vector<std::pair<std::string, std::string>>&,
                                 std::string_view, std::string_view, bool, std::string_view) const {
  fail("[chat_template] rendering is not built in yet");
}

}  // namespace cambium
