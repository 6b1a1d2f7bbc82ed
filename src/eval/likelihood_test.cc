#include "eval/likelihood.h"

#include <gmock/gmock.h>

#include <cmath>

#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::byte_tokenizer;
using ::testing::HasSubstr;
using testing::message_of;

LoadedModel model_of() {
  ModelSpec spec = testing::tiny_attention(1);
  spec.vocab = 261;
  return fresh_model(spec, 4, 0.5);
}

/// The same by its definition: one forward pass, log softmax of every row.
double by_hand(Model& model, const std::vector<int32_t>& tokens, size_t first) {
  Workspace workspace(model.device());
  Context ctx = context_for(model, workspace);
  Batch batch;
  batch.add(tokens, 0, -1);
  const Tensor logits = model.logits(ctx, model.forward(ctx, batch));
  const int64_t vocab = model.spec().vocab;
  double sum = 0;
  for (size_t t = first; t < tokens.size(); ++t) {
    const float* row = logits.ptr<float>() + (static_cast<int64_t>(t) - 1) * vocab;
    double all = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      all += std::exp(static_cast<double>(row[v]));
    }
    sum += static_cast<double>(row[tokens[t]]) - std::log(all);
  }
  return sum;
}

TEST(Likelihood, IsTheSumOverTheContinuationsTokens) {
  LoadedModel model = model_of();
  const Tokenizer tokenizer = byte_tokenizer();
  // A space at the end of a context belongs to what follows.
  const std::vector<double> sums = log_probabilities(
      *model.model, tokenizer, {{"Two and", " two"}, {"Two and ", "two"}, {"Q", "x"}});
  const std::vector<int32_t> whole = tokenizer.encode("Two and two", true);
  const size_t context = tokenizer.encode("Two and", true).size();
  EXPECT_NEAR(sums[0], by_hand(*model.model, whole, context), 1e-4);
  EXPECT_NEAR(sums[1], sums[0], 1e-5);
  EXPECT_LT(sums[2], 0.0);
  // Of a context that is too long the beginning is left out.
  const auto positions = static_cast<size_t>(model.model->spec().max_positions);
  const std::string tail(positions - 2, 'b');
  const std::vector<double> cut = log_probabilities(
      *model.model, tokenizer, {{std::string(50, 'a') + tail, "xyz"}, {"c" + tail, "xyz"}});
  EXPECT_NEAR(cut[0], cut[1], 1e-4);
  EXPECT_THAT(message_of([&] {
                log_probabilities(*model.model, tokenizer, {{"a", ""}});
              }),
              HasSubstr("has no token of its own"));
}

// acc takes the largest sum, acc_norm the largest per byte of the option.
TEST(Likelihood, ChoosesBySumAndByLength) {
  const ChoiceQuestion question{"Q", {"a", "abcdefgh", "ab"}, 1};
  const ChoiceResult r = choose({-2.0, -4.0, -3.0}, question, ChoiceStyle::kOptions);
  EXPECT_EQ(r.chosen, 0);
  EXPECT_EQ(r.chosen_by_length, 1);
  EXPECT_DOUBLE_EQ(r.margin(), -2.0);
  // Bytes, not characters: "éé" has four.
  EXPECT_EQ(choose({-3.9, -3.0}, {"Q", {"\xC3\xA9\xC3\xA9", "abc"}, 0}, ChoiceStyle::kOptions)
                .chosen_by_length,
            0);
}

TEST(Likelihood, StickyLettersAreSeen) {
  const ChoiceQuestion question{"Q", {"p", "q", "r", "s"}, 2};
  const auto asked = [&](const auto& score) {
    std::vector<ChoiceResult> out;
    for (int64_t turn = 0; turn < 4; ++turn) {
      const ChoiceQuestion turned = rotated(question, turn);
      std::vector<double> logs;
      for (int64_t i = 0; i < 4; ++i) {
        logs.push_back(score(i, turned.options[static_cast<size_t>(i)]));
      }
      out.push_back(choose(logs, turned, ChoiceStyle::kLetters));
    }
    return summarise_choices(out, 4);
  };
  const ChoiceSummary always_a =
      asked([](int64_t letter, const std::string&) { return letter == 0 ? -1.0 : -3.0; });
  EXPECT_EQ(always_a.sticky.accuracy.value, 1.0);
  EXPECT_EQ(always_a.by_sum.accuracy.value, 0.25);
  EXPECT_DOUBLE_EQ(always_a.margin.value, (2.0 - 3 * 2.0) / 4);
  EXPECT_THAT(always_a.letters, ::testing::ElementsAre(4, 0, 0, 0));
  const ChoiceSummary knows =
      asked([](int64_t, const std::string& option) { return option == "r" ? -1.0 : -3.0; });
  EXPECT_EQ(knows.sticky.accuracy.value, 0.0);
  EXPECT_EQ(knows.by_sum.accuracy.value, 1.0);
  EXPECT_DOUBLE_EQ(knows.margin.value, 2.0);
}

TEST(Likelihood, AsksEveryQuestionInEveryOrder) {
  LoadedModel model = model_of();
  const Tokenizer tokenizer = byte_tokenizer();
  Task task = parse_task("choices",
                         R"({"question": "Two?", "choices": ["no", "yes", "maybe"], "answer": 1})"
                         "\n"
                         R"({"question": "One?", "choices": ["no", "yes", "so"], "answer": 0})",
                         "here");
  EXPECT_EQ(evaluate_choices(*model.model, tokenizer, task, {}).size(), 2U);
  const std::vector<ChoiceResult> turned =
      evaluate_choices(*model.model, tokenizer, task, {.rotations = true});
  ASSERT_EQ(turned.size(), 6U);
  EXPECT_EQ(turned[0].correct, 1);
  EXPECT_EQ(turned[1].correct, 2);
  EXPECT_EQ(turned[2].correct, 0);
  EXPECT_EQ(evaluate_choices(*model.model, tokenizer, task, {.chat = true}).size(), 2U);
  task.examples[1].choice.options.push_back("four");
  EXPECT_THAT(
      message_of([&] { evaluate_choices(*model.model, tokenizer, task, {.rotations = true}); }),
      HasSubstr("expected 3 options in every question, to turn them, got 4 in 'One?'"));
}

}  // namespace
}  // namespace cambium
