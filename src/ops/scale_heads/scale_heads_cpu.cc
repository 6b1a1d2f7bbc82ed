#include "ops/elements_simd.h"
#include "ops/rows_simd.h"
#include "ops/scale_heads/scale_heads_kernels.h"

namespace cambium::CAMBIUM_ISA {

void scale_heads_forward(const ScaleHeads<float>& a) {
  const int64_t rows = a.tokens() * a.heads();
  parallel_for(rows, rows_per_piece(a.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float factor = a.factor.data[r % a.heads()];
      for (int64_t c = 0; c < a.x.channels; c += kLanes) {
        const int64_t n = a.x.channels - c;
        vstore_upto(a.y.row(r) + c, factor * vload_upto(a.x.row(r) + c, n), n);
      }
    }
  });
}

// Heads are split among threads, never the sum over tokens.
void scale_heads_backward(const ScaleHeads<float>& a) {
  parallel_for(a.heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      float sum = 0.0F;
      for (int64_t t = 0; t < a.tokens(); ++t) {
        const float* dy = a.y.grad_row(t, h);
        sum += dot_rows(a.x.row(t, h), dy, a.x.channels);
        if (a.x.grad != nullptr) {
          add_row(a.x.grad_row(t, h), a.factor.data[h], dy, a.x.channels);
        }
      }
      if (a.factor.grad != nullptr) {
        a.factor.grad[h] += sum;
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
