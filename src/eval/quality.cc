#include "eval/quality.h"

#include <nlohmann/json.hpp>

#include "base/signals.h"
#include "eval/statistics.h"
#include "serve/engine.h"
#include "text/prompt_format.h"

namespace cambium {

AccuracyResult evaluate_accuracy(Model& model, const Tokenizer& tokenizer, const Task& task,
                                 const AccuracyConfig& config,
                                 const std::function<void(int64_t done)>& progress) {
  AccuracyResult result;
  if (task.examples.empty()) {
    return result;
  }
  if (task.form == AnswerForm::kPython) {
    // A machine that cannot run programs safely says so now, not after the answers.
    grade_python("```python\npass\n```", "pass\n");
  }
  std::vector<int32_t> stops = tokenizer.eos_ids();
  for (const int64_t id : model.spec().eos_ids) {
    stops.push_back(static_cast<int32_t>(id));
  }
  EngineConfig engine_config = config.engine;
  engine_config.max_sequences = config.batch;
  Engine engine(model, engine_config);
  std::vector<Engine::Ticket> tickets;
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
    request.max_new_tokens = config.max_new_tokens;
    request.stop_ids = stops;
    request.sampling.temperature = static_cast<float>(config.temperature);
    request.seed = config.seed;
    request.stream = i;
    tickets.push_back(engine.submit(std::move(request)));
  }
  const auto count = static_cast<int64_t>(tickets.size());
  while (engine.step()) {
    if (progress) {
      progress(count - engine.waiting() - engine.running());
    }
  }
  for (size_t i = 0; i < tickets.size(); ++i) {
    stop_point();
    const Example& example = task.examples[i];
    const GenerationResult generated = engine.take(tickets[i]);
    const std::string response = tokenizer.decode(generated.tokens, true);
    const Grade graded = grade(task, response, example);
    result.summary.correct += graded.correct ? 1 : 0;
    result.examples.push_back(
        {example.question, example.answer, response, graded.given, graded.correct});
  }
  result.summary.total = count;
  const Estimate estimate = proportion(result.summary.correct, count);
  result.summary.accuracy = {estimate.value, estimate.interval.low, estimate.interval.high};
  return result;
}

std::string example_lines(const std::vector<ExampleResult>& examples) {
  using Json = nlohmann::ordered_json;
  std::string out;
  for (const ExampleResult& e : examples) {
    const Json line = {{"question", e.question},
                       {"expected", e.expected},
                       {"response", e.response},
                       {"given", e.given},
                       {"correct", e.correct}};
    out += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  }
  return out;
}

}  // namespace cambium
