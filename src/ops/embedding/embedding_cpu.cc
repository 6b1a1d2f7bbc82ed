#include "base/parallel.h"
#include "base/simd.h"
#include "ops/embedding/embedding_kernels.h"

namespace cambium::CAMBIUM_ISA {

void embedding_forward(const Embedding<float>& e) {
  const int64_t channels = e.y.channels;
  parallel_for(e.count, 8192 / (channels + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* y = e.y.row(t);
      if (!e.narrow.defined()) {
        std::memcpy(y, e.table.row(e.token(t)), static_cast<size_t>(channels) * sizeof(float));
        continue;
      }
      const bf16* x = e.narrow.row(e.token(t));
      for (int64_t c = 0; c < channels; c += kLanes) {
        vstore_upto(y + c, vload_upto(x + c, channels - c), channels - c);
      }
    }
  });
}

// A thread owns columns of the table, so that what a token's row receives is added in the order of
// the text. The grain is two cache lines: no line is written by two threads.
void embedding_backward(const Embedding<float>& e) {
  parallel_for(e.y.channels, 32, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < e.count; ++t) {
      const float* dy = e.y.grad_row(t);
      float* row = e.table.grad_row(e.tokens[t]);
      for (int64_t c = begin; c < end; c += kLanes) {
        vstore_upto(row + c, vload_upto(row + c, end - c) + vload_upto(dy + c, end - c), end - c);
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
