// Private to the operations: what their definitions and kernels are given.
#pragma once

#include <bit>

#include "ops/kernel.h"
#include "ops/optimizer/optimizer_config.h"

namespace cambium {

template <class T>
struct Adamw {
  int64_t n;
  T* p;
  const Sum<T>* g;
  Sum<T>* m;
  Sum<T>* v;
  AdamwConfig config;
};
CAMBIUM_KERNEL(adamw, Adamw)

/// 32 random bits for element i of an update: its number mixed by multiplications and shifts, alike
/// on every device.
static constexpr uint32_t rounding_bits(uint64_t key, int64_t i) {
  constexpr uint64_t kMix = 0xD6E8FEB86659FD93ULL;
  uint64_t x = key + static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 32)) * kMix;
  x = (x ^ (x >> 32)) * kMix;
  return static_cast<uint32_t>(x >> 32);
}

/// x as one of its two neighbours in bf16: up with the probability that makes it x on average. What
/// is not finite stays so.
static constexpr bf16 round_stochastically(float x, uint32_t random_16) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000U) == 0x7f800000U) {
    return round_to_bf16(x);
  }
  return {static_cast<uint16_t>((bits + random_16) >> 16)};
}

/// The moments m and v of element i as they are kept.
static constexpr bf16 rounded_m(uint64_t key, int64_t i, float m) {
  return round_stochastically(m, rounding_bits(key, i) & 0xffffU);
}
static constexpr bf16 rounded_v(uint64_t key, int64_t i, float v) {
  return round_stochastically(v, rounding_bits(key, i) >> 16);
}

/// The same with moments in bf16, rounded stochastically: what a step adds to them is often less
/// than half of their last place, and would be lost.
template <class T>
struct AdamwNarrow {
  int64_t n;
  T* p;
  const Sum<T>* g;
  bf16* m;
  bf16* v;
  AdamwConfig config;
  uint64_t key;  // of this update of this parameter
};
CAMBIUM_KERNEL(adamw_narrow, AdamwNarrow)

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

/// square = a I + b x + c square, of `count` matrices (n, n)
template <class T>
struct MuonPolynomial {
  int64_t count, n;
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

/// total[i] = the sum of parts [i, i + 1) * kReductionBlock, in a fixed order: so little is left of
/// a large tensor that the host adds it up at once. T only says where it runs.
template <class T>
struct FoldParts {
  int64_t n;
  const double* part;
  double* total;

  constexpr int64_t groups() const { return (n + kReductionBlock - 1) / kReductionBlock; }
  constexpr int64_t end(int64_t group) const {
    return (group + 1) * kReductionBlock < n ? (group + 1) * kReductionBlock : n;
  }
};
CAMBIUM_KERNEL(fold_parts, FoldParts)

}  // namespace cambium
