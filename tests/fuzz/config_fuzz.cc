// config.json of every family, up to the model's parameters and state without their memory.
#include "fuzz/fuzzing.h"
#include "model/model.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::InputFile file(fuzz::text_of(data, size));
  return fuzz::allow_errors([&] {
    const ModelSpec spec = read_spec(file.path());
    if (spec.layers.size() <= 64) {
      Model model(spec);
      if (model.parameter_count() < 0) {
        std::abort();
      }
    }
  });
}
