#include "ops/sampling/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
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
