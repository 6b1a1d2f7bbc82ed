// generate: text from a prompt, or from a file of prompts.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>

#include "base/file.h"
#include "base/json.h"
#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/answer_settings.h"
#include "cli/commands.h"
#include "cli/generation.h"
#include "cli/options.h"
#include "eval/quality.h"
#include "eval/statistics.h"
#include "text/prompt_format.h"
#include "text/stop_texts.h"

namespace cambium {
namespace {

struct GenerateArgs : AnsweringModel {
  std::string prompt, input, output;
  std::string task, data, keep = "right";
  int64_t batch = 16, logprobs = 0, samples = 1;
  bool chat = false, question = false;

  bool many() const { return !input.empty() || !task.empty(); }
  AnswerSettings settings() const { return {sampling, max_new_tokens, logprobs, {}}; }
};

std::vector<int32_t> prompt_tokens(const GenerateArgs& a, const Tokenizer& tokenizer,
                                   const std::string& text) {
  if (a.chat) {
    const ChatMessage message{"user", text};
    return tokenizer.encode(tokenizer.apply_chat_template(std::span(&message, 1)), false);
  }
  return a.question ? question_tokens(tokenizer, text) : tokenizer.encode(text, true);
}

// One line of --input, or a question of --task: what came, and its requests or why there are none.
struct BatchLine {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  std::string error;
  std::string preset;  // of a supernet; "" = what the command says
  AnswerSettings settings;
  std::vector<Engine::Ticket> tickets;    // one for each sample
  std::vector<GenerationResult> results;  // what became of them

  /// Of messages, which the answer joins as one: a line that training reads as a conversation.
  bool conversation() const { return json["prompt"].is_array(); }
};

std::vector<BatchLine> read_batch(const GenerateArgs& a) {
  const std::string& path = a.input;
  std::vector<BatchLine> lines;
  int number = 0;
  for (const std::string& text : split(read_text_file(path), '\n')) {
    ++number;
    if (text.find_first_not_of(" \t\r") == std::string::npos) {
      continue;
    }
    BatchLine line;
    line.settings = a.settings();
    auto json = try_json<nlohmann::ordered_json>(text);
    if (json.is_object()) {
      line.json = std::move(json);
    }
    const auto prompt = line.json.find("prompt");
    if (prompt == line.json.end() || !(prompt->is_string() || prompt->is_array())) {
      line.error = fmt::format(
          "{}:{}: expected an object with 'prompt', a string or a list of messages", path, number);
    }
    if (const auto preset = line.json.find("preset"); preset != line.json.end()) {
      if (preset->is_string()) {
        line.preset = preset->get<std::string>();
      } else {
        line.error = fmt::format("{}:{}: expected 'preset', the name of one", path, number);
      }
    }
    if (const auto sampling = line.json.find("sampling"); sampling != line.json.end()) {
      try {
        line.settings =
            settings_of_line(nlohmann::json(*sampling),
                             fmt::format("{}:{}: 'sampling'", path, number), line.settings);
      } catch (const Error& e) {
        line.error = e.what();
      }
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

// As `cambium eval --chat` asks them.
std::vector<BatchLine> questions_of(const GenerateArgs& a, const Task& task) {
  using Json = nlohmann::ordered_json;
  std::vector<BatchLine> lines;
  for (const Example& example : task.examples) {
    BatchLine line;
    line.settings = a.settings();
    line.json["prompt"] = Json::array({{{"role", "user"}, {"content", example.question}}});
    line.json["expected"] = example.answer;
    lines.push_back(std::move(line));
  }
  return lines;
}

// As chat completions have them: each token with its log-probability and the likeliest beside it.
nlohmann::ordered_json logprobs_json(const GenerationResult& result, const Tokenizer& tokenizer) {
  using Json = nlohmann::ordered_json;
  const auto entry = [&](int32_t token, float log_probability) {
    // Null where a token cannot come: JSON has no infinity.
    return Json{{"token", tokenizer.decode(std::span(&token, 1), false)},
                {"id", token},
                {"logprob", log_probability}};
  };
  Json content = Json::array();
  const size_t count = result.tokens.size();
  const size_t beside = count == 0 ? 0 : result.likeliest.size() / count;
  for (size_t i = 0; i < count; ++i) {
    Json chosen = entry(result.tokens[i], result.log_probabilities[i]);
    chosen["top_logprobs"] = Json::array();
    for (size_t j = 0; j < beside; ++j) {
      const RankedToken& ranked = result.likeliest[i * beside + j];
      chosen["top_logprobs"].push_back(entry(ranked.token, ranked.log_probability));
    }
    content.push_back(std::move(chosen));
  }
  return {{"content", std::move(content)}};
}

std::vector<int32_t> prompt_tokens(const GenerateArgs& a, const Tokenizer& tokenizer,
                                   const BatchLine& line) {
  const nlohmann::ordered_json& prompt = line.json["prompt"];
  return line.conversation() ? tokenizer.encode(tokenizer.apply_chat_template(prompt.dump()), false)
                             : prompt_tokens(a, tokenizer, prompt.get_ref<const std::string&>());
}

// Runs every request to its end and says how far it is; `generated` is counted as tokens come.
void run_to_the_end(Engine& engine, const int64_t& generated) {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t count = engine.waiting();
  if (count == 0) {
    return;
  }
  Progress progress("generate", static_cast<uint64_t>(count), {.unit = "prompts"});
  const auto speed = [&] {
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    return fmt::format("{} tokens, {:.0f} tokens/s", generated,
                       static_cast<double>(generated) / std::max(taken.count(), 1e-9));
  };
  while (engine.step()) {
    stop_point();
    progress.update(static_cast<uint64_t>(count - engine.waiting() - engine.running()), speed());
  }
  progress.finish(speed());
}

std::string first_error(const std::vector<BatchLine>& lines) {
  const auto found = std::find_if(lines.begin(), lines.end(),
                                  [](const BatchLine& line) { return !line.error.empty(); });
  return found == lines.end() ? "" : found->error;
}

// Submits --samples requests for each line of the preset; one that cannot be asked says why.
void submit(const GenerateArgs& a, Engine& engine, const Tokenizer& tokenizer,
            const std::string& preset, std::vector<BatchLine>& lines, int64_t& generated) {
  for (size_t i = 0; i < lines.size(); ++i) {
    BatchLine& line = lines[i];
    if (!line.error.empty() || line.preset != preset) {
      continue;
    }
    stop_point();
    try {
      const std::vector<int32_t> prompt = prompt_tokens(a, tokenizer, line);
      for (int64_t k = 0; k < a.samples; ++k) {
        GenerationRequest request = a.request(tokenizer, engine.model().spec(), prompt);
        request.max_new_tokens = line.settings.max_new_tokens;
        request.sampling = line.settings.sampling.config();
        request.seed = static_cast<uint64_t>(line.settings.sampling.seed);
        request.logprobs = line.settings.logprobs;
        request.stream = static_cast<uint64_t>(static_cast<int64_t>(i) * a.samples + k);
        request.on_token =
            [&generated, watch = StopWatch(tokenizer, line.settings.stop)](int32_t token) mutable {
              ++generated;
              return watch.push(token);
            };
        line.tickets.push_back(engine.submit(std::move(request)));
      }
    } catch (const Error& e) {
      line.error = e.what();
    }
  }
}

// Answers the lines of one preset after those of another, in the order they first come.
void answer(const GenerateArgs& a, PresetModel& model, const Tokenizer& tokenizer,
            std::vector<BatchLine>& lines) {
  std::set<std::string> answered;
  for (const BatchLine& first : lines) {
    const std::string preset = first.preset;
    if (!answered.insert(preset).second) {
      continue;
    }
    try {
      model.switch_to(preset);
    } catch (const Error& e) {
      for (BatchLine& line : lines) {
        line.error = line.error.empty() && line.preset == preset ? e.what() : line.error;
      }
      continue;
    }
    int64_t generated = 0;
    submit(a, model.engine(), tokenizer, preset, lines, generated);
    run_to_the_end(model.engine(), generated);
    for (BatchLine& line : lines) {
      for (const Engine::Ticket ticket : line.tickets) {
        line.results.push_back(model.engine().take(ticket));
      }
      line.tickets.clear();
    }
  }
}

// How the answers to a task's questions were, and which are worth learning from.
class Traces {
 public:
  explicit Traces(const Task& task) : task_(task) {}

  /// Grades an answer to question i, says so in its line, and whether it is kept: a right one that
  /// came to its end.
  bool keep(size_t i, const std::string& text, FinishReason reason, nlohmann::ordered_json& line) {
    const bool whole = reason == FinishReason::kStop;
    const bool right = grade(task_, text, task_.examples[i]).correct;
    line["correct"] = right;
    ++answers_;
    right_ += right ? 1 : 0;
    cut_ += whole ? 0 : 1;
    if (!right || !whole) {
      return false;
    }
    ++kept_;
    if (last_ != i + 1) {
      ++answered_;
      last_ = i + 1;
    }
    return true;
  }
  void report() const {
    if (answers_ == 0) {
      return;
    }
    const Estimate share = proportion(right_, answers_);
    say("{}: {} of {} answers are right, {:.1f} % [{:.1f}, {:.1f}]; {} did not come to an end; "
        "{} right ones that did, to {} of {} questions",
        task_.name, right_, answers_, 100.0 * share.value, 100.0 * share.interval.low,
        100.0 * share.interval.high, cut_, kept_, answered_, task_.examples.size());
  }

 private:
  const Task& task_;
  int64_t answers_ = 0, right_ = 0, cut_ = 0, kept_ = 0, answered_ = 0;
  size_t last_ = 0;  // the question of the last answer that was kept, from 1 on
};

// A line that cannot be answered says so in its result; the others are answered all the same.
int run_batch(const GenerateArgs& a, PresetModel& model, const Tokenizer& tokenizer,
              std::vector<BatchLine> lines, const Task& task) {
  using Json = nlohmann::ordered_json;
  const bool graded = !a.task.empty();
  ResultFile results(a.output);
  answer(a, model, tokenizer, lines);
  std::string out;
  const auto write = [&](const Json& line) {
    out += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  };
  Traces traces(task);
  size_t failed = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    BatchLine& line = lines[i];
    for (size_t k = 0; k < line.results.size(); ++k) {
      const GenerationResult& result = line.results[k];
      std::string text = tokenizer.decode(result.tokens, true);
      text.resize(first_stop(text, line.settings.stop));
      // The engine calls what the watch for stops ended cancelled.
      const FinishReason reason =
          result.reason == FinishReason::kCancelled ? FinishReason::kStop : result.reason;
      Json json = line.json;
      json["completion"] = line.conversation()
                               ? Json::array({{{"role", "assistant"}, {"content", text}}})
                               : Json(text);
      if (a.samples > 1) {
        json["sample"] = k;
      }
      json["finish_reason"] = finish_reason_name(reason);
      if (line.settings.logprobs > 0) {
        json["logprobs"] = logprobs_json(result, tokenizer);
      }
      stop_point();
      if (!graded || traces.keep(i, text, reason, json) || a.keep == "all") {
        write(json);
      }
    }
    if (!line.error.empty()) {
      line.json["error"] = line.error;
      ++failed;
      if (!graded || a.keep == "all") {
        write(line.json);
      }
    }
  }
  results.write(out);
  traces.report();
  if (failed > 0) {
    say("{} of {} prompts were not answered; {}", failed, lines.size(),
        graded && a.keep == "right" ? "the first: " + first_error(lines)
                                    : "their lines say why ('error')");
  }
  return failed > 0 && failed == lines.size() ? 1 : 0;
}

int run_generate(const GenerateArgs& a) {
  a.sampling.config();  // an Error before anything is loaded
  expect((a.prompt.empty() ? 0 : 1) + (a.input.empty() ? 0 : 1) + (a.task.empty() ? 0 : 1) == 1,
         "expected one of --prompt, --input and --task");
  expect(a.task.empty() == a.data.empty(),
         "--task and --data belong together: a form and the file that has it");
  expect(a.many() || (a.logprobs == 0 && a.samples == 1),
         "--logprobs and --samples belong to --input and --task, whose results are JSON lines");
  expect(a.samples == 1 || a.sampling.temperature > 0.0,
         "{} samples of the likeliest token are {} times the same; give --temperature", a.samples,
         a.samples);
  Task task;
  if (!a.task.empty()) {
    task = load_task(a.task, a.data);
    expect_gradable(task);
  }
  const StopAnywhere stop(a.many() ? "nothing is written: results are when every prompt is answered"
                                   : "the text ends where it came");
  std::vector<BatchLine> lines = !a.input.empty()  ? read_batch(a)
                                 : !a.task.empty() ? questions_of(a, task)
                                                   : std::vector<BatchLine>();
  const bool switches = std::any_of(lines.begin(), lines.end(),
                                    [](const BatchLine& line) { return !line.preset.empty(); });
  PresetModel model(a, a.many() ? a.batch : 1, switches);
  const Tokenizer tokenizer = Tokenizer::load(a.model);
  if (a.chat) {
    tokenizer.expect_chat(a.model, "leave --chat away");
  }
  if (!a.task.empty()) {
    tokenizer.expect_chat(a.model, "give --input with prompts in the model's own form");
  }
  if (a.many()) {
    return run_batch(a, model, tokenizer, std::move(lines), task);
  }
  stream_answer(model.engine(), tokenizer,
                a.request(tokenizer, model.spec(), prompt_tokens(a, tokenizer, a.prompt)), true);
  stop_point();
  return 0;
}

Action declare_generate(Args& args) {
  auto a = std::make_shared<GenerateArgs>();
  args.positional("model", "checkpoint folder", &a->model);
  args.option("prompt,p", "the text to go on from", &a->prompt);
  args.option(
      "input,i",
      "JSON lines with 'prompt', a text or a list of messages: answers them all at once; of "
      "a supernet with 'preset' too, the one that answers the line; 'sampling' is an object of "
      "options for the line, as in {\"top_p\": 0.9, \"max_new_tokens\": 64, \"stop\": [\"\\n\"]}",
      &a->input);
  args.choice("task", "asks the questions of --data instead, and grades the answers", task_forms(),
              &a->task);
  args.option("data,d", "the task's file", &a->data);
  args.choice("keep", "with --task: the right answers that came to an end, or all",
              {"right", "all"}, &a->keep);
  args.option("samples", "answers to each prompt", &a->samples, {1, 4096});
  args.option("output,o", "file for the results of --input and --task (standard output otherwise)",
              &a->output);
  args.flag("chat", "the prompt is a user's message: apply the chat template", &a->chat);
  args.flag("question", "the prompt is a question in the form of generated problems", &a->question);
  args.option("batch", "sequences at once, with --input and --task", &a->batch, {1, 4096});
  args.option("logprobs",
              "in JSON lines: each token's log-probability, and as many of the likeliest beside it",
              &a->logprobs, {0, kMostRanked});
  a->declare(args);
  a->engine.declare(args);
  return [a] { return run_generate(*a); };
}

}  // namespace

Command generate_command() {
  return {"generate", "generates text from a prompt, or from a file of prompts",
          "  cambium generate DIR -p \"Once upon a time\" --temperature 0.8\n"
          "  cambium generate models/teacher --question -p \"Tom has 7 books. Ida has 3 books "
          "fewer than Tom. Zoe has twice as many books as Ida. How many books does Zoe have?\"\n"
          "  cambium generate DIR --chat -i prompts.jsonl -o answers.jsonl\n"
          "  cambium generate DIR --task gsm8k -d gsm8k/train.jsonl --samples 4 --temperature 0.7 "
          "--batch 256 -o traces.jsonl   # right answers, for cambium distill and train",
          declare_generate};
}

}  // namespace cambium
