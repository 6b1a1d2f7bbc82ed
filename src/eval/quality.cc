#include "eval/quality.h"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/json_lines.h"
#include "base/progress.h"
#include "base/signals.h"
#include "eval/statistics.h"
#include "serve/engine.h"
#include "text/prompt_format.h"

namespace cambium {

namespace {

using Json = nlohmann::ordered_json;

// Text of a model may be cut inside a character.
std::string json_line(const Json& line) {
  return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

// What `eval` calls response and `generate` completion: there a text, or one message.
std::string response_of(const Json& line) {
  const auto response = line.find(line.contains("response") ? "response" : "completion");
  if (response != line.end() && response->is_string()) {
    return response->get<std::string>();
  }
  const bool message = response != line.end() && response->is_array() && response->size() == 1 &&
                       response->front().is_object() && response->front().contains("content") &&
                       response->front()["content"].is_string();
  expect(message, "expected an object with the text 'response' or 'completion'");
  return response->front()["content"].get<std::string>();
}

// Empty, or the reason of a line whose problem was never asked.
std::string unanswered_of(const Json& line) {
  const auto unanswered = line.find("unanswered");
  if (unanswered == line.end()) {
    return {};
  }
  expect(unanswered->is_string(), "expected the reason 'unanswered' as text");
  return unanswered->get<std::string>();
}

void add_unanswered(Json& line, const std::string& unanswered) {
  if (!unanswered.empty()) {
    line["unanswered"] = unanswered;
  }
}

// Why the engine can never take such a request; empty where it can.
std::string misfit(const Engine& engine, int64_t prompt, int64_t max_new) {
  const int64_t longest = engine.cache().plan().config().max_tokens;
  if (prompt > longest) {
    return fmt::format("a prompt of {} tokens can never fit: the longest sequence is {} tokens",
                       prompt, longest);
  }
  try {
    // The last token of an answer is never read.
    engine.cache().expect_fits(std::min(prompt + max_new - 1, longest));
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

}  // namespace

void expect_gradable(const Task& task) {
  if (task.form == AnswerForm::kPython) {
    grade_python("```python\npass\n```", "pass\n");
  }
}

Answers answer_examples(Model& model, const Tokenizer& tokenizer, const Task& task,
                        const AccuracyConfig& config,
                        const std::function<void(int64_t done)>& progress) {
  Answers answers;
  if (task.examples.empty()) {
    return answers;
  }
  std::vector<int32_t> stops = tokenizer.eos_ids();
  for (const int64_t id : model.spec().eos_ids) {
    stops.push_back(static_cast<int32_t>(id));
  }
  EngineConfig engine_config = config.engine;
  engine_config.max_sequences = config.batch;
  Engine engine(model, engine_config);
  std::vector<std::optional<Engine::Ticket>> tickets;
  bool asked = false;
  for (size_t i = 0; i < task.examples.size(); ++i) {
    stop_point();
    GenerationRequest request;
    const std::string& question = task.examples[i].question;
    if (config.chat) {
      const ChatMessage message{"user", question};
      request.prompt =
          tokenizer.encode(tokenizer.apply_chat_template(std::span(&message, 1)), false);
    } else {
      request.prompt = question_tokens(tokenizer, question);
    }
    Response& response = answers.responses.emplace_back();
    response.unanswered = misfit(engine, std::ssize(request.prompt), config.max_new_tokens);
    if (!response.unanswered.empty()) {
      note("{}: problem {} is not asked and counts as not answered: {}", task.name, i + 1,
           response.unanswered);
      tickets.emplace_back();
      continue;
    }
    asked = true;
    request.max_new_tokens = config.max_new_tokens;
    request.stop_ids = stops;
    request.sampling.temperature = static_cast<float>(config.temperature);
    request.seed = config.seed;
    request.stream = i;
    tickets.emplace_back(engine.submit(std::move(request)));
  }
  expect(asked, "{}: none of {} problems can be asked; the first: {}", task.name,
         task.examples.size(), answers.responses.front().unanswered);
  const auto count = static_cast<int64_t>(tickets.size());
  const auto begin = std::chrono::steady_clock::now();
  while (engine.step()) {
    if (progress) {
      progress(count - engine.waiting() - engine.running());
    }
  }
  answers.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  for (size_t i = 0; i < tickets.size(); ++i) {
    if (!tickets[i]) {
      continue;
    }
    const GenerationResult generated = engine.take(*tickets[i]);
    answers.prompt_tokens += generated.prompt_tokens;
    answers.tokens += std::ssize(generated.tokens);
    answers.responses[i].text = tokenizer.decode(generated.tokens, true);
  }
  return answers;
}

AccuracyResult grade_responses(const Task& task, const std::vector<Response>& responses) {
  CAMBIUM_CHECK(responses.size() == task.examples.size());
  AccuracyResult result;
  if (responses.empty()) {
    return result;
  }
  for (size_t i = 0; i < responses.size(); ++i) {
    stop_point();
    const Example& example = task.examples[i];
    const Response& response = responses[i];
    const bool asked = response.unanswered.empty();
    const Grade graded = asked ? grade(task, response.text, example) : Grade{};
    result.summary.correct += graded.correct ? 1 : 0;
    result.unanswered += asked ? 0 : 1;
    result.examples.push_back({example.question, example.answer, response.text, graded.given,
                               graded.correct, response.unanswered});
  }
  result.summary.total = std::ssize(responses);
  const Estimate estimate = proportion(result.summary.correct, result.summary.total);
  result.summary.accuracy = {estimate.value, estimate.interval.low, estimate.interval.high};
  return result;
}

AccuracyResult evaluate_accuracy(Model& model, const Tokenizer& tokenizer, const Task& task,
                                 const AccuracyConfig& config,
                                 const std::function<void(int64_t done)>& progress) {
  expect_gradable(task);
  return grade_responses(task, answer_examples(model, tokenizer, task, config, progress).responses);
}

std::string example_lines(const std::vector<ExampleResult>& examples) {
  std::string out;
  for (const ExampleResult& e : examples) {
    Json line = {{"question", e.question},
                 {"expected", e.expected},
                 {"response", e.response},
                 {"given", e.given},
                 {"correct", e.correct}};
    add_unanswered(line, e.unanswered);
    out += json_line(line);
  }
  return out;
}

std::string ungraded_lines(const Task& task, const std::vector<Response>& responses) {
  CAMBIUM_CHECK(responses.size() == task.examples.size());
  std::string out;
  for (size_t i = 0; i < responses.size(); ++i) {
    const Example& example = task.examples[i];
    Json line = {{"question", example.question},
                 {"expected", example.answer},
                 {"response", responses[i].text}};
    add_unanswered(line, responses[i].unanswered);
    out += json_line(line);
  }
  return out;
}

std::vector<Response> read_responses(const std::string& path, const Task& task) {
  std::vector<Response> responses;
  each_json_line(path, [&](const Json& line, int64_t /*number*/) {
    expect(line.is_object(), "expected an object with the text 'response' or 'completion'");
    expect(responses.size() < task.examples.size(),
           "expected an answer to each of {} problems and no more", task.examples.size());
    const std::string& question = task.examples[responses.size()].question;
    const auto asked = line.find("question");
    expect(asked == line.end() || *asked == question,
           "expected the answer to problem {}, '{}', got one to another question",
           responses.size() + 1, question.substr(0, 80));
    responses.push_back({response_of(line), unanswered_of(line)});
  });
  expect(responses.size() == task.examples.size(),
         "{}: expected an answer to each of {} problems, got {}", path, task.examples.size(),
         responses.size());
  return responses;
}

}  // namespace cambium
