#include "ops/sampling/sampling.h"

#include <algorithm>

#include "ops/checks.h"
#include "ops/run.h"
#include "ops/sampling/sampling_kernels.h"
#include "ops/sampling/sampling_ref.h"

namespace cambium {
namespace {

void check(size_t logits, const SamplingConfig& config, double uniform) {
  expect(logits > 0, "[sample_token] expected logits, got none");
  check_sampling(config);
  expect(uniform >= 0.0 && uniform < 1.0, "[sample_token] expected uniform in [0, 1), got {}",
         uniform);
}

}  // namespace

void check_sampling(const SamplingConfig& config) {
  expect(config.temperature >= 0.0F && std::isfinite(config.temperature),
         "[sample_token] expected temperature >= 0, got {}", config.temperature);
  expect(config.top_k >= 0, "[sample_token] expected top_k >= 0 (0 = all), got {}", config.top_k);
  expect(config.top_p > 0.0F && config.top_p <= 1.0F,
         "[sample_token] expected 0 < top_p <= 1, got {}", config.top_p);
  expect(config.min_p >= 0.0F && config.min_p <= 1.0F,
         "[sample_token] expected 0 <= min_p <= 1, got {}", config.min_p);
}

void sample_tokens(const Context& ctx, const Tensor& logits,
                   std::span<const SamplingConfig> configs, std::span<const double> uniforms,
                   std::span<int32_t> tokens, std::span<float> log_probabilities) {
  expect_rows("sample_tokens", "logits (R, V)", logits, 2);
  const auto rows = static_cast<size_t>(logits.dim(0));
  expect(configs.size() == rows && uniforms.size() == rows && tokens.size() == rows &&
             log_probabilities.size() == rows,
         "[sample_tokens] expected a configuration, a uniform and two results for each of {} rows",
         rows);
  for (size_t r = 0; r < rows; ++r) {
    check(static_cast<size_t>(logits.dim(1)), configs[r], uniforms[r]);
  }
  const ArenaScope scope(ctx.host_arena());
  auto* config = ctx.shared_scratch<SamplingConfig>(logits.dim(0));
  auto* uniform = ctx.shared_scratch<double>(logits.dim(0));
  auto* token = ctx.shared_scratch<int32_t>(logits.dim(0));
  auto* log_probability = ctx.shared_scratch<float>(logits.dim(0));
  std::copy(configs.begin(), configs.end(), config);
  std::copy(uniforms.begin(), uniforms.end(), uniform);
  run<sample_rows>(ctx, logits, [&]<class T>() {
    return SampleRows<T>{view<T>(logits), config, uniform, token, log_probability};
  });
  ctx.synchronize();
  expect(std::all_of(token, token + rows, [](int32_t t) { return t >= 0; }),
         "[sample_token] every logit is NaN; the model's weights or state are broken");
  std::copy_n(token, rows, tokens.begin());
  std::copy_n(log_probability, rows, log_probabilities.begin());
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
