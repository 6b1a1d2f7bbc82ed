// How fast a model runs: prefill and decode tokens/s at given context lengths, on the engine's own
// cache and forward.
#pragma once

#include <functional>
#include <vector>

#include "eval/report/summary.h"
#include "model/model.h"

namespace cambium {

struct ThroughputConfig {
  std::vector<int64_t> contexts = {512, 4096};  // tokens
  int64_t batch = 1;                            // sequences at once
  int64_t decode_tokens = 32;                   // steps timed after the context
  int64_t repeats = 3;
  int64_t prefill_chunk = 0;  // 0: 256, on a GPU as many as fill it
  Dtype cache_values = Dtype::kBF16;
  int64_t page_size = 0;  // CacheConfig::page_size
  /// false: nothing is prefilled; what sequences have behind them is zeros, which steps take as
  /// long with, and the first steps, that prepare the others, are not timed.
  bool prefill = true;
};

/// For each model and context: the median of `repeats`, with the least and the largest. The models
/// take turns, so that a change of the machine's speed meets all of them. The context's tokens are
/// arbitrary: what is computed does not depend on them.
std::vector<std::vector<SpeedSummary>> measure_throughput(const std::vector<Model*>& models,
                                                          const ThroughputConfig& config);

/// Calls f(position, tokens of each sequence) for each call that reads a context, or, of the calls
/// that decode, for the one in the middle.
void for_each_call(const Model& model, const ThroughputConfig& config, int64_t context, bool decode,
                   const std::function<void(int64_t, int64_t)>& f);

}  // namespace cambium
