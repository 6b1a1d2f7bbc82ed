// Which part of a rendered conversation is learned, for the habits that chat templates have.
#include "train/chat_spans.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/random.h"
#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::byte_tokenizer;
using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

/// The rendering with the learned turns in brackets.
std::string marked(const std::string& chat_template, const Json& messages,
                   const std::string& variables = "") {
  const RenderedChat chat = render_chat(byte_tokenizer(chat_template), {messages, "", variables});
  std::string text;
  size_t done = 0;
  for (const TextSpan& turn : chat.turns) {
    text += chat.text.substr(done, turn.begin - done) + "[" +
            chat.text.substr(turn.begin, turn.end - turn.begin) + "]";
    done = turn.end;
  }
  return text + chat.text.substr(done);
}

Json turns(std::initializer_list<std::pair<const char*, const char*>> list) {
  Json messages = Json::array();
  for (const auto& [role, content] : list) {
    messages.push_back({{"role", role}, {"content", content}});
  }
  return messages;
}

// Qwen3's and SmolLM3's habit: thoughts stay in the last answer only.
constexpr const char* kForgetsThoughts =
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}\n{% else %}<a>"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% endif %}<e>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";

TEST(ChatSpans, AnswersAreLearnedAsTheWholeWritesThem) {
  EXPECT_EQ(marked(kForgetsThoughts, turns({{"user", "q"},
                                            {"assistant", "<think>hm</think>\nfour"},
                                            {"user", "r"},
                                            {"assistant", "<think>ok</think>\nfive"}})),
            "<u>q\n<a>[four<e>\n]<u>r\n<a>[<think>ok</think>\nfive<e>\n]");
}

// A prompt that opens a thought, which the history does not have.
TEST(ChatSpans, BeginWhereThePromptAndTheConversationPart) {
  const char* const opens =
      "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<e>{% endfor %}"
      "{% if add_generation_prompt %}<a><think>\n{% endif %}";
  EXPECT_EQ(marked(opens, turns({{"user", "q"}, {"assistant", "four"}})), "<u>q<e><a>[four<e>]");
  EXPECT_EQ(marked(opens, turns({{"user", "q"}, {"assistant", "<think>\nhm</think>four"}})),
            "<u>q<e><a><think>\n[hm</think>four<e>]");
}

// Llama's: contents are trimmed. Mistral's: the system message moves to the last question.
TEST(ChatSpans, TrimmedAndMovedMessages) {
  const char* const trims =
      "{% for m in messages %}<{{ m.role[0] }}>\n{{ m.content | trim }}<e>{% endfor %}"
      "{% if add_generation_prompt %}<a>\n{% endif %}";
  EXPECT_EQ(marked(trims, turns({{"user", " q \n"},
                                 {"assistant", "four \n"},
                                 {"user", "r"},
                                 {"assistant", "\nfive"}})),
            "<u>\nq<e><a>\n[four<e>]<u>\nr<e><a>\n[five<e>]");
  const char* const moves =
      "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
      "{% for m in messages %}{% if m.role == 'user' %}[Q]{% if loop.index0 == messages|length - 2 "
      "or loop.last %}{{ first }}|{% endif %}{{ m.content }}[/Q]{% elif m.role == 'assistant' %} "
      "{{ m.content }}<e>{% endif %}{% endfor %}";
  const std::string text = marked(moves, turns({{"system", "be brief"},
                                                {"user", "q"},
                                                {"assistant", "four"},
                                                {"user", "r"},
                                                {"assistant", "five"}}));
  EXPECT_EQ(text, "[Q]q[/Q][ four<e>][Q]be brief|r[/Q][ five<e>]");
}

TEST(ChatSpans, WhiteSpaceAtTheEndsOfContentsIsTheirs) {
  EXPECT_EQ(
      marked("{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<e>"
             "{% else %}{{ '\\n' }}{% endif %}{% endfor %}",
             turns({{"user", "q "}, {"assistant", " 4\n"}, {"user", "r"}, {"assistant", "\n5 "}})),
      "q \n[ 4\n<e>]r\n[\n5 <e>]");
}

TEST(ChatSpans, VariablesReachTheTemplate) {
  EXPECT_EQ(marked("{% for m in messages %}<{{ m.role }}>{% if quiet and m.role == 'assistant' %}"
                   "(quiet){% endif %}{{ m.content }}{% endfor %}",
                   turns({{"user", "q"}, {"assistant", "4"}}), R"({"quiet": true})"),
            "<user>q[<assistant>(quiet)4]");
}

// Contents that cannot be marked are found by rendering the conversation's beginnings.
TEST(ChatSpans, CallsWithoutContent) {
  Json messages = turns({{"user", "q"}});
  messages.push_back(
      {{"role", "assistant"}, {"content", nullptr}, {"tool_calls", {{{"name", "f"}}}}});
  messages.push_back({{"role", "tool"}, {"content", "4"}});
  messages.push_back({{"role", "assistant"}, {"content", "four"}});
  EXPECT_EQ(marked("{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls | "
                   "tojson }}{% else %}{{ m.content }}{% endif %}<e>{% endfor %}"
                   "{% if add_generation_prompt %}<assistant>{% endif %}",
                   messages),
            "<user>q<e><assistant>[[{\"name\": \"f\"}]<e>]<tool>4<e><assistant>[four<e>]");
}

// Templates that write a conversation as an extension of its beginning leave no choice: the turn is
// what its beginning's rendering adds.
TEST(ChatSpans, AreWhatTheBeginningsSay) {
  const Tokenizer tokenizer = byte_tokenizer();
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Rng rng(5, seed);
    Json messages = Json::array();
    for (int64_t n = rng.between(1, 6); n > 0; --n) {
      for (const char* role : {"user", "assistant"}) {
        std::string content;
        for (int64_t c = rng.between(1, 6); c > 0; --c) {
          content += rng.pick(std::string_view("a <|\n"));
        }
        messages.push_back({{"role", role}, {"content", content}});
      }
    }
    const RenderedChat chat = render_chat(tokenizer, {messages, "", ""});
    ASSERT_EQ(chat.turns.size(), messages.size() / 2);
    for (size_t i = 0; i < chat.turns.size(); ++i) {
      Json before(messages.begin(), messages.begin() + static_cast<ptrdiff_t>(2 * i + 1));
      EXPECT_EQ(chat.turns[i].begin, tokenizer.apply_chat_template(before.dump(), {}, true).size());
      before.push_back(messages[2 * i + 1]);
      EXPECT_EQ(chat.turns[i].end, tokenizer.apply_chat_template(before.dump(), {}, false).size());
      EXPECT_EQ(chat.messages[i], 2 * i + 1);
    }
  }
}

TEST(ChatSpans, LongConversationsAreRenderedAsAWhole) {
  Json messages = Json::array();
  for (int i = 0; i < 2000; ++i) {
    messages.push_back({{"role", "user"}, {"content", "question " + std::to_string(i)}});
    messages.push_back({{"role", "assistant"}, {"content", "answer " + std::to_string(i)}});
  }
  const RenderedChat chat = render_chat(byte_tokenizer(), {messages, "", ""});
  ASSERT_EQ(chat.turns.size(), 2000U);
  EXPECT_EQ(chat.text.substr(chat.turns[1999].begin), "answer 1999<|end|>");
}

TEST(ChatSpans, TurnsThatAreNotWrittenAreAnError) {
  const std::string message = testing::error_of([&] {
    render_chat(byte_tokenizer("{% for m in messages %}{% if m.role == 'user' or loop.last %}"
                               "{{ m.content }}{% endif %}{% endfor %}"),
                {turns({{"user", "q"}, {"assistant", "4"}, {"user", "r"}}), "", ""});
  });
  EXPECT_THAT(message, HasSubstr("writes turn 2 differently"));
}

}  // namespace
}  // namespace cambium
