// Which tokens of a line of JSON are learned, and what is said of lines that cannot be read.
#include <gmock/gmock.h>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "train/dataset.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::byte_tokenizer;
using ::testing::HasSubstr;

/// The document's text with what is learned in brackets.
std::string marked(const Tokenizer& tokenizer, const Document& document) {
  EXPECT_EQ(document.tokens.size(), document.learn.size());
  std::string text;
  bool inside = false;
  for (size_t t = 0; t < document.tokens.size(); ++t) {
    const bool learned = document.learn[t] != 0;
    if (learned != inside) {
      text += learned ? "[" : "]";
    }
    inside = learned;
    text += tokenizer.decode(std::span(&document.tokens[t], 1), false);
  }
  return inside ? text + "]" : text;
}

struct Row {
  const char* line;
  const char* completion;  // LearnWhat::kCompletion
  const char* all;
};

TEST(Jsonl, LearnsTheCompletionOrAll) {
  const Row rows[] = {
      {R"({"prompt": "2+2=", "completion": "4"})", "2+2=[4<|stop|>]", "[2+2=4<|stop|>]"},
      {R"({"completion": "4", "id": 7, "prompt": ""})", "[4<|stop|>]", "[4<|stop|>]"},
      {R"({"question": "2+2?", "answer": "4"})", "2+2?\n[4<|stop|>]", "[2+2?\n4<|stop|>]"},
      {R"({"text": "2+2=4"})", "[2+2=4<|stop|>]", "[2+2=4<|stop|>]"},
      {R"({"text": "<|user|>a"})", "[<|user|>a<|stop|>]", "[<|user|>a<|stop|>]"},
      {R"({"messages": [{"role": "user", "content": "2+2?"},
                        {"role": "assistant", "content": "4"}]})",
       "<|user|>2+2?<|end|><|assistant|>[4<|end|>]", "[<|user|>2+2?<|end|><|assistant|>4<|end|>]"},
      {R"({"messages": [{"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
                        {"role": "user", "content": "e"}]})",
       "<|system|>Be brief.<|end|><|user|>a<|end|><|assistant|>[b<|end|>]<|user|>c<|end|>"
       "<|assistant|>[d<|end|>]<|user|>e<|end|>",
       "[<|system|>Be brief.<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|>"
       "<|assistant|>d<|end|><|user|>e<|end|>]"},
      {R"({"messages": [{"role": "user", "content": "a"}]})", "<|user|>a<|end|>",
       "[<|user|>a<|end|>]"},
  };
  const Tokenizer tokenizer = byte_tokenizer();
  const TestFolder folder;
  std::string lines;
  for (const Row& row : rows) {
    std::string line = row.line;
    std::erase(line, '\n');
    // Lines may be empty, and end as Windows ends them.
    lines += line + "\r\n\n  \t\n";
  }
  write_file_atomically(folder.at("data.jsonl"), lines);
  for (const LearnWhat learn : {LearnWhat::kCompletion, LearnWhat::kAll}) {
    const auto source = load_jsonl(folder.at("data.jsonl"), tokenizer, learn);
    ASSERT_EQ(source->size(), static_cast<int64_t>(std::size(rows)));
    for (size_t i = 0; i < std::size(rows); ++i) {
      EXPECT_EQ(marked(tokenizer, source->document(i)),
                learn == LearnWhat::kAll ? rows[i].all : rows[i].completion);
    }
  }
}

// The label of a token is the next one, so the first token is none whatever its mark says.
TEST(Jsonl, CountsTheTokensThatBecomeLabels) {
  const Tokenizer tokenizer = byte_tokenizer();
  EXPECT_EQ(text_document(tokenizer, "abc").labels(), 3);
  EXPECT_EQ(text_document(tokenizer, "").labels(), 0);
  EXPECT_EQ(completion_document(tokenizer, "abc", "de").labels(), 3);
  EXPECT_EQ(question_document(tokenizer, "abc", "de", LearnWhat::kAll).labels(), 6);
  EXPECT_EQ(Document{}.labels(), 0);
}

TEST(Jsonl, FingerprintNamesContentTokenizerAndWhatIsLearned) {
  const TestFolder folder;
  write_file_atomically(folder.at("a.jsonl"), "{\"text\": \"a\"}\n");
  write_file_atomically(folder.at("same.jsonl"), "{\"text\": \"a\"}\n");
  write_file_atomically(folder.at("b.jsonl"), "{\"text\": \"b\"}\n");
  const Tokenizer tokenizer = byte_tokenizer();
  const TokenizerFiles files = train_tokenizer({}, 257, {"<|end|>"}, "");
  const Tokenizer other = Tokenizer::parse(files.tokenizer_json, files.config_json);
  const auto name = [&](const char* file, const Tokenizer& t, LearnWhat learn) {
    return load_jsonl(folder.at(file), t, learn)->fingerprint();
  };
  const std::string a = name("a.jsonl", tokenizer, LearnWhat::kCompletion);
  EXPECT_EQ(name("same.jsonl", tokenizer, LearnWhat::kCompletion), a);
  EXPECT_NE(name("b.jsonl", tokenizer, LearnWhat::kCompletion), a);
  EXPECT_NE(name("a.jsonl", tokenizer, LearnWhat::kAll), a);
  EXPECT_NE(name("a.jsonl", other, LearnWhat::kCompletion), a);
}

std::string error_of(const std::string& path, const Tokenizer& tokenizer) {
  return testing::message_of([&] { load_jsonl(path, tokenizer); });
}

TEST(JsonlErrors, NameTheFileTheLineAndWhatIsWrong) {
  const struct {
    const char* lines;
    const char* line;  // empty: the file as a whole
    const char* expected;
  } rows[] = {
      {"", "", "has no documents"},
      {"\n \n\r\n", "", "has no documents"},
      {"{\"text\": \"a\"}\n{\"text\": ", ":2", "not JSON"},
      {"{\"text\": \"a\"}\n\n\n{'text': 'a'}\n", ":4", "not JSON"},
      {"{\"text\": \"\xff\"}", ":1", "not JSON"},
      {"[1, 2]", ":1", "expected an object"},
      {"{\"text\": \"a\"}\n{}", ":2", "expected one of \"messages\""},
      {R"({"content": "a"})", ":1", "expected one of \"messages\""},
      {R"({"text": 4})", ":1", "'text' is missing or not a string"},
      {R"({"question": "a"})", ":1", "'answer' is missing or not a string"},
      {R"({"question": null, "answer": "a"})", ":1", "'question' is missing or not a string"},
      {R"({"prompt": "a", "answer": "b"})", ":1", "'completion' is missing or not a string"},
      {R"({"messages": "a"})", ":1", "'messages' must be an array of messages"},
      {R"({"messages": []})", ":1", "'messages' must be an array of messages"},
      {R"({"messages": [{"content": "a"}]})", ":1", "a message has no 'role'"},
      {R"({"messages": ["a"]})", ":1", "a message has no 'role'"},
  };
  const Tokenizer tokenizer = byte_tokenizer();
  const TestFolder folder;
  const std::string path = folder.at("data.jsonl");
  for (const auto& row : rows) {
    write_file_atomically(path, row.lines);
    const std::string error = error_of(path, tokenizer);
    EXPECT_THAT(error, HasSubstr(path + row.line + ": ")) << row.lines;
    EXPECT_THAT(error, HasSubstr(row.expected)) << row.lines;
  }
  EXPECT_THAT(error_of(folder.at("absent.jsonl"), tokenizer), HasSubstr("absent.jsonl"));
}

TEST(JsonlErrors, TellTokenizersThatCannotWriteTheDocument) {
  const TestFolder folder;
  const std::string path = folder.at("data.jsonl");
  const std::string chat =
      R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},)"
      R"( {"role": "user", "content": "c"}]})";
  write_file_atomically(path, "\n" + chat);
  EXPECT_THAT(error_of(path, byte_tokenizer("")), HasSubstr(path + ":2: "));
  // A template that keeps the last answer only, as those of reasoning models do.
  const std::string forgetful =
      "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|{{ m.role }}|>"
      "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif "
      "%}";
  EXPECT_THAT(error_of(path, byte_tokenizer(forgetful)),
              HasSubstr(path + ":2: the chat template writes turn 2 differently"));
  write_file_atomically(path, "{\"text\": \"a\"}");
  EXPECT_THAT(
      error_of(path, Tokenizer::parse(train_tokenizer({}, 257, {"<e>"}, "").tokenizer_json)),
      HasSubstr(path + ":1: the tokenizer names no end token"));
}

}  // namespace
}  // namespace cambium
