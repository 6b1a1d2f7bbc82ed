// What is measured and how it is laid out; how long it takes is never asserted.
#include "eval/throughput.h"

#include <gmock/gmock.h>

#include <limits>

#include "base/error.h"
#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

UnitSpec window() {
  UnitSpec window = testing::attention_mixer();
  window.kind = "sliding_window";
  window.options.set("window", int64_t{8});
  return window;
}

UnitSpec mamba() {
  return {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}}};
}

TEST(Throughput, GivesARowForEveryModelAndContext) {
  LoadedModel attention = fresh_model(testing::tiny_attention(2), 1);
  LoadedModel mixed = fresh_model(testing::tiny_spec({mamba(), window()}), 1);
  // Contexts below, at and beyond the chunk, not multiples of it, and longer than the positions
  // that the model was made for.
  const ThroughputConfig config{.contexts = {1, 32, 45, 300},
                                .batch = 3,
                                .decode_tokens = 4,
                                .repeats = 3,
                                .prefill_chunk = 32};
  const auto speeds = measure_throughput({attention.model.get(), mixed.model.get()}, config);
  ASSERT_EQ(speeds.size(), 2U);
  for (const std::vector<SpeedSummary>& of_model : speeds) {
    ASSERT_EQ(of_model.size(), config.contexts.size());
    for (size_t i = 0; i < of_model.size(); ++i) {
      EXPECT_EQ(of_model[i].context, config.contexts[i]);
      EXPECT_EQ(of_model[i].batch, 3);
      for (const Measured& speed : {of_model[i].prefill, of_model[i].decode}) {
        EXPECT_TRUE(std::isfinite(speed.high));
        EXPECT_GT(speed.low, 0.0);
        EXPECT_LE(speed.low, speed.value);
        EXPECT_LE(speed.value, speed.high);
      }
    }
  }
}

TEST(Throughput, SaysThatLogitsAreNotNumbers) {
  LoadedModel sound = fresh_model(testing::tiny_attention(1), 1);
  LoadedModel broken = fresh_model(testing::tiny_attention(1), 1);
  // One number of the head: the logits of one token.
  fill(broken.model->head().slice(0, 7, 1).slice(1, 3, 1),
       std::numeric_limits<double>::quiet_NaN());
  const auto speeds =
      measure_throughput({sound.model.get(), broken.model.get()},
                         {.contexts = {3, 40}, .batch = 2, .decode_tokens = 1, .repeats = 2});
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(speeds.at(0).at(i).finite);
    EXPECT_FALSE(speeds.at(1).at(i).finite);
  }
}

// Behind zeros: nothing is read before, whatever a layer keeps.
TEST(Throughput, DecodesAtAContextThatNobodyRead) {
  LoadedModel mixed =
      fresh_model(testing::tiny_spec({mamba(), window(), testing::attention_mixer()}), 1);
  const auto speeds = measure_throughput(
      {mixed.model.get()},
      {.contexts = {1, 100}, .batch = 3, .decode_tokens = 2, .repeats = 1, .prefill = false});
  for (const SpeedSummary& speed : speeds.at(0)) {
    EXPECT_GT(speed.decode.value, 0.0);
    EXPECT_TRUE(speed.finite);
  }
}

TEST(Throughput, OfOneRepeatHasNoSpread) {
  LoadedModel model = fresh_model(testing::tiny_attention(1), 1);
  const auto speeds =
      measure_throughput({model.model.get()}, {.contexts = {8}, .decode_tokens = 1, .repeats = 1});
  const SpeedSummary& speed = speeds.at(0).at(0);
  EXPECT_EQ(speed.prefill.low, speed.prefill.high);
  EXPECT_EQ(speed.decode.low, speed.decode.value);
  EXPECT_TRUE(measure_throughput({model.model.get()}, {.contexts = {}}).at(0).empty());
  EXPECT_TRUE(measure_throughput({}, {.contexts = {8}}).empty());
}

TEST(ThroughputErrors, NameWhatIsWrong) {
  LoadedModel model = fresh_model(testing::tiny_attention(1), 1);
  const struct {
    ThroughputConfig config;
    const char* expected;
  } rows[] = {{{.batch = 0}, "batch, repeats and decode tokens above 0"},
              {{.decode_tokens = 0}, "batch, repeats and decode tokens above 0"},
              {{.repeats = -1}, "batch, repeats and decode tokens above 0"},
              {{.contexts = {8, 0}}, "context above 0 tokens, got 0"},
              {{.contexts = {8}, .prefill_chunk = -1}, "piece_tokens above 0"}};
  for (const auto& row : rows) {
    const std::string message =
        testing::error_of([&] { measure_throughput({model.model.get()}, row.config); });
    EXPECT_THAT(message, HasSubstr(row.expected));
  }
}

}  // namespace
}  // namespace cambium
