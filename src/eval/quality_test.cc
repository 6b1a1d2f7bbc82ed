// Accuracy on models whose answers are known because their weights were written by hand.
#include "eval/quality.h"

#include <gmock/gmock.h>
#include <algorithm>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "eval/statistics.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::byte_tokenizer;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// A model that answers with `next[last token]`: mixers and feed-forwards add nothing, and the
/// head's row of the next token is the embedding of the one before it.
LoadedModel scripted(const std::map<int32_t, int32_t>& next, double confidence = 1.0) {
  ModelSpec spec = testing::tiny_attention(1);
  spec.vocab = 261;
  spec.tied_head = false;
  spec.eos_ids = {};
  LoadedModel loaded = fresh_model(spec, 3, 1.0);
  std::map<std::string, float*> weights;
  loaded.model->visit(
      [&](const std::string& name, Parameter& p) { weights[name] = p.tensor.ptr<float>(); });
  loaded.model->visit([&](const std::string& name, Parameter& p) {
    if (name.ends_with("o_proj.weight") || name.ends_with("down.weight") || name == "head.weight") {
      std::fill_n(p.tensor.ptr<float>(), p.numel(), 0.0F);
    }
  });
  for (const auto& [token, then] : next) {
    for (int64_t c = 0; c < spec.width; ++c) {
      weights["head.weight"][then * spec.width + c] +=
          static_cast<float>(confidence) * weights["embed.weight"][token * spec.width + c];
    }
  }
  return loaded;
}

int32_t id(const Tokenizer& tokenizer, const char* text) {
  const std::vector<int32_t> ids = tokenizer.encode(text, false);
  EXPECT_EQ(ids.size(), 1U) << text;
  return ids.front();
}

Task numbers(const std::vector<std::string>& answers) {
  Task task{"numbers", AnswerForm::kNumber, {}};
  for (size_t i = 0; i < answers.size(); ++i) {
    task.examples.push_back({"What is " + std::to_string(i) + "?", answers[i], ""});
  }
  return task;
}

std::vector<std::string> responses(const AccuracyResult& result) {
  std::vector<std::string> texts;
  for (const ExampleResult& e : result.examples) {
    texts.push_back(e.response);
  }
  return texts;
}

// A plain question ends with a newline, one through the template with the assistant's token.
TEST(Accuracy, AsksPlainlyOrThroughTheTemplate) {
  const Tokenizer tokenizer = byte_tokenizer();
  LoadedModel model = scripted({{id(tokenizer, "\n"), id(tokenizer, "7")},
                                {id(tokenizer, "7"), id(tokenizer, "<|stop|>")},
                                {id(tokenizer, "<|assistant|>"), id(tokenizer, "8")},
                                {id(tokenizer, "8"), id(tokenizer, "<|stop|>")},
                                {id(tokenizer, "<|stop|>"), id(tokenizer, "9")}});
  const Task task = numbers({"7", "8", "7.0", "70"});
  const AccuracyResult plain = evaluate_accuracy(*model.model, tokenizer, task, {});
  EXPECT_THAT(responses(plain), ElementsAre("7", "7", "7", "7"));
  EXPECT_EQ(plain.summary.correct, 2);
  EXPECT_EQ(plain.summary.total, 4);
  const Estimate estimate = proportion(2, 4);
  EXPECT_EQ(plain.summary.accuracy.value, 0.5);
  EXPECT_EQ(plain.summary.accuracy.low, estimate.interval.low);
  EXPECT_EQ(plain.summary.accuracy.high, estimate.interval.high);
  ASSERT_EQ(plain.examples.size(), 4U);
  EXPECT_EQ(plain.examples[2].question, "What is 2?");
  EXPECT_EQ(plain.examples[2].expected, "7.0");
  EXPECT_EQ(plain.examples[2].given, "7");
  EXPECT_TRUE(plain.examples[2].correct);
  EXPECT_FALSE(plain.examples[3].correct);
  const AccuracyResult chat = evaluate_accuracy(*model.model, tokenizer, task, {.chat = true});
  EXPECT_THAT(responses(chat), ElementsAre("8", "8", "8", "8"));
  EXPECT_EQ(chat.summary.correct, 1);
}

TEST(Accuracy, StopsAtAnEndTokenOrAtTheLimit) {
  const Tokenizer tokenizer = byte_tokenizer();
  const int32_t newline = id(tokenizer, "\n");
  const int32_t seven = id(tokenizer, "7");
  const int32_t end = id(tokenizer, "<|end|>");
  LoadedModel endless = scripted({{newline, seven}, {seven, seven}});
  EXPECT_THAT(responses(evaluate_accuracy(*endless.model, tokenizer, numbers({"7"}),
                                          {.max_new_tokens = 5})),
              ElementsAre("77777"));
  // The model's own end tokens count beside the tokenizer's; no end token is part of a response.
  ModelSpec spec = endless.model->spec();
  spec.eos_ids = {end};
  LoadedModel ended = fresh_model(spec, 3);
  const LoadedModel chain = scripted({{newline, seven}, {seven, end}, {end, seven}});
  std::map<std::string, Tensor> from;
  chain.model->visit([&](const std::string& name, Parameter& p) { from[name] = p.tensor; });
  ended.model->visit(
      [&](const std::string& name, Parameter& p) { copy_values(p.tensor, from.at(name)); });
  EXPECT_THAT(
      responses(evaluate_accuracy(*ended.model, tokenizer, numbers({"7"}), {.max_new_tokens = 5})),
      ElementsAre("7"));
  EXPECT_EQ(evaluate_accuracy(*ended.model, tokenizer, numbers({"7"}), {}).summary.correct, 1);
}

TEST(Accuracy, DoesNotDependOnTheBatchAndTellsItsProgress) {
  const Tokenizer tokenizer = byte_tokenizer();
  LoadedModel model = fresh_model(scripted({}).model->spec(), 8, 0.3);
  const Task task = numbers(std::vector<std::string>(7, "1"));
  std::vector<std::vector<std::string>> all;
  for (const int64_t batch : {1, 3, 64}) {
    std::vector<int64_t> done;
    all.push_back(responses(evaluate_accuracy(*model.model, tokenizer, task,
                                              {.max_new_tokens = 12, .batch = batch},
                                              [&](int64_t n) { done.push_back(n); })));
    EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
    ASSERT_FALSE(done.empty());
    EXPECT_EQ(done.front(), 0);  // one that runs is not done
    EXPECT_EQ(done.back(), 7);
  }
  EXPECT_EQ(all[1], all[0]);
  EXPECT_EQ(all[2], all[0]);
}

// Each problem draws from a stream of its own: the same question is not always answered alike.
TEST(Accuracy, SamplesBySeedAndProblem) {
  const Tokenizer tokenizer = byte_tokenizer();
  LoadedModel model = scripted({});  // every token equally likely
  Task task = numbers({"1", "1", "1"});
  for (Example& example : task.examples) {
    example.question = "Again?";
  }
  const auto sample = [&](double temperature, uint64_t seed) {
    return responses(
        evaluate_accuracy(*model.model, tokenizer, task,
                          {.max_new_tokens = 16, .temperature = temperature, .seed = seed}));
  };
  EXPECT_EQ(sample(1.0, 5), sample(1.0, 5));
  EXPECT_NE(sample(1.0, 5), sample(1.0, 6));
  EXPECT_NE(sample(1.0, 5)[0], sample(1.0, 5)[1]);
  EXPECT_EQ(sample(0.0, 5), sample(0.0, 6));
}

// Several answers to a problem: all count, the interval is over problems, and files keep them.
TEST(Accuracy, SamplesAreAveragedAndKept) {
  const Tokenizer tokenizer = byte_tokenizer();
  LoadedModel model = scripted({});
  const Task task = numbers({"1", "2", "3"});
  const Answers answers = answer_examples(
      *model.model, tokenizer, task,
      {.max_new_tokens = 40, .temperature = 1.0, .top_k = 60, .samples = 4, .seed = 3});
  ASSERT_EQ(answers.responses.size(), 12U);
  EXPECT_NE(answers.responses[0].text, answers.responses[1].text);
  EXPECT_EQ(answers.responses[3].prompt, "What is 0?\n");
  EXPECT_EQ(answers.responses[4].prompt, "What is 1?\n");
  int64_t truncated = 0;
  for (const Response& response : answers.responses) {
    EXPECT_EQ(response.truncated, response.tokens == 40);
    truncated += response.truncated ? 1 : 0;
  }
  const TestFolder folder;
  write_file_atomically(folder.at("a.jsonl"), ungraded_lines(task, answers.responses));
  const AccuracyResult now = grade_responses(task, answers.responses);
  const AccuracyResult later = grade_responses(task, read_responses(folder.at("a.jsonl"), task));
  EXPECT_EQ(example_lines(now.examples), example_lines(later.examples));
  EXPECT_EQ(now.samples, 4);
  EXPECT_EQ(now.truncated, truncated);
  EXPECT_EQ(now.tokens, answers.tokens);
  EXPECT_EQ(now.examples[5].sample, 1);
  const std::vector<Response> known = {{"1"}, {"1"}, {"2"}, {"0"}, {"0"}, {"0"}};
  const AccuracyResult half = grade_responses(task, known);
  EXPECT_DOUBLE_EQ(half.summary.accuracy.value, 0.5);
  EXPECT_EQ(half.summary.accuracy.low, 0.0);  // all three problems may be the third
  EXPECT_EQ(half.summary.accuracy.high, 1.0);
  write_file_atomically(folder.at("b.jsonl"), R"({"response": "1", "tokens": -3})");
  EXPECT_THAT([&] { read_responses(folder.at("b.jsonl"), task); },
              ::testing::ThrowsMessage<Error>(HasSubstr("b.jsonl:1: expected 'tokens'")));
}

// The harness's words end an answer where the next question would begin.
TEST(Accuracy, AsksAsTheHarnessAsksAndStopsWhereItStops) {
  const Tokenizer tokenizer = byte_tokenizer();
  Task task = numbers({"7"});
  PromptConfig config{.words = PromptWords::kHarness, .shots = {{"One?", "1", "It is 1.\n#### 1"}}};
  EXPECT_EQ(prompt_text(tokenizer, task, task.examples[0], config),
            "Question: One?\nAnswer: It is 1.\n#### 1\n\nQuestion: What is 0?\nAnswer:");
  task.form = AnswerForm::kMath;
  EXPECT_EQ(
      prompt_text(tokenizer, task, task.examples[0], config),
      "Problem:\nOne?\n\nSolution: It is 1.\n#### 1\nFinal Answer: The final answer is $1$. I "
      "hope it is correct.\n\nProblem:\nWhat is 0?\n\nSolution:");
  EXPECT_THAT(stop_texts(task, config), ElementsAre("Problem:"));
  config.words = PromptWords::kPlain;
  EXPECT_THAT([&] { expect_promptable(task, config); },
              ::testing::ThrowsMessage<Error>(HasSubstr("add --words harness, or --chat")));
  // "...:" is followed by "7" and then by "Question: " for ever.
  task.form = AnswerForm::kNumber;
  std::map<int32_t, int32_t> chain;
  const std::string loop = ":7Question";
  for (size_t i = 0; i < loop.size(); ++i) {
    chain[id(tokenizer, loop.substr(i, 1).c_str())] =
        id(tokenizer, loop.substr((i + 1) % loop.size(), 1).c_str());
  }
  LoadedModel model = scripted(chain);
  const AccuracyResult result = evaluate_accuracy(
      *model.model, tokenizer, task, {.max_new_tokens = 60, .words = PromptWords::kHarness});
  EXPECT_THAT(responses(result), ElementsAre("7"));
  EXPECT_EQ(result.truncated, 0);
  EXPECT_LT(result.tokens, 60);
}

// One problem that is too long for the model or the cache is not answered; the others are.
TEST(Accuracy, ATooLongProblemIsNamedAndTheRunGoesOn) {
  const Tokenizer tokenizer = byte_tokenizer();
  const int32_t seven = id(tokenizer, "7");
  LoadedModel model = scripted({{id(tokenizer, "\n"), seven}, {seven, id(tokenizer, "<|stop|>")}});
  const int64_t positions = model.model->spec().max_positions;
  Task task = numbers({"7", "7", "7"});
  const auto asked = [&](const AccuracyConfig& config) {
    return evaluate_accuracy(*model.model, tokenizer, task, config);
  };
  EngineConfig small;
  small.max_tokens = 64;
  for (const auto& [length, engine] :
       {std::pair{positions + 1, EngineConfig{}}, std::pair{int64_t{100}, small}}) {
    task.examples[1].question = std::string(static_cast<size_t>(length), 'x');
    const AccuracyResult result = asked({.max_new_tokens = 8, .engine = engine});
    EXPECT_THAT(responses(result), ElementsAre("7", "", "7"));
    EXPECT_EQ(result.summary.correct, 2);
    EXPECT_EQ(result.summary.total, 3);
    EXPECT_EQ(result.unanswered, 1);
    EXPECT_EQ(result.examples[0].unanswered, "");
    EXPECT_THAT(result.examples[1].unanswered, HasSubstr("can never fit"));
    const std::string lines = example_lines(result.examples);
    EXPECT_EQ(lines.find("unanswered"), lines.rfind("unanswered"));
    EXPECT_NE(lines.find("unanswered"), std::string::npos);
  }
  // Graded elsewhere, it is still one that was not answered, whatever the grader finds in "".
  const std::vector<Response> given = {{"7"}, {"7", "too long"}, {"7"}};
  const TestFolder folder;
  write_file_atomically(folder.at("answers.jsonl"), ungraded_lines(task, given));
  const AccuracyResult graded =
      grade_responses(task, read_responses(folder.at("answers.jsonl"), task));
  EXPECT_EQ(graded.summary.correct, 2);
  EXPECT_EQ(graded.examples[1].unanswered, "too long");
  for (Example& example : task.examples) {
    example.question = std::string(100, 'x');
  }
  EXPECT_THAT([&] { asked({.engine = small}); },
              ::testing::ThrowsMessage<Error>(HasSubstr("none of 3 problems can be asked")));
}

TEST(Accuracy, OfNoProblemsIsNothing) {
  LoadedModel model = scripted({});
  const AccuracyResult none = evaluate_accuracy(*model.model, byte_tokenizer(), numbers({}), {});
  EXPECT_EQ(none.summary.total, 0);
  EXPECT_EQ(none.summary.accuracy.value, 0.0);
  EXPECT_TRUE(none.examples.empty());
  EXPECT_EQ(example_lines({}), "");
}

TEST(ExampleLines, AreJsonWhateverTheResponse) {
  const std::string lines =
      example_lines({{"a \"b\"\n", "4", "so\t4", "4", true}, {"c", "5", "\xff?", "", false}});
  const size_t end = lines.find('\n');
  const auto first = nlohmann::ordered_json::parse(lines.substr(0, end));
  EXPECT_EQ(
      first.dump(),
      R"({"question":"a \"b\"\n","expected":"4","response":"so\t4","given":"4","correct":true})");
  const auto second = nlohmann::json::parse(lines.substr(end + 1));
  EXPECT_EQ(second["response"], "\xEF\xBF\xBD?");
  EXPECT_EQ(second["correct"], false);
  EXPECT_EQ(std::count(lines.begin(), lines.end(), '\n'), 2);
}

}  // namespace
}  // namespace cambium
