// Bytes as text of 64 letters, as RFC 4648 (section 4) has them.
#pragma once

#include <string>
#include <string_view>

namespace cambium {

std::string to_base64(std::string_view bytes);
/// Padding at the end may be missing. Error that begins with `what` for any other letter, a wrong
/// length, and bits at the end that belong to no byte.
std::string from_base64(std::string_view text, std::string_view what);

}  // namespace cambium
