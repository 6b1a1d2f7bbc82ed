#include "ops/kernel.h"

#include "tensor/arena.h"

namespace cambium {

void* Launch::scratch(int64_t bytes) const {
  return arena->allocate(bytes);
}

}  // namespace cambium
