// The walks of CPU kernels that go element by element. Only *_cpu.cc files include it.
#pragma once

#include "base/parallel.h"
#include "base/simd.h"
#include "tensor/view.h"

namespace cambium::CAMBIUM_ISA {

/// Rows of `channels` elements that pay for handing them to a thread.
static inline int64_t rows_per_piece(int64_t channels) {
  constexpr int64_t kElementsPerPiece = 8192;
  return kElementsPerPiece / (channels < 1 ? 1 : channels) + 1;
}

/// y = f(a, b); where b is undefined f is given a twice.
template <class F>
static void pointwise(const View<float>& a, const View<float>& b, const View<float>& y, F f) {
  parallel_for(a.count(), rows_per_piece(a.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row_a = a.row(r);
      const float* row_b = b.defined() ? b.row(r) : row_a;
      float* row_y = y.row(r);
      for (int64_t c = 0; c < a.channels; c += kLanes) {
        const int64_t n = a.channels - c;
        vstore_upto(row_y + c, f(vload_upto(row_a + c, n), vload_upto(row_b + c, n)), n);
      }
    }
  });
}

/// da += fa(a, b, dy), db += fb(a, b, dy), of those that are wanted. da may be the same memory as
/// db: a + a.
template <class Fa, class Fb>
static void pointwise_grad(const View<float>& a, const View<float>& b, const View<float>& y, Fa fa,
                           Fb fb) {
  parallel_for(a.count(), rows_per_piece(a.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row_a = a.row(r);
      const float* row_b = b.defined() ? b.row(r) : row_a;
      const float* dy = y.grad_row(r);
      for (int64_t c = 0; c < a.channels; c += kLanes) {
        const int64_t n = a.channels - c;
        const vf va = vload_upto(row_a + c, n);
        const vf vb = vload_upto(row_b + c, n);
        const vf grad = vload_upto(dy + c, n);
        if (a.grad != nullptr) {
          float* da = a.grad_row(r) + c;
          vstore_upto(da, vload_upto(da, n) + fa(va, vb, grad), n);
        }
        if (b.grad != nullptr) {
          float* db = b.grad_row(r) + c;
          vstore_upto(db, vload_upto(db, n) + fb(va, vb, grad), n);
        }
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
