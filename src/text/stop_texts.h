// Texts that end an answer and are no part of it.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace cambium {

/// Where the first of the stops begins in the text; its size where there is none.
size_t first_stop(std::string_view text, std::span<const std::string> stops);

/// Follows an answer token by token, wherever tokens cut the stops.
class StopWatch {
 public:
  StopWatch(const Tokenizer& tokenizer, std::vector<std::string> stops);

  /// Whether the answer goes on after this token: false once there is one of the stops.
  bool push(int32_t token);

 private:
  StreamDecoder decoder_;
  std::vector<std::string> stops_;
  size_t longest_ = 0;
  std::string end_;  // of the text: what a stop may begin in
};

}  // namespace cambium
