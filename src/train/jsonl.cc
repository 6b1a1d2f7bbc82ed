// Documents from JSON lines, and from conversations through the chat template.
#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/checksum.h"
#include "base/error.h"
#include "base/json.h"
#include "base/json_lines.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "base/text.h"
#include "text/prompt_format.h"
#include "train/chat_spans.h"
#include "train/dataset.h"
#include "train/token_spans.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kShownColumns = 12;

class JsonlSource : public DocumentSource {
 public:
  void add(const Document& document) {
    tokens_.insert(tokens_.end(), document.tokens.begin(), document.tokens.end());
    learn_.insert(learn_.end(), document.learn.begin(), document.learn.end());
    starts_.push_back(tokens_.size());
  }
  int64_t size() const override { return static_cast<int64_t>(starts_.size()) - 1; }
  Document document(uint64_t index) const override {
    const auto begin = static_cast<ptrdiff_t>(starts_[index]);
    const auto end = static_cast<ptrdiff_t>(starts_[index + 1]);
    return {{tokens_.begin() + begin, tokens_.begin() + end},
            {learn_.begin() + begin, learn_.begin() + end}};
  }
  std::string fingerprint() const override { return fingerprint_; }
  void set_fingerprint(std::string fingerprint) { fingerprint_ = std::move(fingerprint); }

 private:
  std::vector<int32_t> tokens_;
  std::vector<uint8_t> learn_;
  std::vector<size_t> starts_{0};
  std::string fingerprint_;
};

/// A row that is what it should be, but that this model's template cannot write.
class UnusableRow : public Error {
 public:
  using Error::Error;
};

/// The columns of a row that are there (null is absent), and which of them were asked for.
class Row {
 public:
  explicit Row(const Json& row) {
    expect(row.is_object(), "expected an object");
    for (const auto& [name, value] : row.items()) {
      if (!value.is_null()) {
        columns_[name] = &value;
      }
      nulls_ = nulls_ || value.is_null();
    }
  }

  const Json* find(const std::string& name) {
    const auto found = columns_.find(name);
    if (found == columns_.end()) {
      return nullptr;
    }
    used_.insert(name);
    return found->second;
  }
  const std::string& text(const char* name) {
    const Json* value = find(name);
    expect(value != nullptr && value->is_string(), "'{}' is missing or not a string", name);
    return value->get_ref<const std::string&>();
  }
  std::string names() const {
    std::vector<std::string> names;
    for (const auto& [name, value] : columns_) {
      if (names.size() < kShownColumns) {
        names.push_back("\"" + name + "\"");
      }
    }
    return names.empty() ? "none" : join(names, ", ");
  }
  std::vector<std::string> unused() const {
    std::vector<std::string> names;
    for (const auto& [name, value] : columns_) {
      if (!used_.contains(name)) {
        names.push_back(name);
      }
    }
    return names;
  }
  /// What `generate` writes beside a right answer; that one is wrong is worth saying.
  bool written_by_generate(const std::string& name) const {
    static const std::set<std::string> names = {"expected", "finish_reason", "sample"};
    return names.contains(name) || (name == "correct" && *columns_.at(name) == true);
  }
  bool has_nulls() const { return nulls_; }

 private:
  std::map<std::string, const Json*> columns_;
  std::set<std::string> used_;
  bool nulls_ = false;
};

/// A turn as ShareGPT's files write it: {"from": "human", "value": "..."}.
Json message_of_turn(const Json& turn) {
  static const std::map<std::string, std::string> roles = {
      {"human", "user"},        {"user", "user"},           {"gpt", "assistant"},
      {"chatgpt", "assistant"}, {"assistant", "assistant"}, {"model", "assistant"},
      {"system", "system"},     {"tool", "tool"},           {"observation", "tool"}};
  expect(turn.is_object() && turn.contains("from") && turn["from"].is_string() &&
             turn.contains("value") && turn["value"].is_string(),
         "a turn of a conversation needs the strings 'from' and 'value'");
  const auto role = roles.find(turn["from"].get_ref<const std::string&>());
  expect(role != roles.end(),
         "a turn is from '{}'; expected human, gpt, system, tool or observation",
         turn["from"].get_ref<const std::string&>());
  Json message = {{"role", role->second}, {"content", turn["value"]}};
  for (const auto& [key, value] : turn.items()) {
    if (key != "from" && key != "value") {
      message[key] = value;
    }
  }
  return message;
}

void check_messages(const Json& messages) {
  for (const Json& message : messages) {
    expect(message.is_object() && message.contains("role"), "a message has no 'role'");
  }
}

/// Messages say themselves that they are not to be learned: "weight": 0 or "train": false.
bool learns(const Json& message) {
  const auto weight = message.find("weight");
  const auto train = message.find("train");
  return !(weight != message.end() && weight->is_number() && weight->get<double>() == 0.0) &&
         !(train != message.end() && train->is_boolean() && !train->get<bool>());
}

Document learn_parts(const Tokenizer& tokenizer, std::string_view text, std::vector<int32_t> ids,
                     std::span<const TextSpan> parts, LearnWhat learn) {
  Document document;
  document.learn = learn == LearnWhat::kAll ? std::vector<uint8_t>(ids.size(), 1)
                                            : tokens_of_parts(tokenizer, text, ids, parts);
  document.tokens = std::move(ids);
  return document;
}

/// The end token, unless the tokenizer has written it.
void append_end(const Tokenizer& tokenizer, Document& document) {
  const auto eos = tokenizer.eos_id();
  expect(eos.has_value(),
         "the tokenizer names no end token (eos_token in tokenizer_config.json), which documents "
         "are to end with");
  if (document.tokens.size() > 1 && document.tokens.back() == *eos) {
    document.learn.back() = 1;
  } else {
    document.append({*eos}, true);
  }
}

/// Only messages from `first` on are learned.
Document conversation_document(const Tokenizer& tokenizer, const Conversation& conversation,
                               size_t first, LearnWhat learn) {
  const RenderedChat chat = render_chat(tokenizer, conversation);
  std::vector<TextSpan> parts;
  for (size_t i = 0; i < chat.turns.size(); ++i) {
    const size_t message = chat.messages[i];
    if (message >= first && learns(conversation.messages[message])) {
      parts.push_back(chat.turns[i]);
    }
  }
  return learn_parts(tokenizer, chat.text, tokenizer.encode(chat.text, false), parts, learn);
}

class RowReader {
 public:
  /// `prompts`: what stands before the answers alone.
  RowReader(const Tokenizer& tokenizer, LearnWhat learn, bool prompts)
      : tokenizer_(tokenizer), learn_(learn), prompts_(prompts) {}

  Document read(const Json& json) {
    Row row(json);
    Document document = prompts_ ? read_prompt(row) : read_kind(row);
    for (const std::string& name : row.unused()) {
      if (!row.written_by_generate(name)) {
        ++unused_[name];
      }
    }
    return document;
  }

  /// Rows that are not plain text: conversations through a template, prompts with completions.
  bool has_parts() const { return has_parts_; }
  bool has_conversations() const { return has_conversations_; }
  /// "id (12 rows), source (3 rows)"; empty when every column was used.
  std::string unused() const {
    std::vector<std::string> names;
    for (const auto& [name, rows] : unused_) {
      names.push_back(fmt::format("{} ({} rows)", name, rows));
    }
    return join(names, ", ");
  }
  bool tools_unwritten() const { return tools_unwritten_; }

  /// What another reader found in rows behind this one's.
  void add(const RowReader& later) {
    for (const auto& [name, rows] : later.unused_) {
      unused_[name] += rows;
    }
    // Of documents of several kinds the last row decides: runs are known by it.
    has_parts_ = later.has_parts_ || (prompts_ && has_parts_);
    has_conversations_ = has_conversations_ || later.has_conversations_;
    tools_unwritten_ = tools_looked_at_ ? tools_unwritten_ : later.tools_unwritten_;
    tools_looked_at_ = tools_looked_at_ || later.tools_looked_at_;
  }

 private:
  /// The messages of a conversation; null where the row is none.
  static Json messages_of(Row& row) {
    for (const char* name : {"messages", "conversations", "conversation"}) {
      if (const Json* messages = row.find(name)) {
        expect(messages->is_array() && !messages->empty(), "'{}' must be an array of messages",
               name);
        const Json& head = messages->front();
        if (head.is_object() && head.contains("from") && !head.contains("role")) {
          Json list = Json::array();
          for (const Json& turn : *messages) {
            list.push_back(message_of_turn(turn));
          }
          return list;
        }
        return *messages;
      }
    }
    return nullptr;
  }

  Document read_prompt(Row& row) {
    for (const char* unread : {"answer", "completion"}) {
      row.find(unread);
    }
    Json messages = messages_of(row);
    const Json* prompt = row.find("prompt");
    if (messages.is_null() && prompt != nullptr && prompt->is_array()) {
      messages = *prompt;
    }
    Document document;
    if (!messages.is_null()) {
      document.append(conversation_prompt(row, std::move(messages)), false);
    } else if (row.find("question") != nullptr) {
      document.append(tokenizer_.encode(question_prompt(row.text("question")), true), false);
    } else {
      expect(prompt != nullptr,
             "expected a prompt: one of \"prompt\", \"messages\", \"conversations\", "
             "\"question\"; the row has the columns {}",
             row.names());
      document.append(tokenizer_.encode(row.text("prompt"), true), false);
    }
    expect(!document.tokens.empty(), "the prompt is empty");
    return document;
  }

  std::vector<int32_t> conversation_prompt(Row& row, Json messages) {
    Conversation conversation = conversation_of(row, std::move(messages));
    if (conversation.messages.back()["role"] == "assistant") {
      conversation.messages.erase(conversation.messages.size() - 1);
    }
    expect(!conversation.messages.empty(), "the conversation has no turn before the assistant's");
    try {
      return tokenizer_.encode(
          tokenizer_.apply_chat_template(conversation.messages.dump(), conversation.tools, true,
                                         conversation.variables),
          false);
    } catch (const Error& error) {
      throw UnusableRow(error.what());
    }
  }

  Document read_kind(Row& row) {
    if (Json messages = messages_of(row); !messages.is_null()) {
      return read_conversation(row, std::move(messages), 0);
    }
    has_parts_ = true;
    if (row.find("question") != nullptr) {
      return question_document(tokenizer_, row.text("question"), row.text("answer"), learn_);
    }
    if (const Json* prompt = row.find("prompt")) {
      const Json* completion = row.find("completion");
      if (prompt->is_array() && completion != nullptr && completion->is_array()) {
        Json messages = *prompt;
        messages.insert(messages.end(), completion->begin(), completion->end());
        expect(!messages.empty(), "'prompt' and 'completion' have no messages");
        return read_conversation(row, std::move(messages), prompt->size());
      }
      return completion_document(tokenizer_, row.text("prompt"), row.text("completion"), learn_);
    }
    has_parts_ = false;
    if (row.find("text") != nullptr) {
      return text_document(tokenizer_, row.text("text"));
    }
    // A column that is there as null names what the row was to be.
    if (row.has_nulls() && row.find("answer") != nullptr) {
      row.text("question");
    }
    fail(
        "expected one of \"messages\", \"conversations\", \"question\" and \"answer\", "
        "\"prompt\" and \"completion\", \"text\"; the row has the columns {}",
        row.names());
  }

  Document read_conversation(Row& row, Json messages, size_t first) {
    const size_t given = messages.size();
    const Conversation conversation = conversation_of(row, std::move(messages));
    first += conversation.messages.size() - given;
    try {
      note_unwritten_tools(conversation);
      return conversation_document(tokenizer_, conversation, first, learn_);
    } catch (const Error& error) {
      throw UnusableRow(error.what());
    }
  }

  /// With the row's system message before the others.
  Conversation conversation_of(Row& row, Json messages) {
    expect(!messages.empty(), "the conversation has no messages");
    check_messages(messages);
    has_parts_ = true;
    has_conversations_ = true;
    expect(tokenizer_.has_chat_template(),
           "the tokenizer has no chat template, which conversations are written with");
    if (const Json* system = row.find("system"); system != nullptr && system->is_string()) {
      expect(messages.front()["role"] != "system",
             "the row has a column 'system' and a system message as well; keep one of them");
      if (!system->get_ref<const std::string&>().empty()) {
        messages.insert(messages.begin(), Json{{"role", "system"}, {"content", *system}});
      }
    }
    return {std::move(messages), tools_of(row), variables_of(row)};
  }

  static std::string tools_of(Row& row) {
    const Json* tools = row.find("tools");
    if (tools == nullptr) {
      return "";
    }
    Json parsed;
    if (tools->is_string()) {  // as some data sets keep them
      const auto& text = tools->get_ref<const std::string&>();
      parsed = text.empty() ? Json::array() : try_json<Json>(text);
      tools = &parsed;
    }
    expect(tools->is_array(), "'tools' must be an array of functions, or one as a string of JSON");
    return tools->empty() ? "" : tools->dump();
  }

  static std::string variables_of(Row& row) {
    Json variables = Json::object();
    if (const Json* given = row.find("chat_template_kwargs")) {
      expect(given->is_object(), "'chat_template_kwargs' must be an object");
      variables = *given;
    }
    for (const char* name : {"documents", "enable_thinking"}) {
      if (const Json* value = row.find(name)) {
        variables[name] = *value;
      }
    }
    return variables.empty() ? "" : variables.dump();
  }

  /// Once a file: whether the template writes the tools at all.
  void note_unwritten_tools(const Conversation& conversation) {
    if (conversation.tools.empty() || tools_looked_at_) {
      return;
    }
    tools_looked_at_ = true;
    const std::string messages = conversation.messages.dump();
    tools_unwritten_ = tokenizer_.apply_chat_template(messages, conversation.tools, false,
                                                      conversation.variables) ==
                       tokenizer_.apply_chat_template(messages, {}, false, conversation.variables);
  }

  const Tokenizer& tokenizer_;
  LearnWhat learn_;
  std::map<std::string, int64_t> unused_;
  bool prompts_;
  bool has_parts_ = false;
  bool has_conversations_ = false;
  bool tools_looked_at_ = false;
  bool tools_unwritten_ = false;
};

/// Rows that cannot be used do not end a run; they are counted, and the first is told of.
struct LeftOut {
  int64_t rows = 0;
  std::string first;  // "FILE:7: why"

  void add(const std::string& path, int64_t number, const UnusableRow& why) {
    add({1, fmt::format("{}:{}: {}", path, number, why.what())});
  }
  void add(const LeftOut& later) {
    first = rows == 0 ? later.first : first;
    rows += later.rows;
  }
};

/// What some lines of a file, one after another, have become.
struct RowsRead {
  RowReader reader;
  LeftOut left_out;
  std::vector<Document> documents;
};

// Lines are read by all cores, some one after another by each, and what they have become is put
// together in the file's order after so many of them.
constexpr int64_t kLinesInTurn = 32;
constexpr size_t kLinesAtOnce = 16384;
constexpr size_t kBytesAtOnce = size_t{64} << 20;

std::unique_ptr<DocumentSource> load_rows(const std::string& path, const Tokenizer& tokenizer,
                                          LearnWhat learn, bool prompts) {
  auto source = std::make_unique<JsonlSource>();
  RowReader reader(tokenizer, learn, prompts);
  LeftOut left_out;
  int64_t rows = 0;
  JsonLines file(path);
  for (;;) {
    const std::vector<JsonLines::Line> lines = file.next(kLinesAtOnce, kBytesAtOnce);
    if (lines.empty()) {
      break;
    }
    const int64_t count = std::ssize(lines);
    std::vector<RowsRead> pieces(static_cast<size_t>((count + kLinesInTurn - 1) / kLinesInTurn),
                                 {RowReader(tokenizer, learn, prompts), {}, {}});
    parallel_for(count, kLinesInTurn, [&](int64_t begin, int64_t end) {
      RowsRead& piece = pieces[static_cast<size_t>(begin / kLinesInTurn)];
      for (int64_t i = begin; i < end; ++i) {
        file.read(lines[static_cast<size_t>(i)], [&](const Json& json, int64_t number) {
          try {
            piece.documents.push_back(piece.reader.read(json));
          } catch (const UnusableRow& error) {
            piece.left_out.add(path, number, error);
          }
        });
      }
    });
    rows += count;
    for (const RowsRead& piece : pieces) {
      for (const Document& document : piece.documents) {
        source->add(document);
      }
      reader.add(piece.reader);
      left_out.add(piece.left_out);
    }
  }
  expect(rows > 0, "{}: the file has no documents", path);
  expect(source->size() > 0, "{}{}", left_out.first,
         rows > 1 ? fmt::format(" (and so with all {} rows of the file)", rows) : "");
  if (left_out.rows > 0) {
    note("{} of {} rows are left out; the first is {}", left_out.rows, rows, left_out.first);
  }
  if (const std::string unused = reader.unused(); !unused.empty()) {
    note("{}: columns that are not used: {}", path, unused);
  }
  if (reader.tools_unwritten()) {
    note("{}: the chat template does not write the column tools", path);
  }
  // Files of plain text are named as they always were.
  source->set_fingerprint(fmt::format(
      "jsonl {} tokenizer {} learn {}{}{}", checksum_text(file.checksum()),
      checksum_text(tokenizer.fingerprint()),
      prompts                    ? "prompts"
      : learn == LearnWhat::kAll ? "all"
                                 : "completion",
      reader.has_parts() ? " rows 2" : "",
      reader.has_conversations()
          ? " template " +
                checksum_text(checksum(std::as_bytes(std::span(tokenizer.chat_template()))))
          : ""));
  return source;
}

}  // namespace

Document completion_document(const Tokenizer& tokenizer, std::string_view prompt,
                             std::string_view completion, LearnWhat learn) {
  const std::string text = std::string(prompt) + std::string(completion);
  const TextSpan part{prompt.size(), text.size()};
  Document document =
      learn_parts(tokenizer, text, tokenizer.encode(text, true), std::span(&part, 1), learn);
  append_end(tokenizer, document);
  return document;
}

Document text_document(const Tokenizer& tokenizer, std::string_view text) {
  Document document;
  document.append(tokenizer.encode(text, true), true);
  append_end(tokenizer, document);
  return document;
}

Document chat_document(const Tokenizer& tokenizer, std::string_view messages_json,
                       LearnWhat learn) {
  Json messages = try_json<Json>(messages_json);
  expect(messages.is_array() && !messages.empty(), "'messages' must be an array of messages");
  check_messages(messages);
  return conversation_document(tokenizer, {std::move(messages), "", ""}, 0, learn);
}

std::unique_ptr<DocumentSource> load_jsonl(const std::string& path, const Tokenizer& tokenizer,
                                           LearnWhat learn) {
  return load_rows(path, tokenizer, learn, false);
}

std::unique_ptr<DocumentSource> load_prompts(const std::string& path, const Tokenizer& tokenizer) {
  return load_rows(path, tokenizer, LearnWhat::kCompletion, true);
}

}  // namespace cambium
