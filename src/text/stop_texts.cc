#include "text/stop_texts.h"

#include <algorithm>
#include <utility>

namespace cambium {

size_t first_stop(std::string_view text, std::span<const std::string> stops) {
  size_t at = text.size();
  for (const std::string& stop : stops) {
    at = std::min(at, text.find(stop));
  }
  return at;
}

StopWatch::StopWatch(const Tokenizer& tokenizer, std::vector<std::string> stops)
    : decoder_(tokenizer), stops_(std::move(stops)) {
  for (const std::string& stop : stops_) {
    longest_ = std::max(longest_, stop.size());
  }
}

bool StopWatch::push(int32_t token) {
  if (stops_.empty()) {
    return true;
  }
  end_ += decoder_.push(token);
  if (first_stop(end_, stops_) < end_.size()) {
    return false;
  }
  if (end_.size() > longest_) {
    end_.erase(0, end_.size() - longest_);
  }
  return true;
}

}  // namespace cambium
