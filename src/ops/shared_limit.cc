#include "ops/shared_limit.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string_view>
#include <system_error>

#include "base/error.h"

namespace cambium {

size_t shared_limit(size_t given, const char* kib) {
  if (kib == nullptr) {
    return given;
  }
  const std::string_view text = kib;
  uint32_t number = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), number);
  expect(status == std::errc() && end == text.data() + text.size() &&
             size_t{number} * 1024 >= kSharedOfAll,
         "[cuda] expected CAMBIUM_CUDA_SHARED, KiB of shared memory a block, from {} on, got '{}'",
         kSharedOfAll / 1024, text);
  return std::min(given, size_t{number} * 1024);
}

}  // namespace cambium
