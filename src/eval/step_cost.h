// What a forward call must at least move and compute, counted from the model's shapes, and how fast
// the machine does either: the floor that speeds are read against.
#pragma once

#include <algorithm>
#include <vector>

#include "model/model.h"

namespace cambium {

/// Bytes: weights once, of experts those that the tokens would meet by even chances, the keys and
/// values in reach, those written, states read and written. Activations stay in caches and are not
/// counted. Operations: two for each number of a matrix and token, and for each number of a key and
/// of a value that a query head meets.
struct StepCost {
  double bytes = 0.0;
  double flops = 0.0;

  StepCost& operator+=(const StepCost& other) {
    bytes += other.bytes;
    flops += other.flops;
    return *this;
  }
};

/// Experts that `tokens` tokens meet which go to `top` of them each by even chances.
double experts_met(double tokens, int64_t top, int64_t experts);

/// What a measured sequence reads at a position. Sequences differ: with the same token in each, a
/// layer's experts would be the few that this token goes to, and not those that the cost counts.
inline int32_t measured_token(int64_t sequence, int64_t position, int64_t vocab) {
  return static_cast<int32_t>((sequence * 10'007 + position * 37 + 11) % vocab);
}

/// Keys that tokens [position, position + tokens) see: each itself and, in a window (0 = none), at
/// most window - 1 before it and the sinks that it would not see so.
double keys_seen(int64_t position, int64_t tokens, int64_t window, int64_t sinks);

class StepCosts {
 public:
  /// The model has its weights. `values` is the type of keys and values in the cache.
  StepCosts(Model& model, Dtype values);

  /// Of a call over these segments of which `logit_rows` rows go through the head.
  StepCost of(const Segments& segments, int64_t logit_rows) const;
  /// Of a call over `sequences` pieces of `tokens` tokens from `position` on, each with its logits.
  StepCost of(int64_t sequences, int64_t position, int64_t tokens) const;
  double weight_bytes() const { return weight_bytes_ + head_bytes_; }

 private:
  struct Pages {
    int64_t window = 0;  // 0 = everything before
    int64_t sinks = 0;
    double token_bytes = 0.0;
    double key_flops = 0.0;       // of a token and a key
    double expanded_flops = 0.0;  // the same where keys and values come from latents
    double flops_of(int64_t tokens) const { return tokens == 1 ? key_flops : expanded_flops; }
  };
  struct Experts {
    int64_t top = 0;
    int64_t experts = 0;
    double bytes = 0.0;  // of all of them
  };
  void add_pages(const UnitSpec& unit, const StateLayout& layout, const IndexShape& index,
                 Dtype values);
  void add_segment(StepCost& cost, int64_t position, int64_t tokens) const;
  double expert_bytes(double tokens) const;

  double weight_bytes_ = 0.0;  // without embedding and head
  double head_bytes_ = 0.0;
  double row_bytes_ = 0.0;  // of the embedding
  double token_flops_ = 0.0;
  double head_flops_ = 0.0;  // a row of logits
  double slot_bytes_ = 0.0;  // of a sequence
  std::vector<Pages> pages_;
  std::vector<Experts> experts_;
};

struct MachineLimits {
  double bytes_per_second = 0.0;  // read and written by a copy
  double flops_per_second = 0.0;  // of a large product

  /// The least time of a call.
  double seconds(const StepCost& cost) const {
    return std::max(cost.bytes / bytes_per_second, cost.flops / flops_per_second);
  }
};

/// Measured on the device with all its threads: a copy that no cache holds, and a product of the
/// model's types.
MachineLimits measure_limits(const Model& model);

}  // namespace cambium
