#include "nn/state.h"

namespace cambium {
namespace {

int64_t bytes_of(const std::vector<Part>& parts) {
  int64_t sum = 0;
  for (const Part& part : parts) {
    sum += part.bytes();
  }
  return sum;
}

}  // namespace

int64_t Part::bytes() const {
  int64_t n = dtype_size(dtype);
  for (const int64_t size : shape) {
    n *= size;
  }
  return n;
}

int64_t StateLayout::bytes_per_token() const {
  return bytes_of(pages);
}

int64_t StateLayout::bytes_per_sequence() const {
  return bytes_of(slots);
}

StateLayout StateLayout::kept_in(Dtype values) const {
  StateLayout kept = *this;
  for (Part& part : kept.pages) {
    part.dtype = values;
  }
  if (values == Dtype::kF8E4M3) {
    for (const Part& part : pages) {
      kept.pages.push_back(
          {part.name + " scales", {part.shape.begin(), part.shape.end() - 1}, Dtype::kBF16});
    }
  }
  return kept;
}

}  // namespace cambium
