#include "text/chat_template.h"

#include "fuzz/fuzzing.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::allow_errors([&] {
    const ChatTemplate chat{std::string(fuzz::text_of(data, size))};
    chat.render({{"bos_token", "<s>"}, {"eos_token", "</s>"}},
                R"([{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi <b> é", "n": [1, 2.5, null, true]},
                    {"role": "assistant", "content": "Yes.", "tool_calls": [{"type": "function",
                     "function": {"name": "f", "arguments": {"x": 1}}}]}])",
                R"([{"type": "function", "function": {"name": "f", "parameters": {}}}])", true,
                R"({"enable_thinking": false})");
  });
}
