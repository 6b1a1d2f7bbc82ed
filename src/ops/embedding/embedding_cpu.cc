#include "base/parallel.h"
#include "base/simd.h"
#include "ops/embedding/embedding_kernels.h"

namespace cambium::CAMBIUM_ISA {

void embedding_forward(const EmbeddingForward& e) {
  parallel_for(e.count, 8192 / (e.channels + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = e.tokens[t] * e.channels;
      float* y = e.y + t * e.channels;
      if (!e.table_is_bf16) {
        std::memcpy(y, static_cast<const float*>(e.table) + row,
                    static_cast<size_t>(e.channels) * sizeof(float));
        continue;
      }
      const uint16_t* x = static_cast<const uint16_t*>(e.table) + row;
      int64_t c = 0;
      for (; c + kLanes <= e.channels; c += kLanes) {
        vstore(y + c, vload_bf16(x + c));
      }
      if (c < e.channels) {
        vstore_part(y + c, vload_bf16_part(x + c, e.channels - c), e.channels - c);
      }
    }
  });
}

// A thread owns columns of the table, so that what a token's row receives is added in the order of
// the text. The grain is two cache lines: no line is written by two threads.
void embedding_backward(const EmbeddingBackward& e) {
  parallel_for(e.channels, 32, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < e.count; ++t) {
      const float* dy = e.dy + t * e.channels;
      float* row = e.dtable + e.tokens[t] * e.channels;
      for (int64_t c = begin; c < end; c += kLanes) {
        vstore_upto(row + c, vload_upto(row + c, end - c) + vload_upto(dy + c, end - c), end - c);
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
