#include "ops/sampling/sampling.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "ops/testing.h"

namespace cambium {
namespace {

/// Shares of the tokens drawn at evenly spaced uniforms: the distribution up to 1 / draws.
std::vector<double> shares(const std::vector<float>& logits, const SamplingConfig& config) {
  constexpr int kDraws = 10000;
  std::vector<double> share(logits.size());
  for (int i = 0; i < kDraws; ++i) {
    const auto token = sample_token(logits, config, (i + 0.5) / kDraws);
    share[static_cast<size_t>(token)] += 1.0 / kDraws;
  }
  return share;
}

// Rows of logits, a configuration and a uniform for each.
struct Batch {
  int64_t vocabulary = 0;
  std::vector<float> logits{};  // (rows, vocabulary)
  std::vector<SamplingConfig> configs{};
  std::vector<double> uniforms{};

  std::span<const float> row(size_t r) const {
    const auto width = static_cast<size_t>(vocabulary);
    return std::span(logits).subspan(r * width, width);
  }
};

// Whether the definition draws this token of the row where the uniform or a cut moves by as much as
// sums of weights in fp32 may be off.
bool is_drawn_nearby(std::span<const float> row, const SamplingConfig& config, double uniform,
                     int32_t token) {
  constexpr double kOff = 2e-6;
  for (const double u : {uniform, uniform - kOff, uniform + kOff}) {
    for (const double p : {0.0, -kOff, kOff}) {
      SamplingConfig moved = config;
      moved.top_p = config.top_p < 1.0F
                        ? std::clamp(static_cast<float>(config.top_p * (1 + p)), 1e-30F, 1.0F)
                        : 1.0F;
      for (const double m : {0.0, -kOff, kOff}) {
        moved.min_p = std::clamp(static_cast<float>(config.min_p * (1 + m)), 0.0F, 1.0F);
        if (sample_token(row, moved, std::clamp(u, 0.0, std::nextafter(1.0, 0.0))) == token) {
          return true;
        }
      }
    }
  }
  return false;
}

// The tokens that the CUDA device draws, of logits in f32 and in bf16, are those of the definition:
// all but a few where the uniform stands on the border of two tokens, and then one of the two. Log
// probabilities are those of the definition.
void expect_cuda_draws_as_defined(const Batch& batch) {
  const auto rows = static_cast<int64_t>(batch.configs.size());
  const auto count = batch.configs.size();
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    Batch stored = batch;
    if (type == Dtype::kBF16) {
      std::transform(stored.logits.begin(), stored.logits.end(), stored.logits.begin(),
                     testing::as_bf16);
    }
    const testing::CudaContext cuda(type);
    const OwnedTensor logits(type, {rows, batch.vocabulary}, false, Device::kCuda);
    copy(logits.view, Tensor::of(stored.logits.data(), {rows, batch.vocabulary}));
    std::vector<int32_t> tokens(count);
    std::vector<float> logs(count);
    sample_tokens(cuda.ctx, logits.view, batch.configs, batch.uniforms, tokens, logs);
    size_t moved = 0;
    for (size_t r = 0; r < count; ++r) {
      const auto row = stored.row(r);
      ASSERT_TRUE(tokens[r] >= 0 && tokens[r] < batch.vocabulary) << tokens[r] << " in row " << r;
      const int32_t expected = sample_token(row, batch.configs[r], batch.uniforms[r]);
      if (tokens[r] != expected) {
        ++moved;
        EXPECT_TRUE(is_drawn_nearby(row, batch.configs[r], batch.uniforms[r], tokens[r]))
            << "row " << r << " gives " << tokens[r] << ", not " << expected;
      }
      const double log = token_log_probability(row, tokens[r]);
      if (std::isnan(log)) {
        EXPECT_TRUE(std::isnan(logs[r])) << r;
      } else {
        EXPECT_NEAR(logs[r], log, 3e-6 * std::max(1.0, std::abs(log))) << r;
      }
    }
    EXPECT_LE(moved, 1 + count / 50);
    std::vector<int32_t> again(count);
    std::vector<float> again_logs(count);
    sample_tokens(cuda.ctx, logits.view, batch.configs, batch.uniforms, again, again_logs);
    EXPECT_EQ(again, tokens) << "two runs differ";
  }
}

struct Row {
  const char* name;
  SamplingConfig config;
  std::vector<double> expected;  // probabilities of the tokens
};

std::ostream& operator<<(std::ostream& out, const Row& row) {
  return out << row.name;
}

class Distribution : public ::testing::TestWithParam<Row> {};

// Probabilities 0.1, 0.4, 0.2, 0.3 at temperature 1.
const std::vector<float> kLogits = {std::log(0.1F), std::log(0.4F), std::log(0.2F), std::log(0.3F)};

TEST_P(Distribution, IsWhatTheConfigurationSays) {
  const auto share = shares(kLogits, GetParam().config);
  for (size_t i = 0; i < share.size(); ++i) {
    EXPECT_NEAR(share[i], GetParam().expected[i], 2e-4) << "token " << i;
  }
}

TEST_P(Distribution, OnCuda) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  constexpr size_t kDraws = 2000;
  Batch batch{.vocabulary = 4};
  for (size_t i = 0; i < kDraws; ++i) {
    batch.logits.insert(batch.logits.end(), kLogits.begin(), kLogits.end());
    batch.uniforms.push_back((static_cast<double>(i) + 0.5) / kDraws);
  }
  batch.configs.assign(kDraws, GetParam().config);
  expect_cuda_draws_as_defined(batch);
}

INSTANTIATE_TEST_SUITE_P(
    Rows, Distribution,
    ::testing::Values(
        Row{"greedy", {.temperature = 0}, {0, 1, 0, 0}},
        Row{"plain", {.temperature = 1}, {0.1, 0.4, 0.2, 0.3}},
        Row{"cold", {.temperature = 0.5F}, {0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3}},
        Row{"top_k", {.temperature = 1, .top_k = 2}, {0, 4.0 / 7, 0, 3.0 / 7}},
        Row{"top_k_beyond", {.temperature = 1, .top_k = 9}, {0.1, 0.4, 0.2, 0.3}},
        Row{"top_p", {.temperature = 1, .top_p = 0.75F}, {0, 4.0 / 9, 2.0 / 9, 3.0 / 9}},
        Row{"top_p_least", {.temperature = 1, .top_p = 1e-6F}, {0, 1, 0, 0}},
        // The share is taken of what top_k left: 0.4 of 0.7 reaches 0.55.
        Row{"top_k_then_p", {.temperature = 1, .top_k = 2, .top_p = 0.55F}, {0, 1, 0, 0}},
        Row{"min_p", {.temperature = 1, .min_p = 0.6F}, {0, 4.0 / 7, 0, 3.0 / 7}},
        Row{"min_p_one", {.temperature = 1, .min_p = 1}, {0, 1, 0, 0}}),
    ::testing::PrintToStringParamName());

TEST(Sampling, EqualLogitsTakeTheLowestIndex) {
  const std::vector<float> flat(5, 2.0F);
  EXPECT_EQ(sample_token(flat, {}, 0.9), 0);
  EXPECT_EQ(shares(flat, {.temperature = 1, .top_k = 2}),
            shares(flat, {.temperature = 3, .top_k = 2}));
  EXPECT_NEAR(shares(flat, {.temperature = 1, .top_k = 2})[1], 0.5, 1e-9);
}

TEST(Sampling, ExtremeLogits) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const SamplingConfig warm = {.temperature = 1};
  EXPECT_EQ(sample_token(std::vector<float>{-1e30F, 1e30F, 0}, warm, 0.999999), 1);
  EXPECT_EQ(sample_token(std::vector<float>{-inf, -inf, -3}, warm, 0.0), 2);
  EXPECT_EQ(sample_token(std::vector<float>{1, inf, 2}, warm, 0.0), 1);
  EXPECT_EQ(sample_token(std::vector<float>{nan, 1, nan}, warm, 0.5), 1);
  EXPECT_EQ(sample_token(std::vector<float>{3, 1}, {.temperature = 1e-30F}, 0.5), 0);
  // The last draw below 1 must fall on a token that can be drawn.
  EXPECT_EQ(sample_token(std::vector<float>{0, 0, -inf}, warm, std::nextafter(1.0, 0.0)), 1);
}

TEST(SamplingCuda, ExtremeLogits) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const SamplingConfig warm = {.temperature = 1};
  const SamplingConfig two = {.temperature = 1, .top_k = 2};
  const auto draw = [](const std::vector<float>& logits, const SamplingConfig& config,
                       double uniform) {
    expect_cuda_draws_as_defined({.vocabulary = static_cast<int64_t>(logits.size()),
                                  .logits = logits,
                                  .configs = {config},
                                  .uniforms = {uniform}});
  };
  for (const double u : {0.0, 0.25, 0.5, 0.9, std::nextafter(1.0, 0.0)}) {
    draw({2, 2, 2, 2, 2}, {}, u);
    draw({2, 2, 2, 2, 2}, two, u);
    draw({2, 2, 2, 2, 2}, {.temperature = 1, .top_p = 0.5F}, u);
    draw({-1e30F, 1e30F, 0}, warm, u);
    draw({-inf, -inf, -3}, warm, u);
    draw({-inf, -inf, -inf}, warm, u);
    draw({nan, -inf, -inf}, {}, u);
    draw({1, inf, 2}, warm, u);
    draw({nan, 1, nan}, warm, u);
    draw({nan, 1, 3}, two, u);
    draw({3, 1}, {.temperature = 1e-30F}, u);
    draw({0, 0, -inf}, warm, u);
    draw({-0.0F, 0.0F}, {}, u);
    draw({7}, warm, u);
  }
  const testing::CudaContext cuda;
  const OwnedTensor broken = testing::cuda_tensor(Dtype::kF32, {1, 2}, {nan, nan});
  std::vector<int32_t> token(1);
  std::vector<float> log(1);
  EXPECT_THROW(sample_tokens(cuda.ctx, broken.view, std::vector<SamplingConfig>(1),
                             std::vector<double>(1), token, log),
               Error);
}

TEST(Sampling, LogProbability) {
  EXPECT_NEAR(token_log_probability(kLogits, 2), std::log(0.2), 1e-6);
  const std::vector<float> shifted = {1000.0F, 1001.0F};
  EXPECT_NEAR(token_log_probability(shifted, 0), -std::log(1.0 + std::exp(1.0)), 1e-12);
}

// Rows of every kind by every instruction set: the tokens of the definition, its log probabilities.
TEST(SampleTokens, MatchTheDefinition) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr int64_t kRows = 8;
  constexpr int64_t kVocabulary = 1237;
  auto values = testing::draw({{{kRows, kVocabulary}, -6, 6}})[0];
  const auto set = [&](size_t row, size_t at, float x) { values[row * kVocabulary + at] = x; };
  set(1, 1236, 20);
  set(2, 100, 7);
  set(2, 900, 7);  // the first of equals
  set(3, 5, kInf);
  set(4, 7, kNan);
  for (size_t i = 0; i < kVocabulary; ++i) {
    set(5, i, i == 60 ? -3 : -kInf);
  }
  const OwnedTensor logits(Dtype::kF32, {kRows, kVocabulary});
  std::copy(values.begin(), values.end(), logits.view.ptr<float>());
  const SamplingConfig greedy;
  const SamplingConfig warm{.temperature = 0.8F, .top_k = 40, .top_p = 0.9F};
  const std::vector<SamplingConfig> configs{greedy, greedy, greedy, warm,
                                            greedy, greedy, warm,   {.temperature = 1}};
  const std::vector<double> uniforms{0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.3, 0.999};
  Arena arena;
  std::vector<int32_t> expected(kRows);
  std::vector<float> expected_log(kRows);
  sample_tokens({.arena = &arena, .reference = true}, logits.view, configs, uniforms, expected,
                expected_log);
  EXPECT_EQ(expected[1], 1236);
  EXPECT_EQ(expected[2], 100);
  EXPECT_EQ(expected[3], 5);
  EXPECT_EQ(expected[5], 60);
  testing::for_each_isa([&] {
    std::vector<int32_t> tokens(kRows);
    std::vector<float> logs(kRows);
    sample_tokens({.arena = &arena}, logits.view, configs, uniforms, tokens, logs);
    EXPECT_EQ(tokens, expected);
    for (size_t r = 0; r < kRows; ++r) {
      if (std::isnan(expected_log[r])) {
        EXPECT_TRUE(std::isnan(logs[r])) << r;
      } else {
        EXPECT_NEAR(logs[r], expected_log[r], 2e-6F) << r;
      }
    }
  });
  if (testing::on_cuda()) {
    const float* all = logits.view.ptr<float>();
    expect_cuda_draws_as_defined({.vocabulary = kVocabulary,
                                  .logits = {all, all + logits.view.numel()},
                                  .configs = configs,
                                  .uniforms = uniforms});
  }
}

// Rows of every kind, 2,000 in all.
struct RandomRows {
  int64_t vocabulary, rows;
};

std::ostream& operator<<(std::ostream& out, const RandomRows& c) {
  return out << c.rows << "_of_" << c.vocabulary;
}

class SampleRandomRows : public ::testing::TestWithParam<RandomRows> {};

TEST_P(SampleRandomRows, OnCuda) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  const auto [vocabulary, rows] = GetParam();
  std::mt19937_64 random(static_cast<uint64_t>(vocabulary));
  const auto pick = [&](auto... values) {
    const std::common_type_t<decltype(values)...> list[] = {values...};
    return list[random() % sizeof...(values)];
  };
  Batch batch{.vocabulary = vocabulary};
  batch.logits.reserve(static_cast<size_t>(rows * vocabulary));
  for (int64_t r = 0; r < rows; ++r) {
    // Flat and steep rows; many equal logits; a share that cannot be drawn; NaN among them.
    const float spread = pick(0.0F, 1.0F, 6.0F, 20.0F);
    const bool steps = pick(0, 0, 1) != 0;
    const float lost = pick(0.0F, 0.0F, 0.7F);
    const float nothing = pick(0.0F, 0.0F, 0.0F, 0.1F);
    for (int64_t i = 0; i < vocabulary; ++i) {
      const uint64_t bits = random();
      const auto share = [&](int at) {
        return static_cast<float>(bits >> at & 0xfffffU) * 0x1p-20F;
      };
      float x = (2 * share(0) - 1) * spread;
      x = steps ? std::round(2 * x) / 2 : x;
      if (i != r % vocabulary) {
        x = share(20) < lost ? -std::numeric_limits<float>::infinity() : x;
        x = share(40) < nothing ? std::numeric_limits<float>::quiet_NaN() : x;
      }
      batch.logits.push_back(x);
    }
    batch.configs.push_back({.temperature = pick(0.0F, 0.3F, 0.8F, 1.0F, 1.5F),
                             .top_k = pick(0, 0, 1, 40, 1000, 1500, 20000),
                             .top_p = pick(1.0F, 1.0F, 0.95F, 0.5F, 1e-3F),
                             .min_p = pick(0.0F, 0.0F, 0.02F, 0.5F)});
    batch.uniforms.push_back(std::uniform_real_distribution<double>(0.0, 1.0)(random));
  }
  expect_cuda_draws_as_defined(batch);
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, SampleRandomRows,
                         ::testing::Values(RandomRows{1, 200}, RandomRows{5, 880},
                                           RandomRows{1000, 800}, RandomRows{32000, 96},
                                           RandomRows{151936, 24}),
                         ::testing::PrintToStringParamName());

// Logits that were there before: 0 in the prompt alone, 1 once in the output, 2 three times.
TEST(Penalties, AreWhatTheConfigurationSays) {
  const std::vector<float> logits = {2, -2, 4, 1};
  const std::vector<SeenToken> seen = {{0, 0}, {1, 1}, {2, 3}};
  const struct {
    SamplingConfig config;
    std::vector<float> expected;
  } rows[] = {{{}, {2, -2, 4, 1}},
              {{.repetition = 2}, {1, -4, 2, 1}},
              {{.repetition = 0.5F}, {4, -1, 8, 1}},
              {{.presence = 0.5F}, {2, -2.5F, 3.5F, 1}},
              {{.frequency = 0.25F}, {2, -2.25F, 3.25F, 1}},
              {{.frequency = -0.25F}, {2, -1.75F, 4.75F, 1}},
              {{.repetition = 2, .presence = 1, .frequency = 0.5F}, {1, -5.5F, -0.5F, 1}}};
  std::vector<SamplingConfig> configs;
  std::vector<float> all, expected;
  for (const auto& row : rows) {
    configs.push_back(row.config);
    all.insert(all.end(), logits.begin(), logits.end());
    expected.insert(expected.end(), row.expected.begin(), row.expected.end());
  }
  const auto count = static_cast<int64_t>(configs.size());
  const std::vector<std::span<const SeenToken>> lists(configs.size(), seen);
  Arena arena;
  for (const bool reference : {false, true}) {
    std::vector<float> values = all;
    penalise_tokens({.arena = &arena, .reference = reference},
                    Tensor::of(values.data(), {count, 4}), configs, lists);
    EXPECT_EQ(values, expected);
  }
  if (testing::on_cuda()) {
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {  // bf16 holds these numbers
      const testing::CudaContext cuda(type);
      const OwnedTensor on_device(type, {count, 4}, false, Device::kCuda);
      copy(on_device.view, Tensor::of(all.data(), {count, 4}));
      penalise_tokens(cuda.ctx, on_device.view, configs, lists);
      EXPECT_EQ(elements_of(on_device.view), expected);
    }
  }
}

// Long lists, empty ones among them, of logits in any form.
TEST(Penalties, OnCudaAreTheDefinitions) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  constexpr int64_t kRows = 5;
  constexpr int64_t kVocabulary = 4099;
  const auto drawn = testing::draw({{{kRows, kVocabulary}, -6, 6}})[0];
  std::vector<float> values(drawn.begin(), drawn.end());
  std::vector<std::vector<SeenToken>> lists(kRows);
  for (const auto& [row, length] : {std::pair{0, 4099}, {1, 1}, {3, 511}, {4, 513}}) {
    for (int32_t i = 0; i < length; ++i) {
      lists[static_cast<size_t>(row)].push_back({(i * 7 + row) % int32_t{kVocabulary}, i % 5});
    }
  }
  const std::vector<std::span<const SeenToken>> seen(lists.begin(), lists.end());
  const std::vector<SamplingConfig> configs(
      kRows, {.repetition = 1.3F, .presence = 0.7F, .frequency = -0.2F});
  const testing::CudaContext cuda;
  const OwnedTensor on_device(Dtype::kF32, {kRows, kVocabulary}, false, Device::kCuda);
  copy(on_device.view, Tensor::of(values.data(), {kRows, kVocabulary}));
  penalise_tokens(cuda.ctx, on_device.view, configs, seen);
  const std::vector<float> found = elements_of(on_device.view);
  Arena arena;
  penalise_tokens({.arena = &arena}, Tensor::of(values.data(), {kRows, kVocabulary}), configs,
                  seen);
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_NEAR(found[i], values[i], 1e-6) << i;
  }
}

struct Ranks {
  std::vector<float> log_probabilities;
  std::vector<RankedToken> likeliest;
};

Ranks rank_rows_of(const Context& ctx, const Tensor& logits, const std::vector<int32_t>& tokens,
                   const std::vector<int32_t>& wanted) {
  constexpr RankedToken kUntouched{-7, -7.0F};
  Ranks ranks{std::vector<float>(tokens.size(), -7.0F),
              std::vector<RankedToken>(tokens.size() * kMostRanked, kUntouched)};
  rank_tokens(ctx, logits, tokens, wanted, ranks.log_probabilities, ranks.likeliest);
  return ranks;
}

void expect_near(float found, float expected, size_t row) {
  if (std::isfinite(expected)) {
    EXPECT_NEAR(found, expected, 3e-6 * std::max(1.0F, std::abs(expected))) << row;
  } else {
    EXPECT_TRUE(found == expected || (std::isnan(found) && std::isnan(expected)))
        << found << " is not " << expected << " in row " << row;
  }
}

void expect_same(const Ranks& found, const Ranks& expected) {
  for (size_t r = 0; r < expected.log_probabilities.size(); ++r) {
    expect_near(found.log_probabilities[r], expected.log_probabilities[r], r);
    for (size_t i = r * kMostRanked; i < (r + 1) * kMostRanked; ++i) {
      ASSERT_EQ(found.likeliest[i].token, expected.likeliest[i].token)
          << "row " << r << ", rank " << i % kMostRanked;
      expect_near(found.likeliest[i].log_probability, expected.likeliest[i].log_probability, r);
    }
  }
}

TEST(RankTokens, GivesTheLikeliestFirst) {
  std::vector<float> logits = kLogits;
  Arena arena;
  const Ranks ranks = rank_rows_of({.arena = &arena}, Tensor::of(logits.data(), {1, 4}), {0}, {3});
  EXPECT_NEAR(ranks.log_probabilities[0], std::log(0.1), 1e-6);
  const std::pair<int32_t, double> expected[] = {{1, 0.4}, {3, 0.3}, {2, 0.2}};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(ranks.likeliest[i].token, expected[i].first);
    EXPECT_NEAR(ranks.likeliest[i].log_probability, std::log(expected[i].second), 1e-6);
  }
  EXPECT_EQ(ranks.likeliest[3].token, -7);  // no more than wanted
}

// Rows of every kind by the definition, every instruction set and CUDA.
class RankRandomRows : public ::testing::TestWithParam<int64_t> {};

TEST_P(RankRandomRows, MatchTheDefinition) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr size_t kRows = 9;
  const int64_t vocabulary = GetParam();
  const auto width = static_cast<size_t>(vocabulary);
  const auto drawn = testing::draw({{{int64_t{kRows}, vocabulary}, -6, 6}})[0];
  std::vector<float> values;
  for (const double x : drawn) {
    values.push_back(testing::as_bf16(x));  // the same in both types, with equals among them
  }
  for (size_t i = 0; i < width; ++i) {
    values[1 * width + i] = 2.0F;
    values[2 * width + i] = i % 3 == 1 ? values[2 * width + i] : -kInf;
    values[3 * width + i] = i % 2 == 0 ? kNan : values[3 * width + i];
    values[4 * width + i] = -kInf;
    values[5 * width + i] = kNan;
  }
  values[6 * width] = kInf;
  values[7 * width + width / 2] = -0.0F;
  const auto most = static_cast<int32_t>(std::min(vocabulary, kMostRanked));
  const std::vector<int32_t> wanted = {most, most, most, most, most, most, 1, 0, -1};
  std::vector<int32_t> tokens;
  for (size_t r = 0; r < kRows; ++r) {
    tokens.push_back(static_cast<int32_t>(r * 37 % width));
  }
  Arena arena;
  const Tensor logits = Tensor::of(values.data(), {int64_t{kRows}, vocabulary});
  const Ranks expected = rank_rows_of({.arena = &arena, .reference = true}, logits, tokens, wanted);
  EXPECT_EQ(expected.likeliest[kMostRanked].token, 0);
  EXPECT_EQ(expected.log_probabilities[8], -7.0F);
  testing::for_each_isa(
      [&] { expect_same(rank_rows_of({.arena = &arena}, logits, tokens, wanted), expected); });
  if (testing::on_cuda()) {
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
      SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
      const testing::CudaContext cuda(type);
      const OwnedTensor on_device(type, {int64_t{kRows}, vocabulary}, false, Device::kCuda);
      copy(on_device.view, logits);
      expect_same(rank_rows_of(cuda.ctx, on_device.view, tokens, wanted), expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, RankRandomRows,
                         ::testing::Values(1, 5, 19, 1000, 4099, 151936));

TEST(SamplingErrors, OfPenaltiesAndRanksNameWhatIsWrong) {
  std::vector<float> logits = {1, 2, 3};
  const Tensor row = Tensor::of(logits.data(), {1, 3});
  Arena arena;
  const Context ctx{.arena = &arena};
  const auto penalise = [&](const SamplingConfig& config, SeenToken token) {
    const std::vector<SeenToken> seen = {token};
    const std::vector<std::span<const SeenToken>> lists = {seen};
    return testing::error_of([&] { penalise_tokens(ctx, row, std::span(&config, 1), lists); });
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(penalise({.repetition = 0}, {0, 0}), ::testing::HasSubstr("repetition penalty"));
  EXPECT_THAT(penalise({.repetition = nan}, {0, 0}), ::testing::HasSubstr("repetition penalty"));
  EXPECT_THAT(penalise({.presence = 2.5F}, {0, 0}), ::testing::HasSubstr("presence penalty"));
  EXPECT_THAT(penalise({.frequency = nan}, {0, 0}), ::testing::HasSubstr("frequency penalty"));
  EXPECT_THAT(penalise({}, {3, 0}), ::testing::HasSubstr("expected tokens in 0..2, got 3"));
  EXPECT_THAT(penalise({}, {-1, 0}), ::testing::HasSubstr("expected tokens in 0..2, got -1"));
  EXPECT_EQ(logits, std::vector<float>({1, 2, 3}));
  const auto rank = [&](int32_t token, int32_t wanted) {
    return testing::error_of([&] { rank_rows_of(ctx, row, {token}, {wanted}); });
  };
  EXPECT_THAT(rank(0, 4), ::testing::HasSubstr("expected 0 to 3 likeliest tokens"));
  EXPECT_THAT(rank(0, -2), ::testing::HasSubstr("expected 0 to 3 likeliest tokens"));
  EXPECT_THAT(rank(3, 1), ::testing::HasSubstr("expected a token in 0..2, got 3"));
}

TEST(SamplingErrors, NameTheOption) {
  const std::vector<float> logits = {1, 2};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(sample_token({}, {}, 0.5), Error);
  EXPECT_THROW(sample_token(logits, {.temperature = -1}, 0.5), Error);
  EXPECT_THROW(sample_token(logits, {.temperature = nan}, 0.5), Error);
  EXPECT_THROW(sample_token(logits, {.top_k = -1}, 0.5), Error);
  EXPECT_THROW(sample_token(logits, {.top_p = 0}, 0.5), Error);
  EXPECT_THROW(sample_token(logits, {.min_p = 2}, 0.5), Error);
  EXPECT_THROW(sample_token(logits, {}, 1.0), Error);
  EXPECT_THROW(sample_token(std::vector<float>{nan, nan}, {}, 0.5), Error);
  EXPECT_THROW(token_log_probability(logits, 2), Error);
}

}  // namespace
}  // namespace cambium
