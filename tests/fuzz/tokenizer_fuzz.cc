// tokenizer.json, used on texts that reach every part.
#include "text/tokenizer.h"

#include "fuzz/fuzzing.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::allow_errors([&] {
    const Tokenizer tokenizer = Tokenizer::parse(fuzz::text_of(data, size));
    for (const char* text : {"Hello, wörld! 12345\n\n  e\xcc\x81 \xf0\x9f\x98\x80 <|end|>", "",
                             "\xff\xfe\x80 a\t'll  ▁x"}) {
      fuzz::allow_errors([&] {
        const auto ids = tokenizer.encode(text, true);
        tokenizer.decode(ids, false);
        tokenizer.decode(ids, true);
      });
    }
  });
}
