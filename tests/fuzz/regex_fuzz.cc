// The first line is the pattern, the rest the text it runs over.
#include <algorithm>

#include "fuzz/fuzzing.h"
#include "text/regex.h"
#include "text/unicode.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input = fuzz::text_of(data, size);
  const size_t end = std::min(input.find('\n'), input.size());
  const std::string subject = text::to_valid_utf8(input.substr(std::min(end + 1, input.size())));
  return fuzz::allow_errors([&] {
    const text::Regex regex(input.substr(0, end));
    size_t at = 0;
    size_t begin = 0;
    for (int found = 0; found < 64 && regex.find(subject, at, begin, at); ++found) {
      if (begin > at || at > subject.size()) {
        std::abort();
      }
      at += begin == at ? 1 : 0;
      while (at < subject.size() && (static_cast<uint8_t>(subject[at]) & 0xC0U) == 0x80U) {
        ++at;
      }
      if (at > subject.size()) {
        break;
      }
    }
  });
}
