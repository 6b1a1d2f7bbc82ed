// fp8 e4m3 as a bit pattern: 4 bits of exponent, 3 of mantissa, no infinity, one NaN of each sign
// (Micikevicius et al. 2022, arXiv 2209.05433). Widening is exact; narrowing rounds to nearest,
// ties to even, and saturates at 448; NaN stays NaN. And rows of it that share a scale. These are
// the definitions, one value at a time; kernels have their own vector forms.
#pragma once

#include <bit>
#include <cstdint>

#include "base/float16.h"

namespace cambium {

struct f8e4m3 {
  uint8_t bits;
  bool operator==(const f8e4m3&) const = default;
};

inline constexpr float kLargestE4m3 = 448.0F;

constexpr float e4m3_to_f32(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80U) << 24;
  const uint32_t magnitude = bits & 0x7fU;
  if (magnitude == 0x7f) {
    return std::bit_cast<float>(sign | 0x7fc00000U);
  }
  if (magnitude < 8) {  // zero or subnormal: units of 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9F;
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude + (120U << 3)) << 20));
}

constexpr uint8_t f32_to_e4m3(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return static_cast<uint8_t>(sign | 0x7fU);
  }
  if (magnitude >= 0x43e00000U) {  // 448
    return static_cast<uint8_t>(sign | 0x7eU);
  }
  if (magnitude < 0x3c800000U) {  // below 2^-6: added to 2^14, floats are 2^-9 apart
    const float shifted = std::bit_cast<float>(magnitude) + 0x1p14F;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x46800000U));
  }
  const uint32_t rounded = magnitude + 0x7ffffU + ((magnitude >> 20) & 1U);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120U << 3)));
}

constexpr float widen(f8e4m3 value) {
  return e4m3_to_f32(value.bits);
}

// --- Rows with a scale: number = e4m3 * scale, rounded to bf16. The scale puts the row's largest
// number at 448, so that of all numbers the one with the most weight in a product is kept best. It
// has the range in which that product with 2^120, which turns the bits of an e4m3 moved to their
// places in a bf16 into its value, is a bf16: kernels take both in one multiplication.
inline constexpr float kLeastE4m3Scale = 0x1p-100F;
inline constexpr float kLargestE4m3Scale = 255.0F;

/// The bits of |x|: in the order of magnitudes, with infinity and NaN above all.
constexpr uint32_t magnitude_bits(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7fffffffU;
}
/// The scale of a row whose largest magnitude_bits() these are. Of a row that has an infinity or
/// NaN it is NaN, and so all of the row; numbers beyond 448 * 255 saturate.
constexpr bf16 e4m3_scale(uint32_t largest) {
  if (largest >= 0x7f800000U) {
    return {0x7fffU};
  }
  const float scale = std::bit_cast<float>(largest) / kLargestE4m3;
  return round_to_bf16(scale < kLeastE4m3Scale     ? kLeastE4m3Scale
                       : scale > kLargestE4m3Scale ? kLargestE4m3Scale
                                                   : scale);
}
/// A number of a row, given 1 / scale.
constexpr f8e4m3 to_scaled(float x, float inverse_scale) {
  return {f32_to_e4m3(x * inverse_scale)};
}
constexpr bf16 from_scaled(f8e4m3 x, bf16 scale) {
  return round_to_bf16(widen(x) * widen(scale));
}

}  // namespace cambium
