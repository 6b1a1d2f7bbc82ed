// How fast the engine answers many requests: continuous batching with real admission, as
// `generate --input` runs it.
#pragma once

#include "eval/report/summary.h"
#include "eval/step_cost.h"
#include "serve/engine.h"

namespace cambium {

struct EngineSpeedConfig {
  int64_t input = 1024;    // tokens of a prompt, random
  int64_t output = 128;    // tokens of an answer, greedy, none cut short
  int64_t sequences = 32;  // requests, all there from the beginning
  /// `max_sequences` and `memory_bytes` are limits: no more is taken than these requests need. 0
  /// bytes = on a GPU what is free but for a workspace, on the CPU what they need.
  EngineConfig engine{};
  uint64_t seed = 1;
};

struct EngineSpeed {
  int64_t largest_batch = 0;  // sequences in one step
  int64_t steps = 0;
  int64_t input_tokens = 0, output_tokens = 0;
  int64_t preemptions = 0, recomputed_tokens = 0;
  double seconds = 0.0;      // from the first submission to the last token
  double output_rate = 0.0;  // tokens/s
  /// Of the steps that decode the largest batch and nothing else.
  double steady_rate = 0.0;
  double steady_share = 0.0;  // of what the machine's limits allow
  /// Over requests: from submission, and from being admitted. Median, least and largest are in
  /// milliseconds, and so are the others.
  Measured first_token{}, first_token_admitted{};
  /// Over the gaps between the tokens of each sequence.
  double token_median = 0.0, token_p99 = 0.0;
  double step_bytes = 0.0, step_flops = 0.0;  // of a mean step
  double share = 0.0;                         // of the limits, over all steps
  bool finite = true;       // whether all chosen tokens had a probability that is a number
  int64_t cache_bytes = 0;  // allocated
  /// On a GPU what is in use at the end (nothing is given back before); on the CPU the process's
  /// largest resident memory.
  int64_t peak_bytes = 0;
};

EngineSpeed measure_engine(Model& model, const EngineSpeedConfig& config,
                           const MachineLimits& limits);

}  // namespace cambium
