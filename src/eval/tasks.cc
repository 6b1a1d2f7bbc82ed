#include "eval/tasks.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"

namespace cambium {
namespace {

using nlohmann::json;

/// A field as text: a string as it is, a number without a needless ".0".
std::string field(const json& line, const char* key) {
  const auto at = line.find(key);
  expect(at != line.end(), "no field '{}'", key);
  if (at->is_string()) {
    return at->get<std::string>();
  }
  expect(at->is_number(), "expected text or a number in field '{}'", key);
  const auto value = at->get<double>();
  if (value == static_cast<double>(static_cast<int64_t>(value))) {
    return std::to_string(static_cast<int64_t>(value));
  }
  return at->dump();
}

Example with_hashes(std::string question, std::string solution) {
  const std::optional<std::string> answer = marked_answer(solution);
  expect(answer && !answer->empty(), "no '#### ANSWER' at the end of the answer");
  return {std::move(question), *answer, std::move(solution)};
}

Example read_gsm8k(const json& line) {
  if (!line.contains("messages")) {
    return with_hashes(field(line, "question"), field(line, "answer"));
  }
  std::string question;
  std::string answer;
  for (const json& message : line.at("messages")) {
    const std::string role = field(message, "role");
    if (role == "user") {
      question = field(message, "content");
    } else if (role == "assistant") {
      answer = field(message, "content");
    }
  }
  expect(!question.empty(), "no message of the user");
  return with_hashes(std::move(question), std::move(answer));
}

Example read_math(const json& line) {
  return {field(line, "problem"), field(line, "answer"),
          line.contains("solution") ? field(line, "solution") : ""};
}

/// "Body. Question?" with a full stop where the body lacks one.
std::string body_and_question(std::string body, const std::string& question) {
  while (!body.empty() && body.back() == ' ') {
    body.pop_back();
  }
  if (!body.empty() && std::string_view(".?!,;:").find(body.back()) == std::string_view::npos) {
    body += ".";
  }
  return body.empty() ? question : body + " " + question;
}

Example read_svamp(const json& line) {
  return {body_and_question(field(line, "Body"), field(line, "Question")), field(line, "Answer"),
          ""};
}

Example read_mawps(const json& line) {
  return {field(line, "input"), field(line, "target"), ""};
}

/// The answer carries its unit: "9 (apples)".
Example read_asdiv(const json& line) {
  std::string answer = field(line, "answer");
  const size_t unit = answer.find(" (");
  if (unit != std::string::npos && unit > 0) {
    answer.erase(unit);
  }
  while (!answer.empty() && answer.back() == ' ') {
    answer.pop_back();
  }
  return {body_and_question(field(line, "body"), field(line, "question")), answer, ""};
}

/// A list of strings, a line each.
std::string lines_of(const json& line, const char* key) {
  const auto it = line.find(key);
  expect(it != line.end() && it->is_array(), "expected '{}', a list of strings", key);
  std::string text;
  for (const json& entry : *it) {
    expect(entry.is_string(), "expected '{}' to hold strings, got {}", key, entry.type_name());
    text += entry.get_ref<const std::string&>() + "\n";
  }
  return text;
}

/// MBPP, in its sanitized form (prompt, test_imports) and the full one (text, test_setup_code). The
/// tests show the name and the arguments that the task's text leaves open.
Example read_mbpp(const json& line) {
  std::string setup;
  if (line.contains("test_imports")) {
    setup = lines_of(line, "test_imports");
  } else if (line.contains("test_setup_code")) {
    setup = field(line, "test_setup_code") + "\n";
  }
  const std::string tests = lines_of(line, "test_list");
  expect(!tests.empty(), "no tests in 'test_list'");
  const std::string text = field(line, line.contains("prompt") ? "prompt" : "text");
  Example out{text + "\n\nWrite it in Python so that these tests pass:\n\n```python\n" + tests +
                  "```\n\nGive the code alone, in one ```python block.",
              setup + tests, field(line, "code")};
  out.harness = "You are an expert Python programmer, and here is your task: " + text +
                " Your code should pass these tests:\n\n" + tests + "[BEGIN]\n";
  return out;
}

Example with_options(ChoiceQuestion choice) {
  Example out{lettered_question(choice), choice_letter(choice.correct), ""};
  out.choice = std::move(choice);
  return out;
}

template <ChoiceQuestion (*read)(const json&)>
Example read_with_options(const json& line) {
  return with_options(read(line));
}

struct Form {
  const char* name;
  AnswerForm answers;
  std::vector<const char*> keys;  // those that tell this form from the ones above it
  Example (*read)(const json&);
  ChoiceStyle style = ChoiceStyle::kOptions;
};

const std::vector<Form>& forms() {
  static const std::vector<Form> kForms = {
      {"mbpp", AnswerForm::kPython, {"test_list", "code"}, read_mbpp},
      {"math500", AnswerForm::kMath, {"problem", "answer", "unique_id"}, read_math},
      {"aime", AnswerForm::kInteger, {"problem", "answer"}, read_math},
      {"svamp", AnswerForm::kNumber, {"Body", "Question", "Answer"}, read_svamp},
      {"mawps", AnswerForm::kNumber, {"input", "target"}, read_mawps},
      {"asdiv", AnswerForm::kNumber, {"body", "question", "answer"}, read_asdiv},
      {"arc",
       AnswerForm::kLetter,
       {"question", "choices", "answerKey"},
       read_with_options<read_arc>},
      {"hellaswag",
       AnswerForm::kLetter,
       {"endings", "label"},
       read_with_options<read_hellaswag>,
       ChoiceStyle::kEndings},
      {"mmlu",
       AnswerForm::kLetter,
       {"question", "choices", "answer", "subject"},
       read_with_options<read_choices>,
       ChoiceStyle::kLetters},
      {"choices",
       AnswerForm::kLetter,
       {"question", "choices", "answer"},
       read_with_options<read_choices>},
      {"gsm8k", AnswerForm::kNumber, {"question", "answer"}, read_gsm8k},
      {"gsm8k", AnswerForm::kNumber, {"messages"}, read_gsm8k},
  };
  return kForms;
}

const Form& find_form(std::string_view name, const json& first, const std::string& origin) {
  for (const Form& form : forms()) {
    if (name == "auto" ? std::all_of(form.keys.begin(), form.keys.end(),
                                     [&](const char* key) { return first.contains(key); })
                       : name == form.name) {
      return form;
    }
  }
  if (name == "auto") {
    std::vector<std::string> keys;
    for (const auto& item : first.items()) {
      keys.push_back(item.key());
    }
    fail("[tasks] {}: no known form has the fields {}; name one of {}", origin, join(keys, ", "),
         join(task_forms(), ", "));
  }
  fail("[tasks] no form '{}'{}; there are auto, {}", name, did_you_mean(name, task_forms()),
       join(task_forms(), ", "));
}

}  // namespace

const std::vector<std::string>& task_forms() {
  static const std::vector<std::string> kNames = {"gsm8k", "math500",   "aime", "svamp",
                                                  "mawps", "asdiv",     "mbpp", "gpqa",
                                                  "arc",   "hellaswag", "mmlu", "choices"};
  return kNames;
}

Task parse_task(std::string_view form, std::string_view lines, const std::string& origin,
                int64_t limit, uint64_t seed) {
  expect(limit >= 0, "[tasks] expected a limit of 0 (all) or more, got {}", limit);
  Task task;
  if (form == "gpqa") {
    task = {"gpqa", AnswerForm::kLetter, {}};
    task.style = ChoiceStyle::kParentheses;
    for (ChoiceQuestion& question : read_gpqa(lines, origin, seed, limit)) {
      task.examples.push_back(with_options(std::move(question)));
    }
    return task;
  }
  const Form* found = nullptr;
  const auto add = [&](const json& line, const std::string& where) {
    if (found == nullptr) {
      found = &find_form(form, line, origin);
      task.name = found->name;
      task.form = found->answers;
      task.style = found->style;
    }
    try {
      task.examples.push_back(found->read(line));
    } catch (const Error& error) {
      fail("[tasks] {}, read as {}: {}", where, found->name, error.what());
    } catch (const json::exception& error) {
      fail("[tasks] {}, read as {}: {}", where, found->name, json_problem(error));
    }
    return limit > 0 && static_cast<int64_t>(task.examples.size()) == limit;
  };
  const size_t first = lines.find_first_not_of(" \t\r\n");
  if (first != std::string_view::npos && lines[first] == '[') {
    const json list = try_json<json>(lines);
    expect(list.is_array(), "[tasks] {}: not valid JSON", origin);
    int64_t number = 0;
    for (const json& line : list) {
      const std::string where = fmt::format("{} entry {}", origin, ++number);
      expect(line.is_object(), "[tasks] {}: expected an object of JSON", where);
      if (add(line, where)) {
        break;
      }
    }
    lines = {};
  }
  for (int64_t number = 1; !lines.empty(); ++number) {
    const size_t end = std::min(lines.find('\n'), lines.size());
    const std::string_view text = lines.substr(0, end);
    lines.remove_prefix(std::min(end + 1, lines.size()));
    if (text.find_first_not_of(" \r\t") == std::string_view::npos) {
      continue;
    }
    const json line = try_json<json>(text);
    expect(line.is_object(), "[tasks] {} line {}: expected an object of JSON", origin, number);
    if (add(line, fmt::format("{} line {}", origin, number))) {
      break;
    }
  }
  expect(!task.examples.empty(), "[tasks] {} has no examples", origin);
  return task;
}

Task load_task(std::string_view form, const std::string& path, int64_t limit, uint64_t seed) {
  return parse_task(form, read_text_file(path), path, limit, seed);
}

Grade grade(const Task& task, std::string_view response, const Example& example) {
  return grade(task.form, response, example.answer, task.extraction);
}

}  // namespace cambium
