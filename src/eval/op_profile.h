// Where the time of a step goes: each operation of a model's own forward call, timed where it
// stands, beside what it must move and compute.
#pragma once

#include <string>
#include <vector>

#include "eval/op_work.h"
#include "eval/report/summary.h"
#include "model/model.h"

namespace cambium {

struct OpProfileConfig {
  int64_t sequences = 1;   // that a step gives a token each
  int64_t context = 1024;  // tokens before it
  int64_t tokens = 512;    // of a prefill, of one sequence in one call
  int64_t repeats = 10;    // steps of each kind of measurement
  Dtype cache_values = Dtype::kBF16;
  int64_t page_size = 0;  // CacheConfig::page_size
};

/// The calls of a step that are alike: one kernel, one shape, and the same weights of other layers.
struct OpLine {
  std::string kernel;   // "matmul"
  std::string weights;  // "mixer.q_proj + mixer.k_proj", of any layer; may be empty
  std::string shape;
  int64_t calls = 0;  // a step
  double call_seconds = 0.0;
  double step_seconds = 0.0;  // of all of them
  StepCost cost;              // of one
  double share = 0.0;         // of what the machine's limits allow; 0 where its work is not known
};

struct StepProfile {
  bool decode = false;
  int64_t sequences = 0;
  int64_t context = 0;      // tokens before the step
  int64_t tokens = 0;       // of the step, of all sequences
  std::vector<OpLine> ops;  // what takes longest first
  double ops_seconds = 0.0;
  /// From the first operation to the last with nothing timed between them: on a GPU its own time,
  /// the host being ahead.
  double step_seconds = 0.0;
  double wall_seconds = 0.0;  // the whole call, host and all
  /// Whether the logits are numbers; where they are not, no token is sampled.
  bool finite = true;
};

/// A step that decodes, behind zeros, and a prefill, with the head and a greedy choice of tokens.
/// Each is run `repeats` times as it is, between two marks, and with every operation between marks
/// of its own, in turns; times are medians. On a GPU the device first copies memory for as long as
/// the host takes to queue the step, and what a pair of marks takes by itself is taken off.
StepProfile profile_decode(Model& model, const OpProfileConfig& config,
                           const MachineLimits& limits);
StepProfile profile_prefill(Model& model, const OpProfileConfig& config,
                            const MachineLimits& limits);

}  // namespace cambium
