// Private to the operations: what their definitions and kernels are given.
#pragma once

#include "ops/kernel.h"
#include "ops/optimizer/optimizer_config.h"

namespace cambium {

template <class T>
struct Adamw {
  int64_t n;
  T* p;
  Sum<T>* g;  // zero afterwards
  Sum<T>* m;
  Sum<T>* v;
  AdamwConfig config;
};
CAMBIUM_KERNEL(adamw, Adamw)

/// m = momentum m + (1 - momentum) g, u = momentum m + (1 - momentum) g, g times its scale; u goes
/// to x, transposed where p is tall, so that x (small, large) is wide.
template <class T>
struct MuonMomentum {
  int64_t rows, columns;
  const Sum<T>* g;
  Sum<T>* m;
  Sum<T>* x;
  float gradient_scale, momentum;
};
CAMBIUM_KERNEL(muon_momentum, MuonMomentum)

/// x *= factor
template <class T>
struct Scale {
  int64_t n;
  T* x;
  float factor;
};
CAMBIUM_KERNEL(scale_in_place, Scale)

/// square = a I + b x + c square, matrices (n, n)
template <class T>
struct MuonPolynomial {
  int64_t n;
  const T* x;
  T* square;
  float a, b, c;
};
CAMBIUM_KERNEL(muon_polynomial, MuonPolynomial)

/// p = keep p - factor x, with x as muon_momentum left it; g = 0.
template <class T>
struct MuonApply {
  int64_t rows, columns;
  T* p;
  Sum<T>* g;
  const Sum<T>* x;
  float keep, factor;
};
CAMBIUM_KERNEL(muon_apply, MuonApply)

/// A number of a tensor, found by blocks of kReductionBlock elements: what block i gives goes to
/// part[i], and the parts are added up in order.
inline constexpr int64_t kReductionBlock = 1024;
template <class T>
struct Reduction {
  int64_t n;
  const T* x;
  double* part;

  constexpr int64_t blocks() const { return (n + kReductionBlock - 1) / kReductionBlock; }
  constexpr int64_t end(int64_t block) const {
    return (block + 1) * kReductionBlock < n ? (block + 1) * kReductionBlock : n;
  }
};
CAMBIUM_KERNEL(block_squares, Reduction)
/// How many elements of a block are NaN or infinite.
CAMBIUM_KERNEL(block_not_finite, Reduction)

}  // namespace cambium
