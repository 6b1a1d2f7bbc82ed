// fp4 e2m1 as the lower half of a byte: a sign, 2 bits of exponent, 1 of mantissa, no infinity and
// no NaN (OCP Microscaling Formats 1.0). Widening is exact.
#pragma once

#include <cstdint>

namespace cambium {

inline constexpr float kE2m1[] = {0.0F,  0.5F,  1.0F,  1.5F,  2.0F,  3.0F,  4.0F,  6.0F,
                                  -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};

constexpr float e2m1_to_f32(unsigned bits) {
  return kE2m1[bits & 15U];
}

}  // namespace cambium
