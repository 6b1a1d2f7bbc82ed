// For tests: small models with every kind of state.
#pragma once

#include <string>
#include <vector>

#include "model/spec.h"

namespace cambium::testing {

/// Layers whose mixers are of these kinds: pages with and without a window and sinks, slots of each
/// mixer.
inline ModelSpec mixed_spec(const std::vector<std::string>& kinds) {
  ModelSpec spec;
  spec.family = "cambium";
  spec.vocab = 96;
  spec.width = 32;
  spec.rope = {.dim = 8};
  spec.max_positions = 512;
  const Options attention{
      {"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{8}}};
  for (const std::string& kind : kinds) {
    Options options = attention;
    if (kind == "sliding_window") {
      options.set("window", int64_t{24});
      options.set("sinks", int64_t{5});
    } else if (kind == "mamba") {
      options = {{"inner", int64_t{32}},
                 {"xb", int64_t{16}},
                 {"state", int64_t{8}},
                 {"dt_rank", int64_t{2}}};
    } else if (kind == "mamba2") {
      options = {{"heads", int64_t{4}},
                 {"head_dim", int64_t{8}},
                 {"state", int64_t{8}},
                 {"b_heads", int64_t{2}}};
    } else if (kind == "gated_delta_net") {
      options = {{"heads", int64_t{4}},
                 {"q_heads", int64_t{2}},
                 {"k_heads", int64_t{2}},
                 {"key_dim", int64_t{8}},
                 {"value_dim", int64_t{8}}};
    }
    spec.layers.push_back(decoder_layer({kind, options}, 48));
  }
  return spec;
}

}  // namespace cambium::testing
