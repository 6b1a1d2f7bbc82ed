// Merging checkpoints: the weighted mean of models of the same shape.
#pragma once

#include "model/weights.h"

namespace cambium {

/// The mean of `models`, every parameter by itself, with `weights` that need not sum to 1 (empty =
/// all alike). Error where the models differ in more than their weights. The family is the first's.
LoadedModel merge_models(const std::vector<Model*>& models, const std::vector<double>& weights);

}  // namespace cambium
