#include "ops/kernel.h"

#include "ops/run.h"
#include "tensor/arena.h"

namespace cambium {

void cuda_failed(const char* kernel, const Tensor& like, const Error& error) {
  throw Error(fmt::format("{}; {} was called with {}", error.what(), kernel, like));
}

void* Launch::scratch(int64_t bytes) const {
  return arena->allocate(bytes);
}

}  // namespace cambium
