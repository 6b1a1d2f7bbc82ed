// The `normalizer` part of tokenizer.json: rewrites text before it is split.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace cambium::text {

/// Empty: the identity.
using Normalizer = std::function<std::string(std::string)>;

/// Error when rewriting has made a text of more bytes than any use of it needs: a few steps that
/// each double what they find would else take all memory.
void expect_bounded(size_t bytes);

/// `spec` is the JSON value (null allowed). Throws Error for a type that is not supported.
Normalizer make_normalizer(const nlohmann::json& spec);

}  // namespace cambium::text
