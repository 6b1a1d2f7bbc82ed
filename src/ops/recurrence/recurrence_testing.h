// Recurrences as their mixers give them, for tests of kernels' shapes.
#pragma once

#include <cmath>

#include "ops/recurrence/recurrence.h"
#include "ops/stateful_testing.h"

namespace cambium::testing {

struct Heads {
  int64_t key_heads, heads, key_dim, dim;
};

inline StatefulCase linear(int64_t tokens, const Heads& h, bool weighted, bool delta,
                           bool per_channel) {
  // Keys of length 1 at most under the delta rule, without which the state may grow.
  const double key = delta ? 1.0 / std::sqrt(static_cast<double>(h.key_dim)) : 1.0;
  StatefulCase test;
  test.tokens = tokens;
  test.inputs = {{{tokens, h.key_heads, h.key_dim}},
                 {{tokens, h.key_heads, h.key_dim}, -key, key},
                 {{tokens, h.heads, h.dim}},
                 {{tokens, h.heads}, -0.5, 0.0, true, true},
                 {{tokens, h.heads}, 0.0, 1.0, weighted, true}};
  if (per_channel) {
    test.inputs[3].shape.push_back(h.key_dim);
  }
  test.of_tokens = {true, true, true, true, true};
  test.state_row = {h.heads, h.key_dim, h.dim};
  test.operation = [=](Context& ctx, const std::vector<Tensor>& in, const Segments& segments,
                       const Tensor& state) {
    return recurrence(ctx,
                      {.q = in[0],
                       .k = in[1],
                       .v = in[2],
                       .log_decay = in[3],
                       .weight = weighted ? in[4] : Tensor{},
                       .delta = delta},
                      segments, state);
  };
  return test;
}
inline StatefulCase lightning(int64_t tokens, const Heads& h) {
  return linear(tokens, h, false, false, false);
}
inline StatefulCase mamba2(int64_t tokens, const Heads& h) {
  return linear(tokens, h, true, false, false);
}
inline StatefulCase gated_delta_net(int64_t tokens, const Heads& h) {
  return linear(tokens, h, true, true, false);
}
inline StatefulCase kimi_delta(int64_t tokens, const Heads& h) {
  return linear(tokens, h, true, true, true);
}

}  // namespace cambium::testing
