// Rows as people's files have them: what is taken, what is refused, and what is said of the rest.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <map>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "train/dataset.h"
#include "train/held_out.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::byte_tokenizer;
using ::testing::HasSubstr;

struct Read {
  std::vector<std::string> documents;  // what is learned in brackets
  std::string said;                    // on standard error
  std::string error;
  std::string fingerprint;
};

std::string marked(const Tokenizer& tokenizer, const Document& document) {
  std::string text;
  bool inside = false;
  for (size_t t = 0; t < document.tokens.size(); ++t) {
    const bool learned = document.learn[t] != 0;
    text += learned == inside ? "" : learned ? "[" : "]";
    inside = learned;
    text += tokenizer.token_bytes(document.tokens[t]);
  }
  return inside ? text + "]" : text;
}

Read read(const std::string& lines, const Tokenizer& tokenizer = byte_tokenizer()) {
  const TestFolder folder;
  write_file_atomically(folder.at("d.jsonl"), lines);
  Read out;
  ::testing::internal::CaptureStderr();
  try {
    const auto source = load_jsonl(folder.at("d.jsonl"), tokenizer);
    for (int64_t i = 0; i < source->size(); ++i) {
      out.documents.push_back(marked(tokenizer, source->document(static_cast<uint64_t>(i))));
    }
    out.fingerprint = source->fingerprint();
  } catch (const Error& error) {
    out.error = error.what();
  }
  out.said = ::testing::internal::GetCapturedStderr();
  return out;
}

// More rows than are read at once, by all cores.
TEST(JsonlRows, OfALongFileStandInItsOrder) {
  constexpr int kRows = 20000;
  const auto file = [](const std::map<int, std::string>& others) {
    std::string lines;
    for (int i = 0; i < kRows; ++i) {
      const auto other = others.find(i);
      lines += other == others.end() ? fmt::format("{{\"text\": \"{}\", \"id\": 1}}\n", i)
                                     : other->second + "\n";
    }
    return lines;
  };
  const Read r = read(file({}));
  ASSERT_EQ(r.documents.size(), kRows);
  const std::string end = r.documents[0].substr(2);  // "[0" before it
  for (int i = 0; i < kRows; ++i) {
    ASSERT_EQ(r.documents[static_cast<size_t>(i)], "[" + std::to_string(i) + end);
  }
  EXPECT_THAT(r.said, HasSubstr("id (20000 rows)"));
  // The first in the file, whichever is found first.
  EXPECT_THAT(read(file({{19000, "{}"}, {70, "[]"}})).error, HasSubstr(":71: expected an object"));
  const std::string chat = R"({"messages": [{"role": "user", "content": "q"}]})";
  const Read refused = read(file({{19999, chat}, {17000, chat}, {33, chat}}),
                            byte_tokenizer("{{ raise_exception('no ' ~ messages|length) }}"));
  EXPECT_EQ(refused.documents.size(), kRows - 3);
  EXPECT_THAT(refused.said, HasSubstr("3 of 20000 rows are left out"));
  EXPECT_THAT(refused.said, HasSubstr(":34: "));
}

// By the last row, however many are read at once: a run that was begun goes on over the same.
TEST(JsonlRows, AFileOfSeveralKindsKeepsItsName) {
  const std::string text = "{\"text\": \"a\"}\n";
  const std::string question = "{\"question\": \"a\", \"answer\": \"b\"}\n";
  for (const int rows : {2, 31, 32, 33, 300}) {
    std::string texts;
    std::string questions;
    for (int i = 0; i < rows; ++i) {
      texts += text;
      questions += question;
    }
    const auto has_parts = [](const std::string& lines) {
      return read(lines).fingerprint.ends_with(" rows 2");
    };
    EXPECT_FALSE(has_parts(texts)) << rows;
    EXPECT_TRUE(has_parts(questions)) << rows;
    EXPECT_FALSE(has_parts(questions + text)) << rows;
    EXPECT_FALSE(has_parts(question + texts)) << rows;
    EXPECT_TRUE(has_parts(texts + question)) << rows;
  }
}

TEST(JsonlRows, ANullColumnIsAnAbsentOne) {
  const Read r = read(
      "{\"text\": \"ab\", \"messages\": null, \"prompt\": null, \"completion\": null}\n"
      "{\"text\": null, \"messages\": null, \"prompt\": \"2+2=\", \"completion\": \"4\"}\n"
      "{\"text\": null, \"messages\": [{\"role\": \"user\", \"content\": \"q\"}, "
      "{\"role\": \"assistant\", \"content\": \"4\"}]}\n");
  EXPECT_THAT(r.documents, ::testing::ElementsAre("[ab<|stop|>]", "2+2=[4<|stop|>]",
                                                  "<|user|>q<|end|><|assistant|>[4<|end|>]"));
  EXPECT_EQ(r.said, "");
}

TEST(JsonlRows, ToolsAndVariablesReachTheTemplate) {
  const Tokenizer tokenizer = byte_tokenizer(
      "{% for t in tools or [] %}{{ t.name }};{% endfor %}{% if enable_thinking %}think{% endif %}"
      "{{ style }}{% for d in documents or [] %}{{ d.title }}{% endfor %}"
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}<assistant>{% endif %}");
  const std::string chat =
      "\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
      "\"content\": \"4\"}]";
  const Read r = read("{" + chat + ", \"tools\": [{\"name\": \"add\"}]}\n{" + chat +
                          ", \"tools\": \"[{\\\"name\\\": \\\"sub\\\"}]\"}\n{" + chat +
                          ", \"tools\": null, \"chat_template_kwargs\": {\"style\": \"dry\"}, "
                          "\"enable_thinking\": true, \"documents\": [{\"title\": \"T\"}]}\n",
                      tokenizer);
  EXPECT_THAT(r.documents,
              ::testing::ElementsAre("add;<user>q<assistant>[4]", "sub;<user>q<assistant>[4]",
                                     "thinkdryT<user>q<assistant>[4]"));
  EXPECT_EQ(r.said, "");
  EXPECT_THAT(read("{" + chat + ", \"tools\": 3}").error,
              HasSubstr(":1: 'tools' must be an array"));
  EXPECT_THAT(read("{" + chat + ", \"tools\": [{\"name\": \"add\"}]}").said,
              HasSubstr("does not write the column tools"));
}

TEST(JsonlRows, OtherWritingsOfAConversation) {
  const Read r = read(
      "{\"conversations\": [{\"from\": \"system\", \"value\": \"s\"}, {\"from\": \"human\", "
      "\"value\": \"q\"}, {\"from\": \"gpt\", \"value\": \"4\"}]}\n"
      "{\"prompt\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
      "\"content\": "
      "\"3\"}, {\"role\": \"user\", \"content\": \"r\"}], \"completion\": [{\"role\": "
      "\"assistant\", "
      "\"content\": \"4\"}]}\n"
      "{\"system\": \"s\", \"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": "
      "\"assistant\", \"content\": \"3\", \"weight\": 0}, {\"role\": \"user\", \"content\": "
      "\"r\"}, "
      "{\"role\": \"assistant\", \"content\": \"4\"}]}\n");
  EXPECT_THAT(
      r.documents,
      ::testing::ElementsAre(
          "<|system|>s<|end|><|user|>q<|end|><|assistant|>[4<|end|>]",
          "<|user|>q<|end|><|assistant|>3<|end|><|user|>r<|end|><|assistant|>[4<|end|>]",
          "<|system|>s<|end|><|user|>q<|end|><|assistant|>3<|end|><|user|>r<|end|><|assistant|>[4<|"
          "end|>]"));
  EXPECT_THAT(read("{\"conversations\": [{\"from\": \"alien\", \"value\": \"q\"}]}").error,
              HasSubstr("a turn is from 'alien'; expected human, gpt"));
  EXPECT_THAT(
      read("{\"system\": \"s\", \"messages\": [{\"role\": \"system\", \"content\": \"q\"}]}").error,
      HasSubstr("a column 'system' and a system message as well"));
}

TEST(JsonlRows, WhatIsNotUsedIsSaidOnceAndWhatIsUnknownIsNamed) {
  const Read r =
      read("{\"text\": \"a\", \"id\": 1, \"source\": \"x\"}\n{\"text\": \"b\", \"id\": 2}\n");
  EXPECT_EQ(r.documents.size(), 2U);
  EXPECT_THAT(r.said, HasSubstr("columns that are not used: id (2 rows), source (1 rows)"));
  // What `generate` writes beside its answers is no news, but for answers that are wrong.
  const std::string trace =
      R"({"prompt": "q", "completion": "a", "expected": "1", "sample": 0, "correct": )";
  EXPECT_EQ(read(trace + "true, \"finish_reason\": \"stop\"}").said, "");
  EXPECT_THAT(read(trace + "false}").said, HasSubstr("not used: correct (1 rows)"));
  EXPECT_THAT(read("{\"instruction\": \"a\", \"output\": \"b\"}").error,
              HasSubstr(":1: expected one of \"messages\""));
  EXPECT_THAT(read("{\"instruction\": \"a\", \"output\": \"b\"}").error,
              HasSubstr("the row has the columns \"instruction\", \"output\""));
}

TEST(JsonlRows, OneOddRowDoesNotEndTheRun) {
  const Tokenizer tokenizer = byte_tokenizer(
      "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
      "{{ raise_exception('no such role') }}{% endif %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}<a>{% endif %}");
  const std::string good =
      "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
      "\"content\": \"4\"}]}\n";
  const std::string odd = "{\"messages\": [{\"role\": \"pirate\", \"content\": \"q\"}]}\n";
  const Read r = read(good + odd + odd + good, tokenizer);
  EXPECT_EQ(r.error, "");
  EXPECT_EQ(r.documents.size(), 2U);
  EXPECT_THAT(r.said, HasSubstr("2 of 4 rows are left out; the first is "));
  EXPECT_THAT(r.said, HasSubstr("d.jsonl:2: "));
  EXPECT_THAT(r.said, HasSubstr("no such role"));
  EXPECT_THAT(read(odd + odd, tokenizer).error, HasSubstr("(and so with all 2 rows of the file)"));
}

TEST(JsonlRows, WindowsFilesAndDeepRows) {
  EXPECT_EQ(read("\xEF\xBB\xBF{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}\r\n").documents.size(),
            2U);
  std::string deep = "{\"messages\": ";
  for (int i = 0; i < 200000; ++i) {
    deep += '[';
  }
  EXPECT_THAT(read("{\"text\": \"a\"}\n" + deep).error, HasSubstr("d.jsonl:2: "));
  EXPECT_THAT(read("{\"text\": \"a\"}\n" + deep).error, HasSubstr("nests more than"));
  std::string brackets(500, '[');
  EXPECT_EQ(read("{\"text\": \"" + brackets + "\\\"[\"}").documents.size(), 1U);
}

// What is learned is found in the tokens of the whole text, not by joining pieces tokenized apart.
TEST(JsonlRows, TheWholeTextIsTokenizedAtOnce) {
  std::vector<std::string> texts(50, "the cat sat on the mat");
  const TokenizerFiles files = train_tokenizer(
      texts, 300, {"<|stop|>"}, "{% for m in messages %}{{ m.content }}{% endfor %}");
  const Tokenizer tokenizer = Tokenizer::parse(files.tokenizer_json, files.config_json);
  const auto ids = tokenizer.encode("the cat sat", false);
  ASSERT_LT(ids.size(), 8U);
  for (const char* row :
       {"{\"prompt\": \"the c\", \"completion\": \"at sat\"}",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"the c\"}, {\"role\": \"assistant\", "
        "\"content\": \"at sat\"}]}"}) {
    const TestFolder folder;
    write_file_atomically(folder.at("d.jsonl"), row);
    const Document d = load_jsonl(folder.at("d.jsonl"), tokenizer)->document(0);
    EXPECT_EQ(
        std::vector<int32_t>(d.tokens.begin(), d.tokens.begin() + static_cast<int>(ids.size())),
        ids);
    // The token across the border is learned: it holds the answer's first letters.
    size_t bytes = 0;
    for (size_t t = 0; t < ids.size(); ++t) {
      bytes += tokenizer.token_bytes(ids[t]).size();
      EXPECT_EQ(d.learn[t] != 0, bytes > 5) << t;
    }
  }
}

TEST(JsonlRows, FingerprintsNameTheTemplate) {
  const std::string row =
      "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
      "\"content\": \"4\"}]}\n";
  const std::string plain = read(row).fingerprint;
  EXPECT_NE(
      read(row, byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")).fingerprint,
      plain);
  EXPECT_EQ(read(row).fingerprint, plain);
}

TEST(HeldOutCut, SaysThatDocumentsWereCutBeforeTheirAnswer) {
  const auto source = generated_source(
      [](uint64_t index) {
        Document document;
        document.append(std::vector<int32_t>(index == 0 ? 5 : 40, 3), false);
        document.append({4, 5}, true);
        return document;
      },
      "long prompts", 3);
  ::testing::internal::CaptureStderr();
  const HeldOut some(*source, 3, 16);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              HasSubstr("2 of 3 documents end before anything to learn when cut at 16 tokens"));
  EXPECT_EQ(some.documents(), 1);
  const std::string message = testing::error_of([&] { const HeldOut none(*source, 3, 4); });
  EXPECT_THAT(message, HasSubstr("cut at 4 tokens"));
  EXPECT_THAT(message, HasSubstr("the nearest one begins at token 6"));
}

TEST(PackerCut, SaysThatDocumentsWereCutBeforeTheirAnswer) {
  const auto source = generated_source(
      [](uint64_t) {
        Document document;
        document.append(std::vector<int32_t>(40, 3), false);
        document.append({4, 5}, true);
        return document;
      },
      "long prompts", 3);
  Packer packer(*source, 1, 8, LongDocuments::kCut);
  const std::string message = testing::error_of([&] { packer.next(); });
  EXPECT_THAT(message, HasSubstr("cut before anything to learn"));
  EXPECT_THAT(message, HasSubstr("sequence_length"));
  EXPECT_LE(packer.position().dropped, 3);
}

TEST(JsonlRows, PromptsAreWhatStandsBeforeTheAnswer) {
  const TestFolder folder;
  const Tokenizer tokenizer = byte_tokenizer();
  const auto prompt_in = [&](const std::string& line) {
    write_file_atomically(folder.at("p.jsonl"), line + "\n");
    const auto source = load_prompts(folder.at("p.jsonl"), tokenizer);
    EXPECT_EQ(source->document(0).labels(), 0);
    return marked(tokenizer, source->document(0));
  };
  const std::string user = R"({"role": "user", "content": "q"})";
  const std::string reply = R"({"role": "assistant", "content": "a"})";
  const struct {
    std::string line, expected;
  } rows[] = {
      {R"({"prompt": "2+2="})", "2+2="},
      {R"({"prompt": "2+2=", "completion": "4"})", "2+2="},
      {R"({"question": "how?", "answer": "so"})", "how?\n"},
      {"{\"prompt\": [" + user + "]}", "<|user|>q<|end|><|assistant|>"},
      {"{\"prompt\": [" + user + "], \"completion\": [" + reply + "]}",
       "<|user|>q<|end|><|assistant|>"},
      {"{\"messages\": [" + user + "," + reply + "]}", "<|user|>q<|end|><|assistant|>"},
      {"{\"messages\": [" + user + "], \"system\": \"s\"}",
       "<|system|>s<|end|><|user|>q<|end|><|assistant|>"},
      {R"({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})",
       "<|user|>q<|end|><|assistant|>"},
  };
  for (const auto& row : rows) {
    EXPECT_EQ(prompt_in(row.line), row.expected) << row.line;
  }
  const struct {
    std::string line, error;
  } wrong[] = {
      {R"({"text": "a"})", "expected a prompt"},
      {R"({"prompt": ""})", "the prompt is empty"},
      {R"({"prompt": 3})", "'prompt' is missing or not a string"},
      {R"({"prompt": []})", "has no messages"},
      {"{\"messages\": [" + reply + "]}", "no turn before the assistant's"},
  };
  for (const auto& row : wrong) {
    EXPECT_THAT(testing::message_of([&] { prompt_in(row.line); }), HasSubstr(row.error))
        << row.line;
  }
}

}  // namespace
}  // namespace cambium
