// What operations ask of their inputs, in one wording.
#pragma once

#include "tensor/tensor.h"

namespace cambium {

/// `x` has a type that its device computes in.
inline bool is_computed(const Tensor& x) {
  return x.dtype == Dtype::kF32 || x.dtype == Dtype::kF64 ||
         (x.dtype == Dtype::kBF16 && x.device.kind != Device::kCpu);
}
inline void expect_computed(const char* operation, const char* name, const Tensor& x) {
  expect(is_computed(x), "[{}] expected {} f32 or f64, got {}", operation, name, x);
}

/// The same, with rows a kernel can walk and, where a rank is given, of that rank.
inline void expect_rows(const char* operation, const char* name, const Tensor& x, int rank = 0) {
  expect(is_computed(x) && (rank == 0 || x.rank == rank) && x.has_rows(),
         "[{}] expected {} f32 or f64 with contiguous rows, got {}", operation, name, x);
}

/// `b` lies where `a` does.
inline void expect_device(const char* operation, const char* name, const Tensor& b,
                          const Tensor& a) {
  expect(b.device == a.device, "[{}] expected {} on {}, got {} on {}", operation, name,
         a.device.describe(), b, b.device.describe());
}

/// `b` has the shape, type and device of `a`, and rows.
inline void expect_like(const char* operation, const char* name, const Tensor& b, const Tensor& a) {
  expect(b.same_shape(a) && b.dtype == a.dtype && b.has_rows(),
         "[{}] expected {} like the first input, {} with contiguous rows, got {}", operation, name,
         a, b);
  expect_device(operation, name, b, a);
}

/// `w` is a contiguous vector of `size` elements, on the device of `x` and of the type of its sums.
inline void expect_vector(const char* operation, const char* name, const Tensor& w, int64_t size,
                          const Tensor& x) {
  expect(w.rank == 1 && w.dim(0) == size && w.contiguous() && w.dtype == sum_dtype(x.dtype),
         "[{}] expected {} {} ({}), got {}", operation, name, dtype_name(sum_dtype(x.dtype)), size,
         w);
  expect_device(operation, name, w, x);
}

/// Whether a backward kernel is to set the gradient of an input rather than add to it, of the
/// operations whose CUDA kernels can: on the CPU a fresh one is made zero and added to.
inline bool sets_grad(const Tensor& x) {
  if (x.device.kind == Device::kCuda) {
    return x.takes_grad();
  }
  x.settle_grad();
  return false;
}

}  // namespace cambium
