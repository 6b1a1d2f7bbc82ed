// Documents from JSON lines, and from conversations through the chat template.
#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "train/dataset.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

class JsonlSource : public DocumentSource {
 public:
  explicit JsonlSource(std::string fingerprint) : fingerprint_(std::move(fingerprint)) {}

  void add(const Document& document) {
    tokens_.insert(tokens_.end(), document.tokens.begin(), document.tokens.end());
    learn_.insert(learn_.end(), document.learn.begin(), document.learn.end());
    starts_.push_back(tokens_.size());
  }
  int64_t size() const override { return static_cast<int64_t>(starts_.size()) - 1; }
  Document document(uint64_t index) const override {
    const auto begin = static_cast<std::ptrdiff_t>(starts_[index]);
    const auto end = static_cast<std::ptrdiff_t>(starts_[index + 1]);
    return {{tokens_.begin() + begin, tokens_.begin() + end},
            {learn_.begin() + begin, learn_.begin() + end}};
  }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  std::vector<int32_t> tokens_;
  std::vector<uint8_t> learn_;
  std::vector<size_t> starts_{0};
  std::string fingerprint_;
};

const std::string& text_field(const Json& line, const char* key) {
  const auto it = line.find(key);
  expect(it != line.end() && it->is_string(), "'{}' is missing or not a string", key);
  return it->get_ref<const std::string&>();
}

Document read_document(const Tokenizer& tokenizer, const Json& line, LearnWhat learn) {
  expect(line.is_object(), "expected an object");
  if (line.contains("messages")) {
    return chat_document(tokenizer, line["messages"].dump(), learn);
  }
  if (line.contains("question")) {
    return question_document(tokenizer, text_field(line, "question"), text_field(line, "answer"),
                             learn);
  }
  if (line.contains("prompt")) {
    return completion_document(tokenizer, text_field(line, "prompt"),
                               text_field(line, "completion"), learn);
  }
  expect(
      line.contains("text"),
      "expected one of \"messages\", \"question\" and \"answer\", \"prompt\" and \"completion\", "
      "\"text\"");
  return text_document(tokenizer, text_field(line, "text"));
}

}  // namespace

Document chat_document(const Tokenizer& tokenizer, std::string_view messages_json,
                       LearnWhat learn) {
  const Json messages = try_json<Json>(messages_json);
  expect(messages.is_array() && !messages.empty(), "'messages' must be an array of messages");
  const std::string whole = tokenizer.apply_chat_template(messages_json, {}, false);
  Document document;
  size_t done = 0;
  Json so_far = Json::array();
  const auto append = [&](size_t end, bool learned) {
    document.append(tokenizer.encode(std::string_view(whole).substr(done, end - done), false),
                    learned);
    done = end;
  };
  for (const Json& message : messages) {
    expect(message.is_object() && message.contains("role"), "a message has no 'role'");
    const bool assistant = message["role"] == "assistant";
    std::string before;
    if (assistant) {
      before = tokenizer.apply_chat_template(so_far.dump(), {}, true);
    }
    so_far.push_back(message);
    if (!assistant) {
      continue;
    }
    const std::string after = tokenizer.apply_chat_template(so_far.dump(), {}, false);
    expect(whole.starts_with(before) && whole.starts_with(after) && done <= before.size() &&
               before.size() <= after.size(),
           "the chat template writes turn {} differently when more turns follow, so the "
           "assistant's tokens cannot be told; give one conversation per turn",
           so_far.size());
    append(before.size(), learn == LearnWhat::kAll);
    append(after.size(), true);
  }
  append(whole.size(), learn == LearnWhat::kAll);
  return document;
}

std::unique_ptr<DocumentSource> load_jsonl(const std::string& path, const Tokenizer& tokenizer,
                                           LearnWhat learn) {
  const MappedFile file(path);
  auto source = std::make_unique<JsonlSource>(fmt::format(
      "jsonl {} tokenizer {} learn {}", checksum_text(checksum(file.bytes())),
      checksum_text(tokenizer.fingerprint()), learn == LearnWhat::kAll ? "all" : "completion"));
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                              file.bytes().size());
  size_t begin = 0;
  for (int64_t number = 1; begin < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    const Json json = try_json<Json>(line);
    expect(!json.is_discarded(), "{}:{}: this line is not JSON", path, number);
    try {
      source->add(read_document(tokenizer, json, learn));
    } catch (const Error& error) {
      fail("{}:{}: {}", path, number, error.what());
    }
  }
  expect(source->size() > 0, "{}: the file has no documents", path);
  return source;
}

}  // namespace cambium
