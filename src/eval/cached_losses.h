// Losses on text that a model reads through a cache, as it does when it serves.
#pragma once

#include <vector>

#include "train/held_out.h"

namespace cambium {

/// What HeldOut::measure() gives, but that the model's keys and values go through a cache that
/// keeps them in `values`: every token reads those before it, and its own, from there, as a token
/// that is generated does. The teacher has no cache.
std::vector<LossSums> measure_cached(const HeldOut& documents, Model& model, Model* teacher,
                                     Dtype values);

}  // namespace cambium
