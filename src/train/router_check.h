// What can be asked of a model's routers, known from its spec: plans are checked by it before
// anything is loaded.
#pragma once

#include "train/router_training.h"

namespace cambium {

/// Error that begins with `where` for what the model has no routers for: losses, or choice biases.
void expect_routers(const ModelSpec& spec, const RouterTraining& config, const std::string& where);

}  // namespace cambium
