// Finding a string in another in linear time, whatever both are: std::string::find may compare the
// whole needle at every place.
#pragma once

#include <string.h>  // memmem is no part of <cstring>

#include <algorithm>
#include <string>
#include <string_view>

namespace cambium::jinja {

/// The first place of `sub` in `s` at or behind `from`, or npos.
inline size_t find_bytes(std::string_view s, std::string_view sub, size_t from = 0) {
  if (from > s.size()) {
    return std::string_view::npos;
  }
  const void* at = ::memmem(s.data() + from, s.size() - from, sub.data(), sub.size());
  return at == nullptr ? std::string_view::npos
                       : static_cast<size_t>(static_cast<const char*>(at) - s.data());
}

/// The last place of `sub` in `s`, or npos.
inline size_t rfind_bytes(std::string_view s, std::string_view sub) {
  const std::string back(s.rbegin(), s.rend());
  const std::string needle(sub.rbegin(), sub.rend());
  const size_t at = find_bytes(back, needle);
  return at == std::string_view::npos ? at : s.size() - sub.size() - at;
}

}  // namespace cambium::jinja
