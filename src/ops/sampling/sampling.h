// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <span>

#include "ops/sampling/sampling_config.h"
#include "tensor/context.h"

namespace cambium {

/// Error unless every setting is in its range; NaN is in none. sample_tokens asks this of every
/// row; whoever takes requests asks it first.
void check_sampling(const SamplingConfig& config);

/// A token for each row of logits (R, V), and log softmax(logits)[token]. Row r is drawn as
/// configs[r] says; uniforms[r] in [0, 1) decides, and the caller draws it from (seed, position).
void sample_tokens(const Context& ctx, const Tensor& logits,
                   std::span<const SamplingConfig> configs, std::span<const double> uniforms,
                   std::span<int32_t> tokens, std::span<float> log_probabilities);

/// Where chosen tokens are kept: tokens (N), I32, and log softmax(logits)[token] (N), F32.
struct SampledTokens {
  Tensor tokens, log_probabilities;
};

/// The same without waiting for the device: what is chosen from row r goes to places[r] of
/// `chosen`, on the device of the logits; a token of -1 where every logit is NaN (on the CPU that
/// is an Error).
void queue_samples(const Context& ctx, const Tensor& logits,
                   std::span<const SamplingConfig> configs, std::span<const double> uniforms,
                   std::span<const int32_t> places, const SampledTokens& chosen);
/// Error where queue_samples() found no token.
void expect_chosen(int32_t token);

/// Lowers in place logits (R, V) of tokens that were there before, as configs[r] says. seen[r]: the
/// tokens of row r's prompt and output, each once; empty where nothing is penalised.
void penalise_tokens(const Context& ctx, const Tensor& logits,
                     std::span<const SamplingConfig> configs,
                     std::span<const std::span<const SeenToken>> seen);

/// Of the rows of logits (R, V) whose wanted[r] is not -1: log softmax(logits)[tokens[r]], and the
/// wanted[r] likeliest tokens with theirs, at likeliest[r * (likeliest.size() / R)] and after it.
/// Larger logits come first, the lower index among equals, NaN last.
void rank_tokens(const Context& ctx, const Tensor& logits, std::span<const int32_t> tokens,
                 std::span<const int32_t> wanted, std::span<float> log_probabilities,
                 std::span<RankedToken> likeliest);

/// One token from logits (V) in host memory. `uniform` in [0, 1) decides; the caller draws it from
/// (seed, position).
int32_t sample_token(std::span<const float> logits, const SamplingConfig& config, double uniform);

/// log softmax(logits)[token].
double token_log_probability(std::span<const float> logits, int32_t token);

}  // namespace cambium
