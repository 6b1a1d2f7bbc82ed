// A model that has the sizes of a configuration and made-up numbers: what costs memory and time can
// be measured before anyone has trained or downloaded it.
#pragma once

#include "model/weights.h"

namespace cambium {

/// A model of `spec` whose matrices are kept as `storage` says. The numbers follow each parameter's
/// initial rule; those of a large parameter repeat after a million. What `share`, a model on
/// `device`, has under the same name and in the same shape is a view of its tensor, as
/// Weights::share makes it; it must outlive the result.
LoadedModel random_model(const ModelSpec& spec, MatrixStorage storage, uint64_t seed,
                         Device device = {}, Model* share = nullptr);

}  // namespace cambium
