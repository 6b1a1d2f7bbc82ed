// Sizes that come from files and options: bounded by range before anything is computed from them,
// and multiplied so that a product that does not fit is an Error instead of a small number.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "base/error.h"

namespace cambium {

/// The largest values that models of any kind known today stay far below. A product of four of them
/// still needs checked_product.
inline constexpr int64_t kMaxLayers = 10'000;
inline constexpr int64_t kMaxWidth = int64_t{1} << 20;
inline constexpr int64_t kMaxVocab = int64_t{1} << 24;
inline constexpr int64_t kMaxHeads = int64_t{1} << 14;
inline constexpr int64_t kMaxHeadDim = int64_t{1} << 14;
inline constexpr int64_t kMaxInner = int64_t{1} << 24;
inline constexpr int64_t kMaxPositions = int64_t{1} << 30;
inline constexpr int64_t kMaxExperts = int64_t{1} << 16;
/// Elements of one tensor.
inline constexpr int64_t kMaxElements = int64_t{1} << 44;

/// `value`, or an Error: "attention: expected 'heads' to be a whole number from 1 to 16384, got 0".
inline int64_t in_range(std::string_view owner, std::string_view key, int64_t value, int64_t low,
                        int64_t high) {
  expect(value >= low && value <= high,
         "{}: expected '{}' to be a whole number from {} to {}, got {}", owner, key, low, high,
         value);
  return value;
}

/// `value`, or an Error where it is NaN, infinite or outside [low, high].
inline double in_range(std::string_view owner, std::string_view key, double value, double low,
                       double high) {
  expect(std::isfinite(value) && value >= low && value <= high,
         "{}: expected '{}' to be a number from {} to {}, got {}", owner, key, low, high, value);
  return value;
}

/// The larger of the two, NaN where either is: in a search for the largest error what is not a
/// number is found too, where std::max passes it by.
inline double larger_error(double a, double b) {
  return std::isnan(a) || a >= b ? a : b;
}

/// The product of factors that are at least 0, or an Error where it is above `most`.
inline int64_t checked_product(std::string_view owner, std::string_view what,
                               std::initializer_list<int64_t> factors,
                               int64_t most = kMaxElements) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    int64_t next = 0;
    expect(factor >= 0 && !__builtin_mul_overflow(product, factor, &next) && next <= most,
           "{}: expected {} of at most {}, got a product that is larger or negative", owner, what,
           most);
    product = next;
  }
  return product;
}

}  // namespace cambium
