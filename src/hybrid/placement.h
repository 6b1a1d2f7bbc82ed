// Which layers get the new mixer.
#pragma once

#include <cstdint>
#include <vector>

#include "hybrid/importance.h"

namespace cambium {

/// The `count` layers of lowest score, in layer order. Error when fewer were scored. Scoring what
/// is left after each stage with MMR and taking the lowest few is the H1 way of growing a hybrid.
std::vector<int64_t> place_lowest(const Importance& importance, int64_t count);

/// `count` of the layers that still have attention, spread evenly over the depth of the model.
std::vector<int64_t> place_uniform(const ModelSpec& spec, int64_t count);

/// How many more layers must be converted until `fraction` of all layers are (rounded to nearest).
int64_t layers_to_convert(const ModelSpec& spec, double fraction);

/// How many of the attention layers must go until the cache takes at most this many bytes a token
/// for as long as a sequence lives.
int64_t layers_for_cache_budget(const ModelSpec& spec, int64_t bytes_per_token);

}  // namespace cambium
