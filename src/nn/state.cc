#include "nn/state.h"

namespace cambium {

int64_t SlotPart::numel() const {
  int64_t n = 1;
  for (const int64_t size : shape) {
    n *= size;
  }
  return n;
}

int64_t StateLayout::bytes_per_sequence() const {
  int64_t values = 0;
  for (const SlotPart& part : slots) {
    values += part.numel();
  }
  return values * static_cast<int64_t>(sizeof(float));
}

}  // namespace cambium
