// What the matrix kernels share: squares of a weight's rows, turned so that lanes run over the
// rows.
#pragma once

#include "base/simd.h"

namespace cambium::CAMBIUM_ISA {

/// Elements of a row in one vector.
template <class T>
inline constexpr int kSpan = kLanes * 4 / static_cast<int>(sizeof(T));

/// kLanes rows of kSpan elements, transposed. Of two-byte elements each lane holds a pair.
template <class T>
struct Square {
  vf pairs[kLanes];
};

/// The square whose corner is `corner`, of `rows` rows (others repeat the last) and `length`
/// columns (others are zero); neither is 0.
template <class T>
static inline Square<T> load_square(const T* corner, int64_t stride, int64_t rows, int64_t length) {
  Square<T> square;
  if (rows >= kLanes && length >= kSpan<T>) {
    for (int i = 0; i < kLanes; ++i) {
      std::memcpy(&square.pairs[i], corner + i * stride, sizeof(vf));
    }
  } else {
    const size_t bytes = static_cast<size_t>(length < kSpan<T> ? length : kSpan<T>) * sizeof(T);
    for (int i = 0; i < kLanes; ++i) {
      square.pairs[i] = vf{};
      std::memcpy(&square.pairs[i], corner + (i < rows ? i : rows - 1) * stride, bytes);
    }
  }
  transpose_square(square.pairs);
  return square;
}

/// Column q: lane i is element (i, q) of the square before it was transposed.
static inline vf column(const Square<float>& square, int q) {
  return square.pairs[q];
}
static inline vf column(const Square<bf16>& square, int q) {
  const vu pair = reinterpret_cast<vu>(square.pairs[q / 2]);
  return reinterpret_cast<vf>(q % 2 == 0 ? pair << 16 : pair & 0xffff0000U);
}

}  // namespace cambium::CAMBIUM_ISA
