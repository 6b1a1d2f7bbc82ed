#include "files/safetensors.h"
#include "fuzz/fuzzing.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::InputFile file(fuzz::text_of(data, size));
  return fuzz::allow_errors([&] {
    const SafeTensors tensors = SafeTensors::open(file.path());
    uint64_t sum = 0;
    for (const TensorEntry& entry : tensors.tensors()) {
      for (const std::byte byte : entry.bytes()) {
        sum += static_cast<uint64_t>(byte);
      }
      if (tensors.find(entry.name) != &entry) {
        std::abort();
      }
    }
    if (sum == UINT64_MAX || tensors.total_bytes() > size) {
      std::abort();
    }
  });
}
