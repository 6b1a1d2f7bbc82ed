// What is counted and how it is laid out; how long it takes is never asserted.
#include "eval/engine_speed.h"

#include <gmock/gmock.h>

#include <limits>

#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

/// Attention, a window of 8 behind 3 sinks and Apriel's Mamba.
ModelSpec mixed() {
  UnitSpec window = testing::attention_mixer();
  window.kind = "sliding_window";
  window.options.set("window", int64_t{8});
  window.options.set("sinks", int64_t{3});
  const UnitSpec mamba = {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}}};
  return testing::tiny_spec({testing::attention_mixer(), window, mamba});
}

// Against sums written out key by key.
TEST(StepCosts, CountWeightsKeysAndStates) {
  LoadedModel loaded = fresh_model(mixed(), 1);
  Model& model = *loaded.model;
  const StepCosts costs(model, Dtype::kBF16);
  const StepCosts in_f8(model, Dtype::kF8E4M3);
  double weights = 0.0, flops = 0.0, head = 0.0, head_flops = 0.0, row = 0.0;
  model.visit([&](const std::string& name, Parameter& p) {
    const auto bytes = static_cast<double>(p.tensor.bytes());
    const double operations = p.is_matrix() ? 2.0 * static_cast<double>(p.active()) : 0.0;
    const bool is_head = &p.tensor == &model.head();
    row = name == "embed.weight" ? 4.0 * static_cast<double>(p.shape[1]) : row;
    if (is_head) {
      head = bytes;
      head_flops = operations;
    } else if (name != "embed.weight") {
      weights += bytes;
      flops += operations;
    }
  });
  EXPECT_EQ(costs.weight_bytes(), weights + head);
  const Options options = testing::attention_mixer().options;
  const auto heads = options.integer("", "heads");
  const auto numbers = 2 * options.integer("", "kv_heads", heads) * options.integer("", "head_dim");
  const auto rows = 2 * options.integer("", "kv_heads", heads);  // with a scale each, in f8
  const double key_flops = 4.0 * static_cast<double>(heads * options.integer("", "head_dim"));
  double slots = 0.0;
  for (const StateLayout& layout : model.state_layouts()) {
    slots += static_cast<double>(layout.bytes_per_sequence());
  }
  EXPECT_GT(slots, 0.0);
  for (const auto& [position, tokens] :
       {std::pair{0, 1}, {0, 5}, {0, 8}, {0, 30}, {3, 4}, {7, 1}, {8, 1}, {20, 1}, {20, 9}}) {
    double keys = 0.0, read = 0.0;
    for (const int window : {0, 8}) {
      const auto first = [&](int at) { return window == 0 ? 0 : std::max(0, at - window + 1); };
      for (int t = position; t < position + tokens; ++t) {
        keys += t - first(t) + 1 + std::min(first(t), 3);
      }
      read += position + tokens - first(position) + std::min(first(position), 3);
    }
    const StepCost cost = costs.of(1, position, tokens);
    EXPECT_EQ(cost.bytes, weights + head + tokens * row + 2 * slots +
                              2.0 * static_cast<double>(numbers) * (read + 2 * tokens))
        << position << " " << tokens;
    EXPECT_EQ(cost.bytes - in_f8.of(1, position, tokens).bytes,
              static_cast<double>(numbers - 2 * rows) * (read + 2 * tokens));
    EXPECT_EQ(cost.flops, tokens * flops + head_flops + key_flops * keys);
    // The same as a segment of a batch, and three times what is not shared in one of three.
    const std::vector<int32_t> piece(static_cast<size_t>(tokens), 1);
    Batch batch;
    batch.add(piece, position, 0);
    EXPECT_EQ(costs.of(batch.segments(), 1).bytes, cost.bytes);
    EXPECT_EQ(costs.of(batch.segments(), 0).bytes, cost.bytes - head);
    EXPECT_EQ(costs.of(batch.segments(), 0).flops, cost.flops - head_flops);
    EXPECT_NEAR(costs.of(3, position, tokens).bytes, 3 * cost.bytes - 2 * (weights + head), 1e-6);
    EXPECT_NEAR(costs.of(3, position, tokens).flops, 3 * cost.flops, 1e-6);
  }
}

/// What the keys before a call's tokens add to it.
StepCost cost_of_keys(const UnitSpec& mixer, int64_t position, int64_t tokens) {
  const LoadedModel loaded = fresh_model(testing::tiny_spec({mixer}), 1);
  const StepCosts costs(*loaded.model, Dtype::kBF16);
  StepCost of = costs.of(1, position, tokens);
  of.flops -= costs.of(1, 0, tokens).flops;
  of.bytes -= costs.of(1, 0, tokens).bytes;
  return of;
}

// A token that decodes multiplies with latents of 12 + 4 numbers and sums 12; where keys are
// expanded, with 6 + 4 and 8. With an index it scores every key and looks at five.
TEST(StepCosts, LatentsAreReadOnceForAllHeads) {
  UnitSpec latent{"latent_attention",
                  {{"heads", int64_t{3}},
                   {"q_rank", int64_t{8}},
                   {"kv_rank", int64_t{12}},
                   {"nope_dim", int64_t{6}},
                   {"rope_dim", int64_t{4}},
                   {"value_dim", int64_t{8}}}};
  EXPECT_EQ(cost_of_keys(latent, 20, 1).flops, 20 * 2.0 * 3 * (2 * 12 + 4));
  EXPECT_EQ(cost_of_keys(latent, 20, 2).flops, 2 * 20 * 2.0 * 3 * (6 + 4 + 8));
  EXPECT_EQ(cost_of_keys(latent, 20, 1).bytes, 20 * 2.0 * (12 + 4));
  UnitSpec window{"sliding_window", latent.options};
  window.options.set("window", int64_t{5});
  EXPECT_EQ(cost_of_keys(window, 20, 1).flops, 4 * 2.0 * 3 * (2 * 12 + 4));
  EXPECT_EQ(cost_of_keys(window, 20, 1).bytes, 4 * 2.0 * (12 + 4));
  latent.options.set("index_heads", int64_t{2});
  latent.options.set("index_dim", int64_t{10});
  latent.options.set("index_top", int64_t{5});
  EXPECT_EQ(cost_of_keys(latent, 20, 1).flops, 20 * 2.0 * 2 * 10 + 4 * 2.0 * 3 * (2 * 12 + 4));
  EXPECT_EQ(cost_of_keys(latent, 20, 1).bytes, 20 * 2.0 * 10 + 4 * 2.0 * (12 + 4));
  latent.options.set("index_of", "blocks");
  latent.options.set("index_size", int64_t{2});
  EXPECT_EQ(cost_of_keys(latent, 20, 1).bytes, 20 * 2.0 * 10 + 9 * 2.0 * (12 + 4));
}

// Each head of the index scores every key, and twice as many heads as have keys look at six.
TEST(StepCosts, AttentionReadsWhatAnIndexChooses) {
  const UnitSpec attention{"attention",
                           {{"heads", int64_t{4}},
                            {"kv_heads", int64_t{2}},
                            {"head_dim", int64_t{6}},
                            {"index_heads", int64_t{2}},
                            {"index_dim", int64_t{10}},
                            {"index_top", int64_t{3}},
                            {"index_size", int64_t{2}}}};
  EXPECT_EQ(cost_of_keys(attention, 20, 1).flops, 20 * 2.0 * 2 * 10 + 5 * 2.0 * 2 * 2 * 2 * 6);
  EXPECT_EQ(cost_of_keys(attention, 20, 1).bytes, 20 * 2.0 * 10 + 5 * 2.0 * 2 * 2 * 6);
}

TEST(StepCosts, TheLeastTimeIsTheLargerOfTwo) {
  const MachineLimits limits{.bytes_per_second = 100.0, .flops_per_second = 1000.0};
  EXPECT_EQ(limits.seconds({.bytes = 50.0, .flops = 100.0}), 0.5);
  EXPECT_EQ(limits.seconds({.bytes = 50.0, .flops = 2000.0}), 2.0);
}

TEST(StepCosts, LimitsAreMeasured) {
  const LoadedModel loaded = fresh_model(testing::tiny_attention(1), 1);
  const MachineLimits limits = measure_limits(*loaded.model);
  EXPECT_GT(limits.bytes_per_second, 0.0);
  EXPECT_GT(limits.flops_per_second, 0.0);
  EXPECT_TRUE(std::isfinite(limits.bytes_per_second) && std::isfinite(limits.flops_per_second));
}

constexpr MachineLimits kLimits{.bytes_per_second = 1e9, .flops_per_second = 1e9};

TEST(EngineSpeed, CountsWhatTheEngineDid) {
  LoadedModel loaded = fresh_model(mixed(), 1);
  EngineSpeedConfig config{.input = 20, .output = 6, .sequences = 7};
  config.engine.max_sequences = 3;
  config.engine.cache_values = Dtype::kF32;
  const EngineSpeed speed = measure_engine(*loaded.model, config, kLimits);
  EXPECT_EQ(speed.largest_batch, 3);
  EXPECT_EQ(speed.input_tokens, 7 * 20);
  EXPECT_EQ(speed.output_tokens, 7 * 6);
  EXPECT_GE(speed.steps, 3 * 6);  // three batches of at most three
  EXPECT_GT(speed.seconds, 0.0);
  EXPECT_GT(speed.output_rate, 0.0);
  EXPECT_GT(speed.steady_rate, 0.0);
  EXPECT_LE(speed.first_token.low, speed.first_token.value);
  EXPECT_LE(speed.first_token_admitted.value, speed.first_token.high);
  EXPECT_GT(speed.token_median, 0.0);
  EXPECT_LE(speed.token_median, speed.token_p99);
  EXPECT_GT(speed.share, 0.0);
  EXPECT_GT(speed.step_bytes, StepCosts(*loaded.model, Dtype::kF32).weight_bytes());
  EXPECT_GT(speed.cache_bytes, 0);
  EXPECT_GT(speed.peak_bytes, speed.cache_bytes);
}

TEST(EngineSpeed, TakesAsManySequencesAsMemoryHolds) {
  LoadedModel loaded = fresh_model(mixed(), 1);
  EngineSpeedConfig config{.input = 40, .output = 5, .sequences = 6};
  config.engine.max_sequences = 100;
  config.engine.page_size = 16;  // a sequence of this model would be a single page
  const CachePlan plan(*loaded.model, {.page_size = 16, .max_tokens = 44, .piece_tokens = 256});
  config.engine.memory_bytes = 2 * plan.sequence_bytes(44) + plan.sequence_bytes(44) / 2;
  const EngineSpeed speed = measure_engine(*loaded.model, config, kLimits);
  EXPECT_EQ(speed.largest_batch, 2);
  EXPECT_EQ(speed.output_tokens, 6 * 5);
  EXPECT_LE(speed.cache_bytes, config.engine.memory_bytes);
  EXPECT_EQ(speed.preemptions, 0);
  // With room for what they have at first, more of them begin.
  config.output = 200;
  config.engine.memory_bytes = 3 * plan.sequence_bytes(239);
  EXPECT_EQ(measure_engine(*loaded.model, config, kLimits).largest_batch, 3);
  config.engine.admission = Admission::kAsNeeded;
  config.engine.reserve_tokens = 4;
  const EngineSpeed dense = measure_engine(*loaded.model, config, kLimits);
  EXPECT_GT(dense.largest_batch, 3);
  EXPECT_GT(dense.preemptions, 0);
  EXPECT_GT(dense.recomputed_tokens, 0);
  EXPECT_EQ(dense.output_tokens, 6 * 200);
  // One token each: there are no gaps between tokens.
  config.output = 1;
  EXPECT_EQ(measure_engine(*loaded.model, config, kLimits).token_p99, 0.0);
}

TEST(EngineSpeedErrors, NameWhatIsWrong) {
  LoadedModel loaded = fresh_model(mixed(), 1);
  const auto error = [&](const EngineSpeedConfig& config) {
    return testing::error_of([&] { measure_engine(*loaded.model, config, kLimits); });
  };
  EXPECT_THAT(error({.input = 0}), HasSubstr("input, output and sequences above 0"));
  EXPECT_THAT(error({.output = 0}), HasSubstr("input, output and sequences above 0"));
  EXPECT_THAT(error({.sequences = -1}), HasSubstr("input, output and sequences above 0"));
  EngineSpeedConfig small;
  small.engine.memory_bytes = 100;
  EXPECT_THAT(error(small), HasSubstr("a sequence of 1151 tokens takes"));
}

TEST(EngineSpeed, SaysThatLogitsAreNotNumbers) {
  const EngineSpeedConfig config{.input = 5, .output = 3, .sequences = 2};
  const MachineLimits limits{1e9, 1e9};
  LoadedModel model = fresh_model(mixed(), 1);
  EXPECT_TRUE(measure_engine(*model.model, config, limits).finite);
  fill(model.model->head().slice(0, 23, 1).slice(1, 3, 1),
       std::numeric_limits<double>::quiet_NaN());
  EXPECT_FALSE(measure_engine(*model.model, config, limits).finite);
}

}  // namespace
}  // namespace cambium
