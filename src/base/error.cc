#include "base/error.h"

#include <cstdio>
#include <cstdlib>

namespace cambium {

void check_failed(const char* file, int line, const char* condition, const std::string& message) {
  std::fprintf(stderr, "cambium: internal error at %s:%d: %s does not hold%s%s\n", file, line,
               condition, message.empty() ? "" : ": ", message.c_str());
  std::abort();
}

}  // namespace cambium
