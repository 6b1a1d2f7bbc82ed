// The `post_processor` part of tokenizer.json: the tokens put before and behind a text.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <vector>

namespace cambium::text {

struct PostProcessor {
  std::vector<int32_t> before;
  std::vector<int32_t> after;
};

/// `spec` is the JSON value (null allowed). Throws Error for a type that is not supported.
PostProcessor make_post_processor(const nlohmann::json& spec);

}  // namespace cambium::text
