#include "ops/sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/sampling/sampling_kernels.h"
#include "ops/sampling/sampling_ref.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

void check(size_t logits, const SamplingConfig& config, double uniform) {
  expect(logits > 0, "[sample_token] expected logits, got none");
  check_sampling(config);
  expect(uniform >= 0.0 && uniform < 1.0, "[sample_token] expected uniform in [0, 1), got {}",
         uniform);
}

}  // namespace

void expect_chosen(int32_t token) {
  expect(token >= 0, "[sample_token] every logit is NaN; the model's weights or state are broken");
}

void check_sampling(const SamplingConfig& config) {
  expect(config.temperature >= 0.0F && std::isfinite(config.temperature),
         "[sample_token] expected temperature >= 0, got {}", config.temperature);
  expect(config.top_k >= 0, "[sample_token] expected top_k >= 0 (0 = all), got {}", config.top_k);
  expect(config.top_p > 0.0F && config.top_p <= 1.0F,
         "[sample_token] expected 0 < top_p <= 1, got {}", config.top_p);
  expect(config.min_p >= 0.0F && config.min_p <= 1.0F,
         "[sample_token] expected 0 <= min_p <= 1, got {}", config.min_p);
  expect(config.repetition > 0.0F && std::isfinite(config.repetition),
         "[sample_token] expected a repetition penalty above 0 (1 = none), got {}",
         config.repetition);
  expect(std::abs(config.presence) <= 2.0F,
         "[sample_token] expected a presence penalty from -2 to 2, got {}", config.presence);
  expect(std::abs(config.frequency) <= 2.0F,
         "[sample_token] expected a frequency penalty from -2 to 2, got {}", config.frequency);
}

void queue_samples(const Context& ctx, const Tensor& logits,
                   std::span<const SamplingConfig> configs, std::span<const double> uniforms,
                   std::span<const int32_t> places, const SampledTokens& chosen) {
  expect_rows("queue_samples", "logits (R, V)", logits, 2);
  const auto rows = static_cast<size_t>(logits.dim(0));
  const Tensor& tokens = chosen.tokens;
  const Tensor& log_probabilities = chosen.log_probabilities;
  expect(configs.size() == rows && uniforms.size() == rows && places.size() == rows,
         "[queue_samples] expected a configuration, a uniform and a place for each of {} rows",
         rows);
  expect(tokens.dtype == Dtype::kI32 && log_probabilities.dtype == Dtype::kF32 &&
             tokens.rank == 1 && tokens.same_shape(log_probabilities) &&
             tokens.device == logits.device && log_probabilities.device == logits.device,
         "[queue_samples] expected tokens (N) i32 and log-probabilities (N) f32 beside {}, got {} "
         "and {}",
         logits, tokens, log_probabilities);
  for (size_t r = 0; r < rows; ++r) {
    check(static_cast<size_t>(logits.dim(1)), configs[r], uniforms[r]);
    expect(places[r] >= 0 && places[r] < tokens.dim(0),
           "[queue_samples] expected places in 0..{}, got {}", tokens.dim(0) - 1, places[r]);
  }
  const auto* config = ctx.to_device(configs);
  const auto* uniform = ctx.to_device(uniforms);
  const auto* place = ctx.to_device(places);
  run<sample_rows>(ctx, logits, [&]<class T>() {
    return SampleRows<T>{view<T>(logits),
                         config,
                         uniform,
                         tokens.ptr<int32_t>(),
                         log_probabilities.ptr<float>(),
                         place};
  });
}

void sample_tokens(const Context& ctx, const Tensor& logits,
                   std::span<const SamplingConfig> configs, std::span<const double> uniforms,
                   std::span<int32_t> tokens, std::span<float> log_probabilities) {
  const int64_t rows = logits.dim(0);
  expect(tokens.size() == static_cast<size_t>(rows) && log_probabilities.size() == tokens.size(),
         "[sample_tokens] expected two results for each of {} rows", rows);
  const ArenaScope scope(*ctx.arena);
  const ArenaScope shared(ctx.host_arena());
  std::vector<int32_t> places(tokens.size());
  std::iota(places.begin(), places.end(), 0);
  const SampledTokens chosen{ctx.arena->empty(Dtype::kI32, {rows}),
                             ctx.arena->empty(Dtype::kF32, {rows})};
  queue_samples(ctx, logits, configs, uniforms, places, chosen);
  copy(Tensor::of(Dtype::kI32, Device::kCpu, {&rows, 1}, tokens.data()), chosen.tokens);
  copy(Tensor::of(Dtype::kF32, Device::kCpu, {&rows, 1}, log_probabilities.data()),
       chosen.log_probabilities);
  std::for_each(tokens.begin(), tokens.end(), expect_chosen);
}

void penalise_tokens(const Context& ctx, const Tensor& logits,
                     std::span<const SamplingConfig> configs,
                     std::span<const std::span<const SeenToken>> seen) {
  expect_rows("penalise_tokens", "logits (R, V)", logits, 2);
  const int64_t rows = logits.dim(0);
  expect(configs.size() == static_cast<size_t>(rows) && seen.size() == static_cast<size_t>(rows),
         "[penalise_tokens] expected a configuration and a list of tokens for each of {} rows",
         rows);
  size_t total = 0;
  for (const auto& tokens : seen) {
    for (const SeenToken& s : tokens) {
      expect(s.token >= 0 && s.token < logits.dim(1),
             "[penalise_tokens] expected tokens in 0..{}, got {}", logits.dim(1) - 1, s.token);
    }
    total += tokens.size();
  }
  if (total == 0) {
    return;
  }
  std::vector<int64_t> start(1, 0);
  std::vector<SeenToken> all;
  all.reserve(total);
  for (size_t r = 0; r < seen.size(); ++r) {
    check_sampling(configs[r]);
    all.insert(all.end(), seen[r].begin(), seen[r].end());
    start.push_back(static_cast<int64_t>(all.size()));
  }
  const auto* config = ctx.to_device(configs);
  const auto* starts = ctx.to_device(std::span<const int64_t>(start));
  const auto* tokens = ctx.to_device(std::span<const SeenToken>(all));
  run<penalise_rows>(ctx, logits, [&]<class T>() {
    return PenaliseRows<T>{view<T>(logits), config, starts, tokens};
  });
}

void rank_tokens(const Context& ctx, const Tensor& logits, std::span<const int32_t> tokens,
                 std::span<const int32_t> wanted, std::span<float> log_probabilities,
                 std::span<RankedToken> likeliest) {
  expect_rows("rank_tokens", "logits (R, V)", logits, 2);
  const auto rows = static_cast<size_t>(logits.dim(0));
  const size_t most = rows == 0 ? 0 : likeliest.size() / rows;
  expect(tokens.size() == rows && wanted.size() == rows && log_probabilities.size() == rows &&
             likeliest.size() == rows * most,
         "[rank_tokens] expected a token, a number and results for each of {} rows", rows);
  for (size_t r = 0; r < rows; ++r) {
    const int64_t limit = std::min({kMostRanked, static_cast<int64_t>(most), logits.dim(1)});
    expect(wanted[r] >= -1 && wanted[r] <= limit,
           "[rank_tokens] expected 0 to {} likeliest tokens (-1 = not this row), got {}", limit,
           wanted[r]);
    expect(wanted[r] < 0 || (tokens[r] >= 0 && tokens[r] < logits.dim(1)),
           "[rank_tokens] expected a token in 0..{}, got {}", logits.dim(1) - 1, tokens[r]);
  }
  if (std::all_of(wanted.begin(), wanted.end(), [](int32_t n) { return n < 0; })) {
    return;
  }
  const ArenaScope scope(ctx.host_arena());
  auto* token = ctx.shared_scratch<int32_t>(logits.dim(0));
  auto* count = ctx.shared_scratch<int32_t>(logits.dim(0));
  auto* log_probability = ctx.shared_scratch<float>(logits.dim(0));
  auto* ranked = ctx.shared_scratch<RankedToken>(logits.dim(0) * static_cast<int64_t>(most));
  std::copy(tokens.begin(), tokens.end(), token);
  std::copy(wanted.begin(), wanted.end(), count);
  run<rank_rows>(ctx, logits, [&]<class T>() {
    return RankRows<T>{view<T>(logits), token, count, static_cast<int64_t>(most),
                       log_probability, ranked};
  });
  ctx.synchronize();
  for (size_t r = 0; r < rows; ++r) {
    if (wanted[r] >= 0) {
      log_probabilities[r] = log_probability[r];
      std::copy_n(ranked + r * most, wanted[r], likeliest.data() + r * most);
    }
  }
}

int32_t sample_token(std::span<const float> logits, const SamplingConfig& config, double uniform) {
  check(logits.size(), config, uniform);
  return definition::draw(logits, config, uniform, definition::argmax(logits));
}

double token_log_probability(std::span<const float> logits, int32_t token) {
  expect(token >= 0 && static_cast<size_t>(token) < logits.size(),
         "[token_log_probability] expected a token in 0..{}, got {}",
         static_cast<int64_t>(logits.size()) - 1, token);
  return definition::log_probability(logits, token);
}

}  // namespace cambium
