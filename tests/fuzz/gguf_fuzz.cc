#include "files/gguf.h"
#include "fuzz/fuzzing.h"
#include "model/gguf/gguf_config.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::InputFile file(fuzz::text_of(data, size));
  return fuzz::allow_errors([&] {
    const Gguf gguf(file.path());
    for (const GgufTensor& tensor : gguf.tensors()) {
      if (gguf.find(tensor.name) == nullptr) {
        std::abort();
      }
      gguf.release(tensor);
    }
    fuzz::allow_errors([&] { read_gguf_model(gguf); });
    for (const auto& [key, value] : gguf.metadata()) {
      fuzz::allow_errors([&, &key = key] { gguf.text(key); });
      fuzz::allow_errors([&, &key = key] { gguf.texts(key); });
      fuzz::allow_errors([&, &key = key] { gguf.integers(key); });
      fuzz::allow_errors([&, &key = key] { gguf.numbers(key); });
    }
  });
}
