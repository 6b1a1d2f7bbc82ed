#include "ops/elements_simd.h"
#include "ops/join_heads/join_heads_kernels.h"
#include "ops/rows_simd.h"

namespace cambium::CAMBIUM_ISA {
void join_heads_forward(const JoinHeads<float>& j) {
  const auto a_bytes = static_cast<size_t>(j.a.channels) * sizeof(float);
  const auto b_bytes = static_cast<size_t>(j.b.channels) * sizeof(float);
  parallel_for(
      j.a.rows.outer, rows_per_piece(j.heads() * j.y.channels), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          for (int64_t h = 0; h < j.heads(); ++h) {
            std::memcpy(j.y.row(t, h), j.a.row(t, h), a_bytes);
            std::memcpy(j.y.row(t, h) + j.a.channels, j.b.row(t, j.shared() ? 0 : h), b_bytes);
          }
        }
      });
}

void join_heads_backward(const JoinHeads<float>& j) {
  parallel_for(
      j.a.rows.outer, rows_per_piece(j.heads() * j.y.channels), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          for (int64_t h = 0; h < j.heads(); ++h) {
            const float* dy = j.y.grad_row(t, h);
            if (j.a.grad != nullptr) {
              add_row(j.a.grad_row(t, h), 1.0F, dy, j.a.channels);
            }
            if (j.b.grad != nullptr) {
              add_row(j.b.grad_row(t, j.shared() ? 0 : h), 1.0F, dy + j.a.channels, j.b.channels);
            }
          }
        }
      });
}

}  // namespace cambium::CAMBIUM_ISA
