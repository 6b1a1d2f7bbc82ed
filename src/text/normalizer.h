// The `normalizer` part of tokenizer.json: rewrites text before it is split.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace cambium::text {

/// Empty: the identity.
using Normalizer = std::function<std::string(std::string)>;

/// `spec` is the JSON value (null allowed). Throws Error for a type that is not supported.
Normalizer make_normalizer(const nlohmann::json& spec);

}  // namespace cambium::text
