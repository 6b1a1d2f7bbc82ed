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
#include "text/stop_texts.h"

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

int64_t tokens_of(const Json& line) {
  const auto tokens = line.find("tokens");
  if (tokens == line.end()) {
    return -1;
  }
  expect(tokens->is_number_integer() && tokens->get<int64_t>() >= 0,
         "expected 'tokens', a number of 0 or more");
  return tokens->get<int64_t>();
}

bool truncated_of(const Json& line) {
  const auto truncated = line.find("truncated");
  expect(truncated == line.end() || truncated->is_boolean(), "expected 'truncated', true or false");
  return truncated != line.end() && truncated->get<bool>();
}

void add_how(Json& line, const ExampleResult& e, bool sampled) {
  if (sampled) {
    line["sample"] = e.sample;
  }
  if (!e.prompt.empty()) {
    line["prompt"] = e.prompt;
  }
  if (e.tokens >= 0) {
    line["tokens"] = e.tokens;
    line["truncated"] = e.truncated;
  }
  if (!e.unanswered.empty()) {
    line["unanswered"] = e.unanswered;
  }
}

/// Mean over problems of the share of right answers.
Estimate over_problems(const std::vector<ExampleResult>& examples, int64_t samples) {
  std::vector<double> shares(examples.size() / static_cast<size_t>(samples));
  for (size_t i = 0; i < examples.size(); ++i) {
    shares[i / static_cast<size_t>(samples)] +=
        examples[i].correct ? 1.0 / static_cast<double>(samples) : 0.0;
  }
  return mean_share(shares, 1);
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
  const PromptConfig prompts{config.chat, config.words, config.shots};
  expect_promptable(task, prompts);
  const std::vector<std::string> stop_at = stop_texts(task, prompts);
  Engine engine(model, engine_config);
  std::vector<std::optional<Engine::Ticket>> tickets;
  bool asked = false;
  const auto samples = static_cast<size_t>(config.samples);
  for (size_t i = 0; i < task.examples.size(); ++i) {
    stop_point();
    GenerationRequest request;
    Response response;
    response.prompt = prompt_text(tokenizer, task, task.examples[i], prompts);
    request.prompt = prompt_tokens(tokenizer, response.prompt, prompts);
    response.unanswered = misfit(engine, std::ssize(request.prompt), config.max_new_tokens);
    answers.responses.insert(answers.responses.end(), samples, response);
    if (!response.unanswered.empty()) {
      note("{}: problem {} is not asked and counts as not answered: {}", task.name, i + 1,
           response.unanswered);
      tickets.insert(tickets.end(), samples, std::nullopt);
      continue;
    }
    asked = true;
    request.max_new_tokens = config.max_new_tokens;
    request.stop_ids = stops;
    request.sampling.temperature = static_cast<float>(config.temperature);
    request.sampling.top_p = static_cast<float>(config.top_p);
    request.sampling.top_k = config.top_k;
    request.seed = config.seed;
    for (size_t sample = 0; sample < samples; ++sample) {
      request.stream = i * samples + sample;
      if (!stop_at.empty()) {
        request.on_token = [watch = StopWatch(tokenizer, stop_at)](int32_t token) mutable {
          return watch.push(token);
        };
      }
      tickets.emplace_back(engine.submit(request));
    }
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
    Response& response = answers.responses[i];
    response.text = tokenizer.decode(generated.tokens, true);
    response.text.resize(first_stop(response.text, stop_at));
    response.tokens = std::ssize(generated.tokens);
    response.truncated = generated.reason == FinishReason::kLength;
  }
  return answers;
}

AccuracyResult grade_responses(const Task& task, const std::vector<Response>& responses) {
  AccuracyResult result;
  if (task.examples.empty() && responses.empty()) {
    return result;
  }
  const size_t problems = task.examples.size();
  CAMBIUM_CHECK(problems > 0 && !responses.empty() && responses.size() % problems == 0);
  const size_t samples = responses.size() / problems;
  result.samples = static_cast<int64_t>(samples);
  for (size_t i = 0; i < responses.size(); ++i) {
    stop_point();
    const Example& example = task.examples[i / samples];
    const Response& response = responses[i];
    const bool asked = response.unanswered.empty();
    const Grade graded = asked ? grade(task, response.text, example) : Grade{};
    result.summary.correct += graded.correct ? 1 : 0;
    result.unanswered += asked ? 0 : 1;
    result.no_answer += asked && !graded.answered ? 1 : 0;
    result.truncated += response.truncated ? 1 : 0;
    result.tokens += std::max<int64_t>(response.tokens, 0);
    result.measured += response.tokens >= 0 ? 1 : 0;
    result.examples.push_back({example.question, example.answer, response.text, graded.given,
                               graded.correct, response.unanswered, response.prompt,
                               static_cast<int64_t>(i % samples), response.tokens,
                               response.truncated});
  }
  result.summary.total = std::ssize(responses);
  const Estimate estimate = samples == 1 ? proportion(result.summary.correct, result.summary.total)
                                         : over_problems(result.examples, result.samples);
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
  const bool sampled = std::any_of(examples.begin(), examples.end(),
                                   [](const ExampleResult& e) { return e.sample > 0; });
  std::string out;
  for (const ExampleResult& e : examples) {
    Json line = {{"question", e.question},
                 {"expected", e.expected},
                 {"response", e.response},
                 {"given", e.given},
                 {"correct", e.correct}};
    add_how(line, e, sampled);
    out += json_line(line);
  }
  return out;
}

std::string ungraded_lines(const Task& task, const std::vector<Response>& responses) {
  CAMBIUM_CHECK(!task.examples.empty() && responses.size() % task.examples.size() == 0);
  const size_t samples = responses.size() / task.examples.size();
  std::string out;
  for (size_t i = 0; i < responses.size(); ++i) {
    const Example& example = task.examples[i / samples];
    const Response& r = responses[i];
    Json line = {
        {"question", example.question}, {"expected", example.answer}, {"response", r.text}};
    add_how(line,
            {"", "", "", "", false, r.unanswered, r.prompt, static_cast<int64_t>(i % samples),
             r.tokens, r.truncated},
            samples > 1);
    out += json_line(line);
  }
  return out;
}

std::vector<Response> read_responses(const std::string& path, const Task& task) {
  struct Asked {
    std::optional<std::string> question;
    int64_t line = 0;
  };
  std::vector<Response> responses;
  std::vector<Asked> asked;
  each_json_line(path, [&](const Json& line, int64_t number) {
    expect(line.is_object(), "expected an object with the text 'response' or 'completion'");
    const auto question = line.find("question");
    asked.push_back({std::nullopt, number});
    if (question != line.end()) {
      expect(question->is_string(), "expected 'question', a text");
      asked.back().question = question->get<std::string>();
    }
    const auto prompt = line.find("prompt");
    responses.push_back(
        {response_of(line), unanswered_of(line),
         prompt != line.end() && prompt->is_string() ? prompt->get<std::string>() : std::string(),
         tokens_of(line), truncated_of(line)});
  });
  const size_t problems = task.examples.size();
  expect(!responses.empty() && responses.size() % problems == 0,
         "{}: expected an answer to each of {} problems, got {} (several are as many to each)",
         path, problems, responses.size());
  const size_t samples = responses.size() / problems;
  for (size_t i = 0; i < responses.size(); ++i) {
    const std::string& question = task.examples[i / samples].question;
    expect(!asked[i].question || *asked[i].question == question,
           "{}:{}: expected the answer to problem {}, '{}', got one to another question", path,
           asked[i].line, i / samples + 1, question.substr(0, 80));
  }
  return responses;
}

}  // namespace cambium
