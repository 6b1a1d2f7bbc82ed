#include "serve/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "base/checked.h"
#include "model/weights.h"
#include "serve/testing.h"

namespace cambium {
namespace {

ModelSpec mixed_spec() {
  return testing::mixed_spec({"attention", "mamba", "sliding_window", "mamba2"});
}

LoadedModel mixed_model() {
  return fresh_model(mixed_spec(), 7, 0.2);
}

LoadedModel attention_model() {
  return fresh_model(testing::mixed_spec({"attention", "sliding_window"}), 7, 0.2);
}

std::vector<int32_t> prompt_of(int64_t length, int64_t seed) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < length; ++i) {
    tokens.push_back(static_cast<int32_t>((seed * 31 + i * i * 7 + i * 13) % 96));
  }
  return tokens;
}

/// Prompts on both sides of pages, the window and the prefill grid; greedy and sampled.
std::vector<GenerationRequest> requests() {
  std::vector<GenerationRequest> list;
  for (const int64_t length : {1, 15, 16, 17, 63, 64, 65, 100, 128, 129, 3, 40}) {
    GenerationRequest request;
    request.prompt = prompt_of(length, static_cast<int64_t>(list.size()));
    request.max_new_tokens = 5 + length % 23;
    request.sampling.temperature = list.size() % 2 == 0 ? 0.0F : 0.9F;
    request.seed = 11;
    request.stream = list.size();
    list.push_back(std::move(request));
  }
  return list;
}

/// One sequence, all its tokens again for each new one, no cache.
std::vector<int32_t> greedy_by_full_forward(Model& model, std::vector<int32_t> tokens, int64_t n) {
  std::vector<int32_t> result;
  Arena arena;
  for (int64_t i = 0; i < n; ++i) {
    const ArenaScope scope(arena);
    Context ctx{.arena = &arena};
    Batch batch;
    batch.add(tokens);
    const Tensor hidden = model.forward(ctx, batch);
    const Tensor logits = model.logits(ctx, hidden.slice(0, hidden.dim(0) - 1, 1));
    const float* p = logits.ptr<float>();
    tokens.push_back(static_cast<int32_t>(std::max_element(p, p + logits.numel()) - p));
    result.push_back(tokens.back());
  }
  return result;
}

TEST(Engine, ResultsDoNotDependOnWhatRunsBeside) {
  const LoadedModel loaded = mixed_model();
  std::vector<GenerationResult> alone;
  for (const GenerationRequest& request : requests()) {
    Engine engine(*loaded.model, {.max_sequences = 1, .prefill_chunk = 64});
    alone.push_back(engine.generate({request})[0]);
    EXPECT_EQ(static_cast<int64_t>(alone.back().tokens.size()), request.max_new_tokens);
  }
  for (const int64_t at_once : {2, 5, 64}) {
    for (const int64_t page : {4, 16, 64, 128, 256}) {
      Engine engine(*loaded.model, {.max_sequences = at_once,
                                    .page_size = page,
                                    .prefill_chunk = 64,
                                    .prefill_tokens = 128});
      const auto results = engine.generate(requests());
      for (size_t i = 0; i < results.size(); ++i) {
        EXPECT_EQ(results[i].tokens, alone[i].tokens)
            << "request " << i << ", " << at_once << " at once";
        EXPECT_EQ(results[i].reason, FinishReason::kLength);
        EXPECT_EQ(results[i].log_probabilities.size(), results[i].tokens.size());
        // On the CPU to the last bit.
        EXPECT_EQ(results[i].log_probabilities, alone[i].log_probabilities) << i;
      }
      EXPECT_EQ(engine.cache().open_sequences(), 0);
      EXPECT_EQ(engine.cache().pages_in_use(), 0);
    }
  }
}

TEST(Engine, GreedyIsTheFullForwardsLargestLogit) {
  const LoadedModel loaded = mixed_model();
  for (GenerationRequest& request : requests()) {
    request.sampling.temperature = 0.0F;
    const auto expected =
        greedy_by_full_forward(*loaded.model, request.prompt, request.max_new_tokens);
    Engine engine(*loaded.model,
                  {.max_sequences = 2, .cache_values = Dtype::kF32, .prefill_chunk = 64});
    EXPECT_EQ(engine.generate({request})[0].tokens, expected) << request.prompt.size();
  }
}

/// The log-probabilities of `tokens` after `prompt` under the model's full forward, no cache.
std::vector<double> full_log_probabilities(Model& model, std::vector<int32_t> prompt,
                                           const std::vector<int32_t>& tokens) {
  const auto first = static_cast<int64_t>(prompt.size()) - 1;
  prompt.insert(prompt.end(), tokens.begin(), tokens.end());
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(prompt);
  const Tensor logits = model.logits(ctx, model.forward(ctx, batch));
  std::vector<double> result;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const float* row = logits.ptr<float>() + (first + static_cast<int64_t>(i)) * logits.dim(1);
    double sum = 0.0;
    for (int64_t v = 0; v < logits.dim(1); ++v) {
      sum += std::exp(static_cast<double>(row[v]));
    }
    result.push_back(row[tokens[i]] - std::log(sum));
  }
  return result;
}

// A bf16 cache moves every key and value by up to 2^-9 of itself, and with it logits by a few times
// that (the bound of one layer stands in attention_pages_test.cc): log-probabilities stay within
// 0.05 of the full forward's here, those of an fp32 cache within 1e-4. An fp8 cache moves them by
// up to 2^-4.
TEST(Engine, LogProbabilitiesStayNearTheFullForwards) {
  const LoadedModel loaded = mixed_model();
  const struct {
    Dtype values;
    double bound;
  } rows[] = {{Dtype::kF32, 1e-4}, {Dtype::kBF16, 0.05}, {Dtype::kF8E4M3, 0.4}};
  for (const auto& row : rows) {
    Engine engine(*loaded.model,
                  {.max_sequences = 4, .cache_values = row.values, .prefill_chunk = 64});
    double worst = 0.0;
    const auto results = engine.generate(requests());
    for (size_t i = 0; i < results.size(); ++i) {
      const auto expected =
          full_log_probabilities(*loaded.model, requests()[i].prompt, results[i].tokens);
      for (size_t t = 0; t < expected.size(); ++t) {
        worst = larger_error(worst, std::abs(expected[t] - results[i].log_probabilities[t]));
      }
    }
    EXPECT_LE(worst, row.bound) << dtype_name(row.values);
    EXPECT_GT(worst, 0.0);
  }
}

// Prompts read the keys and values that they have written as single tokens read them: in fp8 too
// answers do not depend on how prompts are cut, but for the rounding of sums in another order,
// which now and then moves a number to the next of its type.
TEST(Engine, PromptsCutOtherwiseGiveTheSameInEveryCache) {
  const LoadedModel loaded = attention_model();
  for (const Dtype values : {Dtype::kF32, Dtype::kBF16, Dtype::kF8E4M3}) {
    const auto answers = [&](int64_t chunk) {
      Engine engine(*loaded.model, {.cache_values = values, .prefill_chunk = chunk});
      return engine.generate(requests());
    };
    const auto cut = answers(64);
    const auto whole = answers(512);
    double worst = 0.0;
    for (size_t i = 0; i < cut.size(); ++i) {
      EXPECT_EQ(cut[i].tokens, whole[i].tokens) << dtype_name(values) << " " << i;
      for (size_t t = 0; t < cut[i].log_probabilities.size(); ++t) {
        worst = larger_error(worst,
                             std::abs(cut[i].log_probabilities[t] - whole[i].log_probabilities[t]));
      }
    }
    EXPECT_LE(worst, 0.01F) << dtype_name(values);
  }
}

TEST(Engine, TheSeedAndTheStreamDecide) {
  const LoadedModel loaded = mixed_model();
  Engine engine(*loaded.model);
  GenerationRequest request{.prompt = prompt_of(9, 1), .max_new_tokens = 24};
  request.sampling.temperature = 1.0F;
  GenerationRequest other_stream = request;
  other_stream.stream = 1;
  GenerationRequest other_seed = request;
  other_seed.seed = 1;
  const auto results = engine.generate({request, request, other_stream, other_seed});
  EXPECT_EQ(results[0].tokens, results[1].tokens);
  EXPECT_NE(results[0].tokens, results[2].tokens);
  EXPECT_NE(results[0].tokens, results[3].tokens);
}

TEST(Engine, StopsAtAStopToken) {
  const LoadedModel loaded = mixed_model();
  Engine engine(*loaded.model);
  GenerationRequest request{.prompt = prompt_of(20, 3), .max_new_tokens = 12};
  const auto whole = engine.generate({request})[0].tokens;
  request.stop_ids = {whole[4]};
  const size_t at =
      static_cast<size_t>(std::find(whole.begin(), whole.end(), whole[4]) - whole.begin());
  const GenerationResult stopped = engine.generate({request})[0];
  EXPECT_EQ(stopped.reason, FinishReason::kStop);
  EXPECT_EQ(stopped.tokens, std::vector<int32_t>(whole.begin(), whole.begin() + at));
}

TEST(Engine, CancellingFreesEverything) {
  const LoadedModel loaded = mixed_model();
  Engine engine(*loaded.model, {.max_sequences = 2, .prefill_chunk = 64});
  const auto all = requests();
  const auto by_callback = [&] {
    GenerationRequest request = all[7];
    request.on_token = [n = 0](int32_t) mutable { return ++n < 3; };
    return request;
  }();
  const auto first = engine.submit(by_callback);
  const auto second = engine.submit(all[8]);
  const auto third = engine.submit(all[9]);
  engine.step();
  EXPECT_EQ(engine.running(), 2);
  EXPECT_EQ(engine.waiting(), 1);
  engine.cancel(second);
  engine.cancel(third);
  while (!engine.finished(first)) {
    engine.step();
  }
  EXPECT_EQ(engine.take(first).tokens.size(), 3U);
  EXPECT_EQ(engine.take(second).reason, FinishReason::kCancelled);
  EXPECT_EQ(engine.take(third).reason, FinishReason::kCancelled);
  EXPECT_FALSE(engine.step());
  EXPECT_EQ(engine.cache().pages_in_use(), 0);
  EXPECT_EQ(engine.cache().open_sequences(), 0);
}

TEST(Engine, ShortMemoryQueuesAndImpossibleRequestsAreErrors) {
  const LoadedModel loaded = mixed_model();
  const CachePlan plan(*loaded.model, {.page_size = 16, .piece_tokens = 64, .values = Dtype::kF32});
  const EngineConfig small{.max_sequences = 8,
                           .memory_bytes = 2 * plan.sequence_bytes(160),
                           .page_size = 16,
                           .prefill_chunk = 64};
  Engine engine(*loaded.model, small);
  Engine roomy(*loaded.model, {.max_sequences = 8, .prefill_chunk = 64});
  EXPECT_LT(engine.cache().capacity(), 8);
  const auto results = engine.generate(requests());
  const auto expected = roomy.generate(requests());
  for (size_t i = 0; i < results.size(); ++i) {
    EXPECT_EQ(results[i].tokens, expected[i].tokens);
  }
  EXPECT_LE(engine.cache().bytes(), small.memory_bytes);
  EXPECT_THROW(engine.submit({.prompt = prompt_of(500, 1), .max_new_tokens = 10}), Error);
  EXPECT_THROW(engine.submit({.prompt = prompt_of(500, 1), .max_new_tokens = 100}), Error);
  EXPECT_THROW(engine.submit({.prompt = {}, .max_new_tokens = 1}), Error);
  EXPECT_THROW(engine.submit({.prompt = {96}, .max_new_tokens = 1}), Error);
  EXPECT_THROW(engine.submit({.prompt = {1}, .max_new_tokens = 0}), Error);
  EXPECT_THROW(Engine(*loaded.model, {.memory_bytes = 100}), Error);
  EXPECT_THROW(Engine(*loaded.model, {.prefill_chunk = 65}), Error);
}

/// Answers that outgrow a small cache: as long ones as there is room for alone.
std::vector<GenerationRequest> growing_requests() {
  std::vector<GenerationRequest> list;
  for (const int64_t length : {40, 5, 64, 90, 1, 33, 17, 70}) {
    GenerationRequest request;
    request.prompt = prompt_of(length, static_cast<int64_t>(list.size()));
    request.max_new_tokens = 150 - length;
    request.sampling.temperature = list.size() % 2 == 0 ? 0.0F : 0.9F;
    request.sampling.frequency = list.size() % 3 == 0 ? 0.2F : 0.0F;
    request.logprobs = static_cast<int64_t>(list.size()) % 3;
    request.seed = 5;
    request.stream = list.size();
    list.push_back(std::move(request));
  }
  return list;
}

/// Memory for windows and slots of 8 sequences, and for the tokens of `whole` of 150.
int64_t memory_of(const Model& model, Dtype values, int64_t whole) {
  const CachePlan plan(model,
                       {.page_size = 4, .max_tokens = 150, .piece_tokens = 64, .values = values});
  const int64_t tokens = 152 * plan.lasting_bytes_per_token();  // in whole pages
  return 8 * (plan.sequence_bytes(150) - tokens) + whole * tokens;
}

class Preemption : public ::testing::TestWithParam<bool> {};

// Requests begin with room for what they have; the youngest are sent back and read again.
TEST_P(Preemption, ChangesNoAnswer) {
  const bool deterministic = GetParam();
  const LoadedModel loaded = mixed_model();
  const EngineConfig roomy{.max_sequences = 8,
                           .page_size = 4,
                           .max_tokens = 150,
                           .cache_values = Dtype::kF32,
                           .prefill_chunk = 64};
  EngineConfig small = roomy;
  small.memory_bytes = memory_of(*loaded.model, Dtype::kF32, 3);
  small.admission = Admission::kAsNeeded;
  small.reserve_tokens = 6;
  small.deterministic = deterministic;
  Engine engine(*loaded.model, small);
  Engine never(*loaded.model, roomy);
  std::vector<Engine::Ticket> tickets;
  for (GenerationRequest& request : growing_requests()) {
    tickets.push_back(engine.submit(std::move(request)));
  }
  int64_t most = 0;
  int64_t steps = 0;
  while (engine.step()) {
    most = std::max(most, engine.running());
    ASSERT_LT(++steps, 100'000);
  }
  EXPECT_GT(most, 3);  // more than there is room for whole
  const auto expected = never.generate(growing_requests());
  int64_t preemptions = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const GenerationResult result = engine.take(tickets[i]);
    preemptions += result.preemptions;
    EXPECT_EQ(result.preemptions > 0, result.recomputed_tokens > 0);
    EXPECT_EQ(result.tokens, expected[i].tokens) << i;
    EXPECT_EQ(result.reason, expected[i].reason);
    EXPECT_EQ(result.likeliest.size(), expected[i].likeliest.size());
    EXPECT_EQ(expected[i].preemptions, 0);
    if (deterministic) {
      EXPECT_EQ(result.log_probabilities, expected[i].log_probabilities) << i;
    } else {
      for (size_t t = 0; t < result.tokens.size(); ++t) {
        EXPECT_NEAR(result.log_probabilities[t], expected[i].log_probabilities[t], 1e-4) << i;
      }
    }
    if (i == 0) {
      EXPECT_EQ(result.preemptions, 0);  // the oldest goes on
    }
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_LE(engine.cache().bytes(), small.memory_bytes);
  EXPECT_EQ(engine.cache().pages_in_use(), 0);
  EXPECT_EQ(engine.cache().open_sequences(), 0);
}

INSTANTIATE_TEST_SUITE_P(Engine, Preemption, ::testing::Values(false, true),
                         [](const auto& row) { return row.param ? "deterministic" : "plain"; });

TEST(Engine, WhatIsSentBackCanBeCancelled) {
  const LoadedModel loaded = mixed_model();
  Engine engine(*loaded.model, {.max_sequences = 8,
                                .memory_bytes = memory_of(*loaded.model, Dtype::kBF16, 2),
                                .page_size = 4,
                                .max_tokens = 150,
                                .prefill_chunk = 64,
                                .admission = Admission::kAsNeeded,
                                .reserve_tokens = 0});
  std::vector<Engine::Ticket> tickets;
  for (GenerationRequest& request : growing_requests()) {
    tickets.push_back(engine.submit(std::move(request)));
  }
  int64_t running = 0;
  do {
    running = engine.running();
    ASSERT_TRUE(engine.step());
  } while (engine.running() >= running);  // until one is sent back
  for (const Engine::Ticket ticket : tickets) {
    engine.cancel(ticket);
    EXPECT_EQ(engine.take(ticket).reason, FinishReason::kCancelled);
  }
  EXPECT_FALSE(engine.step());
  EXPECT_EQ(engine.cache().pages_in_use(), 0);
  EXPECT_THROW(Engine(*loaded.model, {.reserve_tokens = -1}), Error);
}

TEST(Engine, AnswersEndWhereThePositionsDo) {
  const LoadedModel loaded = mixed_model();  // of 512 positions
  Engine engine(*loaded.model);
  const auto results = engine.generate({{.prompt = prompt_of(508, 1), .max_new_tokens = 100},
                                        {.prompt = prompt_of(512, 1), .max_new_tokens = 100}});
  EXPECT_EQ(results[0].tokens.size(), 5U);
  EXPECT_EQ(results[1].tokens.size(), 1U);
  EXPECT_EQ(results[0].reason, FinishReason::kLength);
  EXPECT_THROW(engine.submit({.prompt = prompt_of(513, 1), .max_new_tokens = 1}), Error);
}

// The same tokens as of a request that lowers its logits itself, whatever runs beside it; its
// log-probabilities are those of the model's logits.
TEST(Engine, TokensThatWereThereArePenalised) {
  const LoadedModel loaded = mixed_model();
  const SamplingConfig rows[] = {{.repetition = 1.8F},
                                 {.presence = 1.5F},
                                 {.frequency = 0.8F},
                                 {.temperature = 0.7F, .frequency = -2.0F},
                                 {.temperature = 0.9F,
                                  .top_k = 30,
                                  .min_p = 0.01F,
                                  .repetition = 0.8F,
                                  .presence = -0.5F,
                                  .frequency = 0.3F}};
  std::vector<GenerationRequest> penalised, plain, by_hand;
  for (const SamplingConfig& config : rows) {
    GenerationRequest request{.prompt = prompt_of(30, 5), .max_new_tokens = 40, .stop_ids = {}};
    request.sampling = config;
    request.seed = 3;
    penalised.push_back(request);
    SamplingConfig& free = request.sampling;
    free.repetition = 1.0F;
    free.presence = free.frequency = 0.0F;
    plain.push_back(request);
    auto had = std::make_shared<std::vector<int32_t>>(request.prompt);
    request.on_logits = [=, prompt = request.prompt.size()](std::span<float> logits) {
      for (int32_t token = 0; token < 96; ++token) {
        const auto count =
            std::count(had->begin() + static_cast<ptrdiff_t>(prompt), had->end(), token);
        float& x = logits[static_cast<size_t>(token)];
        if (std::find(had->begin(), had->end(), token) != had->end()) {
          x = x > 0 ? x / config.repetition : x * config.repetition;
        }
        x -= config.frequency * static_cast<float>(count) + (count > 0 ? config.presence : 0.0F);
      }
    };
    request.on_token = [=](int32_t token) {
      had->push_back(token);
      return true;
    };
    by_hand.push_back(std::move(request));
  }
  Engine engine(*loaded.model, {.prefill_chunk = 64});
  const auto expected = engine.generate(by_hand);
  const auto others = engine.generate(plain);
  std::vector<GenerationRequest> mixed = requests();
  mixed.insert(mixed.begin() + 3, penalised.begin(), penalised.end());
  const auto results = engine.generate(mixed);
  const auto without = engine.generate(requests());
  for (size_t i = 0; i < expected.size(); ++i) {
    const GenerationResult& result = results[i + 3];
    EXPECT_EQ(result.tokens, expected[i].tokens) << i;
    EXPECT_NE(result.tokens, others[i].tokens) << i;
    const auto logs = full_log_probabilities(*loaded.model, penalised[i].prompt, result.tokens);
    for (size_t t = 0; t < logs.size(); ++t) {
      EXPECT_NEAR(result.log_probabilities[t], logs[t], 0.05) << i;
    }
  }
  EXPECT_EQ(results[0].log_probabilities, without[0].log_probabilities);
  EXPECT_EQ(results.back().tokens, without.back().tokens);
}

TEST(Engine, GivesTheLikeliestTokensBesideTheChosen) {
  const LoadedModel loaded = mixed_model();
  std::vector<GenerationRequest> list = requests();
  for (size_t i = 0; i < list.size(); ++i) {
    list[i].logprobs = std::array<int64_t, 4>{0, 1, 5, 20}[i % 4];
  }
  Engine engine(*loaded.model, {.prefill_chunk = 64});
  const auto results = engine.generate(list);
  const auto without = engine.generate(requests());
  for (size_t i = 0; i < list.size(); ++i) {
    const GenerationResult& result = results[i];
    EXPECT_EQ(result.tokens, without[i].tokens);
    const auto wanted = static_cast<size_t>(list[i].logprobs);
    ASSERT_EQ(result.likeliest.size(), result.tokens.size() * wanted);
    for (size_t t = 0; t < result.tokens.size() && wanted > 0; ++t) {
      const auto beside = std::span(result.likeliest).subspan(t * wanted, wanted);
      EXPECT_TRUE(std::is_sorted(beside.begin(), beside.end(), [](const auto& a, const auto& b) {
        return a.log_probability > b.log_probability;
      }));
      EXPECT_NEAR(result.log_probabilities[t], without[i].log_probabilities[t], 1e-5);
      EXPECT_LE(result.log_probabilities[t], beside[0].log_probability);
      if (list[i].sampling.temperature == 0.0F) {
        EXPECT_EQ(result.tokens[t], beside[0].token);
        EXPECT_EQ(result.log_probabilities[t], beside[0].log_probability);
      }
    }
  }
  GenerationRequest all{.prompt = {1}, .max_new_tokens = 1, .stop_ids = {}};
  all.logprobs = kMostRanked + 1;
  EXPECT_THROW(engine.submit(all), Error);
  all.logprobs = -1;
  EXPECT_THROW(engine.submit(all), Error);
  all.logprobs = 0;
  all.sampling.repetition = 0.0F;
  EXPECT_THROW(engine.submit(all), Error);
}

TEST(Engine, LogitsMayBeSeenAndChanged) {
  const LoadedModel loaded = mixed_model();
  Engine engine(*loaded.model);
  GenerationRequest request{.prompt = prompt_of(5, 2), .max_new_tokens = 4};
  request.on_logits = [](std::span<float> logits) { logits[42] = 1e4F; };
  EXPECT_EQ(engine.generate({request})[0].tokens, std::vector<int32_t>({42, 42, 42, 42}));
}

}  // namespace
}  // namespace cambium
