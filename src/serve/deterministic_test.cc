// A deterministic engine: tokens and log-probabilities of a request are the same bits alone, in any
// batch, and after it was sent back to wait.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <utility>

#include "model/random_model.h"
#include "serve/engine.h"

namespace cambium {
namespace {

/// Layers as wide as the kernels for models want them.
ModelSpec spec_of(const std::vector<std::string>& kinds) {
  ModelSpec spec;
  spec.family = "cambium";
  spec.vocab = 200;
  spec.width = 128;
  spec.rope = {.dim = 64};
  spec.max_positions = 1024;
  for (const std::string& kind : kinds) {
    Options options{{"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{64}}};
    if (kind == "sliding_window") {
      options.set("window", int64_t{40});
      options.set("sinks", int64_t{9});
    } else if (kind == "mamba") {
      options = {{"inner", int64_t{128}},
                 {"xb", int64_t{64}},
                 {"state", int64_t{16}},
                 {"dt_rank", int64_t{8}}};
    } else if (kind == "mamba2") {
      options = {{"heads", int64_t{4}},
                 {"head_dim", int64_t{64}},
                 {"state", int64_t{64}},
                 {"b_heads", int64_t{2}},
                 {"norm_group", int64_t{64}}};
    } else if (kind == "gated_delta_net") {
      options = {{"heads", int64_t{4}},
                 {"q_heads", int64_t{2}},
                 {"k_heads", int64_t{2}},
                 {"key_dim", int64_t{64}},
                 {"value_dim", int64_t{64}}};
    } else if (kind == "kimi_delta") {
      options = {{"heads", int64_t{4}}, {"head_dim", int64_t{64}}, {"conv", int64_t{4}}};
    } else if (kind == "blocks") {
      options.set("index_heads", int64_t{2});
      options.set("index_dim", int64_t{128});
      options.set("index_top", int64_t{3});
      options.set("index_size", int64_t{64});
    } else if (kind == "parallel") {
      options.set("window", int64_t{40});
      options.set("recurrent", "lightning");
      options.set("recurrent.heads", int64_t{4});
      options.set("recurrent.head_dim", int64_t{64});
    }
    spec.layers.push_back(decoder_layer({kind == "blocks" ? "attention" : kind, options}, 320));
  }
  return spec;
}

GenerationRequest request_of(int64_t length, int64_t answer, size_t number) {
  GenerationRequest request;
  for (int64_t i = 0; i < length; ++i) {
    request.prompt.push_back(
        static_cast<int32_t>((static_cast<int64_t>(number) * 31 + i * i * 7 + i * 13) % 200));
  }
  request.max_new_tokens = answer;
  request.sampling.temperature = number % 2 == 0 ? 0.0F : 0.9F;
  request.sampling.frequency = number % 5 == 0 ? 0.2F : 0.0F;
  request.logprobs = static_cast<int64_t>(number) % 3;
  request.seed = 11;
  request.stream = number;
  return request;
}

/// 37 of them: prompts on both sides of chunks and pages, and a few that are long beside answers of
/// others.
std::vector<GenerationRequest> requests() {
  std::vector<GenerationRequest> list;
  for (size_t i = 0; i < 37; ++i) {
    const auto n = static_cast<int64_t>(i);
    const int64_t length = i == 5    ? 700
                           : i == 17 ? 505
                           : i == 30
                               ? 930
                               : std::array<int64_t, 8>{1, 15, 31, 32, 64, 65, 90, 129}[i % 8];
    list.push_back(request_of(length, 10 + n % 17, i));
  }
  return list;
}

struct Family {
  const char* name;
  std::vector<std::string> kinds;
  MatrixStorage storage;
  Device device;
};

std::ostream& operator<<(std::ostream& out, const Family& family) {
  return out << family.name << (family.device.kind == Device::kCpu ? "_cpu" : "_cuda")
             << (family.storage == MatrixStorage::kBF16 ? "_bf16" : "_f32");
}

class Deterministic : public ::testing::TestWithParam<Family> {
 protected:
  void SetUp() override {
    const Family& family = GetParam();
    if (family.device.kind == Device::kCuda && cuda_devices() == 0) {
      GTEST_SKIP() << why_no_cuda();
    }
    loaded_ = random_model(spec_of(family.kinds), family.storage, 7, family.device);
    config_.cache_values = family.storage == MatrixStorage::kBF16 ? Dtype::kBF16 : Dtype::kF32;
    config_.page_size = 4;
    config_.prefill_chunk = 128;
    config_.prefill_tokens = 256;
    config_.deterministic = true;
  }

  EngineConfig config_of(int64_t sequences) const {
    EngineConfig config = config_;
    config.max_sequences = sequences;
    return config;
  }
  std::vector<GenerationResult> alone(const std::vector<GenerationRequest>& all) {
    std::vector<GenerationResult> results;
    Engine engine(*loaded_.model, config_of(1));
    for (const GenerationRequest& request : all) {
      results.push_back(engine.generate({request})[0]);
    }
    return results;
  }

  LoadedModel loaded_;
  EngineConfig config_;
};

void expect_same(const GenerationResult& result, const GenerationResult& expected, size_t i) {
  EXPECT_EQ(result.tokens, expected.tokens) << "request " << i;
  EXPECT_EQ(result.log_probabilities, expected.log_probabilities) << "request " << i;
  ASSERT_EQ(result.likeliest.size(), expected.likeliest.size());
  for (size_t t = 0; t < result.likeliest.size(); ++t) {
    EXPECT_EQ(result.likeliest[t].token, expected.likeliest[t].token) << "request " << i;
    EXPECT_EQ(result.likeliest[t].log_probability, expected.likeliest[t].log_probability)
        << "request " << i;
  }
}

TEST_P(Deterministic, AnswersAreThoseOfRequestsAlone) {
  const auto expected = alone(requests());
  for (const int64_t at_once : {3, 37}) {
    SCOPED_TRACE(fmt::format("{} at once", at_once));
    Engine engine(*loaded_.model, config_of(at_once));
    const auto results = engine.generate(requests());
    for (size_t i = 0; i < results.size(); ++i) {
      EXPECT_EQ(static_cast<int64_t>(results[i].tokens.size()), requests()[i].max_new_tokens);
      expect_same(results[i], expected[i], i);
    }
  }
}

TEST_P(Deterministic, InterruptionsChangeNoBit) {
  constexpr int64_t kTokens = 150;  // of the longest
  std::vector<GenerationRequest> all;
  for (const int64_t length : {40, 5, 64, 90, 1, 33, 17, 70}) {
    all.push_back(request_of(length, kTokens - length, all.size()));
  }
  const auto count = static_cast<int64_t>(all.size());
  const auto expected = alone(all);
  EngineConfig config = config_of(count);
  config.max_tokens = kTokens;
  config.admission = Admission::kAsNeeded;
  config.reserve_tokens = 6;
  // What does not grow for all of them, and whole sequences' tokens for three.
  const CachePlan plan(*loaded_.model, cache_config(config));
  const int64_t tokens = 152 * plan.lasting_bytes_per_token();  // in whole pages
  config.memory_bytes = count * (plan.sequence_bytes(kTokens) - tokens) + 3 * tokens;
  Engine engine(*loaded_.model, config);
  const auto results = engine.generate(all);
  int64_t preemptions = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    preemptions += results[i].preemptions;
    expect_same(results[i], expected[i], i);
  }
  EXPECT_GT(preemptions, 0);
}

// Steps are queued before the tokens of those before are known, most as graphs: what was in a step
// too many, by its tokens, by who heard of them, or because it was sent back, leaves no trace.
TEST_P(Deterministic, WorkingAheadChangesNoBit) {
  std::vector<GenerationRequest> all = requests();
  std::vector<size_t> heard(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].sampling.frequency = 0.0F;
    all[i].logprobs = 0;
    all[i].max_new_tokens += 40;
    all[i].stop_ids = {static_cast<int32_t>(3 * i), static_cast<int32_t>(3 * i + 50)};
    if (i % 6 == 1) {
      all[i].on_token = [&count = heard[i]](int32_t) { return ++count < 9; };
    }
  }
  EngineConfig config = config_of(9);
  config.ahead = false;
  const auto expected = Engine(*loaded_.model, config).generate(all);
  config.ahead = true;
  for (const Admission admission : {Admission::kWhole, Admission::kAsNeeded}) {
    std::fill(heard.begin(), heard.end(), 0);
    config.admission = admission;
    config.reserve_tokens = 3;
    Engine engine(*loaded_.model, config);
    const auto results = engine.generate(all);
    int64_t ends[3] = {};
    for (size_t i = 0; i < results.size(); ++i) {
      expect_same(results[i], expected[i], i);
      EXPECT_EQ(results[i].reason, expected[i].reason) << "request " << i;
      ++ends[static_cast<size_t>(results[i].reason)];
    }
    EXPECT_GT(*std::min_element(ends, ends + 3), 0) << "not every way to end was seen";
    if (GetParam().device.kind == Device::kCuda) {
      EXPECT_GT(engine.step_counts().launched, engine.step_counts().made);
      EXPECT_GT(engine.step_counts().made, 0);
    }
  }
}

// A request that watches its logits, beside others and while steps are in the air.
TEST_P(Deterministic, WatchersMayComeAndGo) {
  std::vector<GenerationRequest> all = requests();
  all.resize(12);
  const auto expected = alone(all);  // some of them watch
  Engine engine(*loaded_.model, config_of(12));
  std::vector<Engine::Ticket> tickets;
  for (size_t i = 0; i < all.size(); ++i) {
    tickets.push_back(engine.submit(all[i]));
    engine.step();
  }
  const Engine::Ticket leaves = engine.submit(request_of(30, 50, 40));
  engine.step();
  engine.step();
  engine.cancel(leaves);
  while (engine.step()) {
  }
  for (size_t i = 0; i < all.size(); ++i) {
    expect_same(engine.take(tickets[i]), expected[i], i);
  }
  EXPECT_EQ(engine.take(leaves).reason, FinishReason::kCancelled);
  EXPECT_FALSE(engine.step());
}

/// How many of the expected tokens came before the first that is another one. Log-probabilities of
/// those are the expected ones within `tolerance`, where the result has any.
size_t agreeing(const GenerationResult& result, const GenerationResult& expected,
                double tolerance) {
  size_t same = 0;
  while (same < expected.tokens.size() && same < result.tokens.size() &&
         result.tokens[same] == expected.tokens[same]) {
    if (!result.log_probabilities.empty()) {
      EXPECT_NEAR(result.log_probabilities[same], expected.log_probabilities[same], tolerance)
          << "token " << same;
    }
    ++same;
  }
  return same;
}

// The kernels that a deterministic engine goes without, those of a mixer's whole step among them.
TEST_P(Deterministic, OtherwiseAnswersAreTheSameUpToRounding) {
  if (GetParam().device.kind == Device::kCpu) {
    GTEST_SKIP() << "the CPU's kernels are the same either way";
  }
  const bool narrow = GetParam().storage == MatrixStorage::kBF16;
  std::vector<GenerationRequest> all = requests();
  all.resize(16);
  for (GenerationRequest& request : all) {
    request.sampling = {.temperature = 0.0F};
    request.max_new_tokens = 24;
    request.logprobs = 1;
  }
  const auto expected = alone(all);
  EngineConfig config = config_of(7);
  config.deterministic = false;
  const auto watched = Engine(*loaded_.model, config).generate(all);
  for (GenerationRequest& request : all) {
    request.logprobs = 0;  // steps are queued ahead of each other
  }
  const auto ahead = Engine(*loaded_.model, config).generate(all);
  for (const auto& results : {watched, ahead}) {
    size_t same = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      same += agreeing(results[i], expected[i], narrow ? 0.1 : 1e-3);
    }
    EXPECT_GE(static_cast<double>(same),
              (narrow ? 0.5 : 0.95) * 24.0 * static_cast<double>(all.size()));
  }
}

std::vector<Family> families() {
  std::vector<Family> rows;
  for (const auto& [name, kinds] : std::vector<std::pair<const char*, std::vector<std::string>>>{
           {"attention", {"attention", "sliding_window", "attention"}},
           {"mamba", {"mamba", "attention", "mamba"}},
           {"mamba2", {"mamba2", "attention"}},
           {"gated_delta_net", {"gated_delta_net", "attention"}},
           {"kimi_delta", {"kimi_delta", "attention"}},
           {"parallel", {"parallel", "attention"}},
           {"blocks", {"blocks", "attention"}}}) {
    rows.push_back({name, kinds, MatrixStorage::kF32, Device::kCpu});
    rows.push_back({name, kinds, MatrixStorage::kF32, Device::kCuda});
    rows.push_back({name, kinds, MatrixStorage::kBF16, Device::kCuda});
  }
  return rows;
}
INSTANTIATE_TEST_SUITE_P(Families, Deterministic, ::testing::ValuesIn(families()),
                         ::testing::PrintToStringParamName());

}  // namespace
}  // namespace cambium
