#include "eval/choices.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/random.h"
#include "base/text.h"
#include "eval/csv.h"
#include "eval/text_edit.h"

namespace cambium {
namespace {

using nlohmann::json;

constexpr size_t kMostOptions = 26;

std::string text_of(const json& line, const char* key) {
  const auto at = line.find(key);
  expect(at != line.end() && at->is_string(), "expected text in field '{}'", key);
  return at->get<std::string>();
}

std::vector<std::string> texts_of(const json& line, const char* key) {
  const auto at = line.find(key);
  expect(at != line.end() && at->is_array(), "expected '{}', a list of texts", key);
  std::vector<std::string> out;
  for (const json& entry : *at) {
    expect(entry.is_string(), "expected '{}' to hold texts, got {}", key, entry.type_name());
    out.push_back(entry.get<std::string>());
  }
  return out;
}

void check(const ChoiceQuestion& question) {
  expect(question.options.size() >= 2 && question.options.size() <= kMostOptions,
         "expected 2 to {} options, got {}", kMostOptions, question.options.size());
  expect(question.correct >= 0 && question.correct < std::ssize(question.options),
         "expected the right answer to be one of 0 to {}, got {}", question.options.size() - 1,
         question.correct);
}

/// Which option `value` names: a place from 0, as a number or in digits, a letter, or a label.
int64_t option_of(const json& value, const std::vector<std::string>& labels, const char* key) {
  if (value.is_number_integer()) {
    return value.get<int64_t>();
  }
  expect(value.is_string(), "expected '{}', a number or a text, got {}", key, value.type_name());
  const auto& text = value.get_ref<const std::string&>();
  const auto label = std::find(labels.begin(), labels.end(), text);
  if (label != labels.end()) {
    return label - labels.begin();
  }
  if (text.size() == 1 && text[0] >= 'A' && text[0] <= 'Z') {
    return text[0] - 'A';
  }
  expect(!text.empty() && text.size() < 3 &&
             std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; }),
         "expected '{}' to name one of {} options, got '{}'", key, labels.size(), text);
  return std::stoll(text);
}

/// The marks that WikiHow's texts carry, taken out as lm-evaluation-harness does.
std::string without_wikihow_marks(std::string_view raw, bool brackets) {
  std::string text(trim(raw));
  replace_all(text, " [title]", ". ");
  for (size_t open = brackets ? text.find('[') : std::string::npos; open != std::string::npos;
       open = text.find('[', open)) {
    const size_t close = text.find(']', open);
    if (close == std::string::npos) {
      break;
    }
    text.erase(open, close - open + 1);
  }
  std::string out;  // two spaces are one, as one pass of Python's replace leaves them
  for (size_t i = 0; i < text.size(); ++i) {
    out += text[i];
    i += text.compare(i, 2, "  ") == 0 ? 1 : 0;
  }
  return out;
}

/// Python's str.capitalize, for ASCII.
std::string capitalised(std::string text) {
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    text[i] = static_cast<char>(i == 0 ? std::toupper(c) : std::tolower(c));
  }
  return text;
}

}  // namespace

std::string choice_letter(int64_t index) {
  CAMBIUM_CHECK(index >= 0 && index < static_cast<int64_t>(kMostOptions));
  return {static_cast<char>('A' + index)};
}

ChoiceQuestion read_arc(const json& line) {
  const auto choices = line.find("choices");
  expect(choices != line.end() && choices->is_object(),
         "expected 'choices', an object with 'text' and 'label'");
  const std::vector<std::string> labels = texts_of(*choices, "label");
  ChoiceQuestion out{text_of(line, "question"), texts_of(*choices, "text"), 0};
  expect(labels.size() == out.options.size(), "expected a label for each of {} choices, got {}",
         out.options.size(), labels.size());
  const std::string key = text_of(line, "answerKey");
  const auto at = std::find(labels.begin(), labels.end(), key);
  expect(at != labels.end(), "expected 'answerKey' to be one of {}, got '{}'", join(labels, ", "),
         key);
  out.correct = at - labels.begin();
  check(out);
  return out;
}

ChoiceQuestion read_hellaswag(const json& line) {
  std::string context;
  if (line.contains("ctx_a") && line.contains("ctx_b")) {
    context = text_of(line, "ctx_a") + " " + capitalised(text_of(line, "ctx_b"));
  } else {
    context = text_of(line, "ctx");
  }
  if (line.contains("activity_label")) {
    context = text_of(line, "activity_label") + ": " + context;
  }
  ChoiceQuestion out{without_wikihow_marks(context, true), {}, 0};
  for (const std::string& ending : texts_of(line, "endings")) {
    out.options.push_back(without_wikihow_marks(ending, true));
  }
  expect(line.contains("label") && line["label"].dump() != R"("")",
         "expected 'label', the right ending; the published test split has none, use validation");
  out.correct = option_of(line["label"], out.options, "label");
  check(out);
  return out;
}

ChoiceQuestion read_choices(const json& line) {
  ChoiceQuestion out{std::string(trim(text_of(line, "question"))), texts_of(line, "choices"), 0};
  expect(line.contains("answer"), "no field 'answer'");
  out.correct = option_of(line["answer"], out.options, "answer");
  check(out);
  if (line.contains("subject")) {
    std::string subject = text_of(line, "subject");
    std::replace(subject.begin(), subject.end(), '_', ' ');
    out.preamble =
        "The following are multiple choice questions (with answers) about " + subject + ".\n\n";
  }
  return out;
}

std::vector<ChoiceQuestion> read_gpqa(std::string_view csv, const std::string& origin,
                                      uint64_t seed, int64_t limit) {
  static constexpr const char* kColumns[] = {"Question", "Correct Answer", "Incorrect Answer 1",
                                             "Incorrect Answer 2", "Incorrect Answer 3"};
  const std::vector<CsvRow> rows = parse_csv(csv, origin);
  expect(!rows.empty(), "[tasks] {} is empty; expected GPQA's table", origin);
  std::vector<size_t> columns;
  for (const char* name : kColumns) {
    const auto& names = rows[0].fields;
    const auto at = std::find(names.begin(), names.end(), name);
    expect(at != names.end(), "[tasks] {}: expected a column '{}' (and {}), got {}", origin, name,
           "Question, Correct Answer, Incorrect Answer 1 to 3", join(names, ", ").substr(0, 300));
    columns.push_back(static_cast<size_t>(at - names.begin()));
  }
  std::vector<ChoiceQuestion> out;
  for (size_t r = 1; r < rows.size() && (limit == 0 || std::ssize(out) < limit); ++r) {
    const auto field = [&](size_t c) {
      std::string text = without_wikihow_marks(rows[r].fields[columns[c]], false);
      expect(!text.empty(), "[tasks] {} line {}: nothing in column '{}'", origin, rows[r].line,
             kColumns[c]);
      return text;
    };
    std::vector<size_t> order = {1, 2, 3, 4};
    Rng rng(seed, r - 1);
    rng.shuffle(std::span(order));
    ChoiceQuestion question{std::string(trim(rows[r].fields[columns[0]])), {}, 0};
    expect(!question.stem.empty(), "[tasks] {} line {}: nothing in column 'Question'", origin,
           rows[r].line);
    for (size_t place = 0; place < order.size(); ++place) {
      question.options.push_back(field(order[place]));
      question.correct = order[place] == 1 ? static_cast<int64_t>(place) : question.correct;
    }
    out.push_back(std::move(question));
  }
  expect(!out.empty(), "[tasks] {} has no questions under its first line", origin);
  return out;
}

ChoiceQuestion rotated(const ChoiceQuestion& question, int64_t turns) {
  const auto n = std::ssize(question.options);
  turns = (turns % n + n) % n;
  ChoiceQuestion out = question;
  std::rotate(out.options.begin(), out.options.end() - turns, out.options.end());
  out.correct = (question.correct + turns) % n;
  return out;
}

std::string lettered_question(const ChoiceQuestion& question) {
  std::string out = question.stem + "\n\n";
  for (int64_t i = 0; i < std::ssize(question.options); ++i) {
    out += choice_letter(i) + ") " + question.options[static_cast<size_t>(i)] + "\n";
  }
  return out + "\nThink step by step, then end with a line \"Answer: X\", where X is the letter.";
}

ChoicePrompt choice_prompt(const ChoiceQuestion& question, ChoiceStyle style) {
  ChoicePrompt out;
  if (style == ChoiceStyle::kOptions || style == ChoiceStyle::kEndings) {
    out.context =
        style == ChoiceStyle::kEndings ? question.stem : "Question: " + question.stem + "\nAnswer:";
    for (const std::string& option : question.options) {
      out.continuations.push_back(" " + option);
    }
    return out;
  }
  const bool brackets = style == ChoiceStyle::kParentheses;
  out.context = brackets
                    ? "What is the correct answer to this question:" + question.stem + "\nChoices:"
                    : question.preamble + question.stem;
  for (int64_t i = 0; i < std::ssize(question.options); ++i) {
    const std::string letter = choice_letter(i);
    const std::string& option = question.options[static_cast<size_t>(i)];
    out.context += brackets ? "\n(" + letter + ") " + option : "\n" + letter + ". " + option;
    out.continuations.push_back(brackets ? " (" + letter + ")" : " " + letter);
  }
  out.context += "\nAnswer:";
  return out;
}

}  // namespace cambium
