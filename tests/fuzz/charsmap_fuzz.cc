// SentencePiece's precompiled normalisation, used on texts with short and long clusters.
#include "text/charsmap.h"

#include "fuzz/fuzzing.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::allow_errors([&] {
    const text::Charsmap map(fuzz::text_of(data, size));
    for (const char* text : {"A\xcc\x81 \xef\xac\x81 A\r\n\t\xc2\xa0", "", "\xff\xfe\x80 A",
                             "\xe0\xa4\x95\xe0\xa5\x8d\xe0\xa4\xb7\xf0\x9f\x98\x80"}) {
      map.normalise(text);
    }
  });
}
