#include "eval/likelihood.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/signals.h"
#include "base/text.h"
#include "eval/statistics.h"
#include "train/held_out.h"

namespace cambium {
namespace {

/// Texts are run together up to so many tokens.
constexpr int64_t kTokensTogether = 4096;

Document document_of(const Tokenizer& tokenizer, const Continuation& continuation,
                     int64_t longest) {
  std::string context = continuation.context;
  std::string text = continuation.text;
  const size_t end = context.find_last_not_of(' ');
  const size_t kept = end == std::string::npos ? 0 : end + 1;
  text = context.substr(kept) + text;
  context.resize(kept);
  const std::vector<int32_t> whole = tokenizer.encode(context + text, continuation.add_special);
  const size_t before = tokenizer.encode(context, continuation.add_special).size();
  expect(whole.size() > std::max<size_t>(before, 1),
         "'{}' after '{}' has no token of its own to measure", shortened(text, 60),
         shortened(context, 60));
  const size_t first = std::max<size_t>(before, 1);
  const size_t cut =
      std::min(whole.size() - std::min(whole.size(), static_cast<size_t>(longest) + 1), first - 1);
  Document document;
  document.append(
      {whole.begin() + static_cast<int64_t>(cut), whole.begin() + static_cast<int64_t>(first)},
      false);
  document.append({whole.begin() + static_cast<int64_t>(first), whole.end()}, true);
  return document;
}

Measured measured(const Estimate& estimate) {
  return {estimate.value, estimate.interval.low, estimate.interval.high};
}

/// Of answers to questions that are each asked `rotations` times.
AccuracySummary summary_of(const std::vector<double>& right, int64_t rotations) {
  AccuracySummary out;
  out.total = std::ssize(right);
  out.correct = static_cast<int64_t>(std::count(right.begin(), right.end(), 1.0));
  if (rotations == 1) {
    out.accuracy = measured(proportion(out.correct, out.total));
    return out;
  }
  std::vector<double> shares(right.size() / static_cast<size_t>(rotations));
  for (size_t i = 0; i < right.size(); ++i) {
    shares[i / static_cast<size_t>(rotations)] += right[i] / static_cast<double>(rotations);
  }
  out.accuracy = measured(mean_share(shares, 1));
  return out;
}

}  // namespace

std::vector<double> log_probabilities(Model& model, const Tokenizer& tokenizer,
                                      const std::vector<Continuation>& continuations,
                                      const std::function<void(int64_t done)>& progress) {
  std::vector<double> out;
  Workspace workspace(model.device());
  Context ctx = context_for(model, workspace);
  PackedSequence group;
  const auto flush = [&] {
    if (group.batch.size() == 0) {
      return;
    }
    stop_point();
    const WorkspaceScope scope(workspace);
    const Tensor hidden = model.forward(ctx, group.batch);
    std::vector<LossSums> sums;
    HeldOut::add_sums(ctx, group, model, hidden, nullptr, {}, sums);
    for (const LossSums& sum : sums) {
      out.push_back(-sum.cross_entropy);
    }
    group = {};
    if (progress) {
      progress(std::ssize(out));
    }
  };
  for (const Continuation& continuation : continuations) {
    const Document document = document_of(tokenizer, continuation, model.spec().max_positions);
    const auto rows = static_cast<int64_t>(document.tokens.size()) - 1;
    expect(rows <= model.spec().max_positions,
           "a continuation of {} tokens is longer than the model's {} positions", rows,
           model.spec().max_positions);
    if (group.batch.size() + rows > kTokensTogether) {
      flush();
    }
    add_document(group, document);
  }
  flush();
  CAMBIUM_CHECK(out.size() == continuations.size());
  return out;
}

double ChoiceResult::margin() const {
  double other = -std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < log_probabilities.size(); ++i) {
    if (static_cast<int64_t>(i) != correct) {
      other = std::max(other, log_probabilities[i]);
    }
  }
  return log_probabilities[static_cast<size_t>(correct)] - other;
}

ChoiceResult choose(std::vector<double> log_probabilities, const ChoiceQuestion& question,
                    ChoiceStyle style) {
  const ChoicePrompt prompt = choice_prompt(question, style);
  CAMBIUM_CHECK(log_probabilities.size() == prompt.continuations.size());
  std::vector<double> by_length;
  for (size_t i = 0; i < log_probabilities.size(); ++i) {
    const auto bytes = static_cast<double>(prompt.continuations[i].size() - 1);
    by_length.push_back(log_probabilities[i] / std::max(bytes, 1.0));
  }
  const auto largest = [](const std::vector<double>& values) {
    return std::max_element(values.begin(), values.end()) - values.begin();
  };
  ChoiceResult out;
  out.chosen = largest(log_probabilities);
  out.chosen_by_length = largest(by_length);
  out.correct = question.correct;
  out.log_probabilities = std::move(log_probabilities);
  return out;
}

ChoiceSummary summarise_choices(const std::vector<ChoiceResult>& results, int64_t rotations) {
  CAMBIUM_CHECK(!results.empty() && std::ssize(results) % rotations == 0);
  ChoiceSummary out;
  std::vector<double> by_sum;
  std::vector<double> by_length;
  std::vector<double> margins(results.size() / static_cast<size_t>(rotations));
  for (size_t i = 0; i < results.size(); ++i) {
    const ChoiceResult& r = results[i];
    by_sum.push_back(r.chosen == r.correct ? 1.0 : 0.0);
    by_length.push_back(r.chosen_by_length == r.correct ? 1.0 : 0.0);
    margins[i / static_cast<size_t>(rotations)] += r.margin() / static_cast<double>(rotations);
    out.letters.resize(std::max(out.letters.size(), r.log_probabilities.size()));
    ++out.letters[static_cast<size_t>(r.chosen)];
  }
  out.by_sum = summary_of(by_sum, rotations);
  out.by_length = summary_of(by_length, rotations);
  out.margin = measured(mean(margins));
  if (rotations > 1) {
    std::vector<double> sticky;
    for (auto at = results.begin(); at != results.end(); at += rotations) {
      sticky.push_back(std::all_of(at, at + rotations,
                                   [&](const ChoiceResult& r) { return r.chosen == at->chosen; })
                           ? 1.0
                           : 0.0);
    }
    out.sticky = summary_of(sticky, 1);
  }
  return out;
}

bool rotatable(const Task& task) {
  return !task.examples.empty() &&
         std::all_of(task.examples.begin(), task.examples.end(), [&](const Example& e) {
           return e.choice.options.size() > 1 &&
                  e.choice.options.size() == task.examples.front().choice.options.size();
         });
}

int64_t rotations_of(const Task& task, const ChoiceConfig& config) {
  return config.rotations ? std::ssize(task.examples.front().choice.options) : 1;
}

std::vector<ChoiceResult> evaluate_choices(Model& model, const Tokenizer& tokenizer,
                                           const Task& task, const ChoiceConfig& config,
                                           const std::function<void(int64_t done)>& progress) {
  const bool letters = config.rotations || config.chat;
  const bool lettered =
      task.style == ChoiceStyle::kLetters || task.style == ChoiceStyle::kParentheses;
  const ChoiceStyle style = letters && !lettered ? ChoiceStyle::kLetters : task.style;
  const int64_t rotations = rotations_of(task, config);
  std::string before;
  std::vector<ChatMessage> turns;
  for (const Example& shot : config.shots) {
    const ChoicePrompt prompt = choice_prompt(shot.choice, style);
    const std::string& answer = prompt.continuations[static_cast<size_t>(shot.choice.correct)];
    before += prompt.context + answer + "\n\n";
    turns.push_back({"user", prompt.context});
    turns.push_back({"assistant", answer.substr(1)});
  }
  std::vector<ChoiceQuestion> questions;
  std::vector<Continuation> continuations;
  for (const Example& example : task.examples) {
    expect(!config.rotations || std::ssize(example.choice.options) == rotations,
           "{}: expected {} options in every question, to turn them, got {} in '{}'", task.name,
           rotations, example.choice.options.size(), shortened(example.choice.stem, 60));
    for (int64_t turn = 0; turn < rotations; ++turn) {
      questions.push_back(rotated(example.choice, turn));
      ChoicePrompt prompt = choice_prompt(questions.back(), style);
      if (config.chat) {
        std::vector<ChatMessage> messages = turns;
        messages.push_back({"user", prompt.context});
        prompt.context = tokenizer.apply_chat_template(messages);
        for (std::string& continuation : prompt.continuations) {
          continuation.erase(0, 1);  // a turn does not begin with a space
        }
      } else {
        prompt.context = before + prompt.context;
      }
      for (std::string& continuation : prompt.continuations) {
        continuations.push_back({prompt.context, std::move(continuation), !config.chat});
      }
    }
  }
  const std::vector<double> sums = log_probabilities(model, tokenizer, continuations, progress);
  std::vector<ChoiceResult> results;
  auto at = sums.begin();
  for (const ChoiceQuestion& question : questions) {
    const auto end = at + std::ssize(question.options);
    results.push_back(choose({at, end}, question, style));
    at = end;
  }
  return results;
}

}  // namespace cambium
