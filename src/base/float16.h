// The two 16-bit floats of checkpoints, as bit patterns. Widening is exact; narrowing rounds to
// nearest, ties to even; NaN stays NaN (quiet, sign and top payload bits kept); overflow gives
// infinity. These are the definitions, one value at a time; kernels have their own vector forms.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace cambium {

/// bfloat16 as a type: the upper half of a float. It has no arithmetic: values are widened first.
struct bf16 {
  uint16_t bits;
  bool operator==(const bf16&) const = default;
};

constexpr float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

constexpr uint16_t f32_to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) {
    return static_cast<uint16_t>((bits >> 16) | 0x40U);
  }
  // Half of the last kept place, less one when that place is even: ties go to even.
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

/// The value in the type it is computed with.
constexpr float widen(bf16 value) {
  return bf16_to_f32(value.bits);
}
constexpr float widen(float value) {
  return value;
}
constexpr double widen(double value) {
  return value;
}
constexpr bf16 round_to_bf16(float value) {
  return {f32_to_bf16(value)};
}

constexpr float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fU;
  const uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0) {
    // Zero or subnormal: mantissa * 2^-24, exact in fp32.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) {
    const uint32_t quiet = mantissa != 0 ? 0x400000U : 0U;
    return std::bit_cast<float>(sign | 0x7f800000U | quiet | (mantissa << 13));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

constexpr uint16_t f32_to_f16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return static_cast<uint16_t>(sign | 0x7e00U | ((magnitude >> 13) & 0x3ffU));
  }
  if (magnitude >= 0x477ff000U) {  // 65520 and more round to infinity
    return static_cast<uint16_t>(sign | 0x7c00U);
  }
  if (magnitude >= 0x38800000U) {  // 2^-14 and more: a normal half
    const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
  }
  if (magnitude <= 0x33000000U) {  // 2^-25 and less: the tie at 2^-25 goes to zero, which is even
    return static_cast<uint16_t>(sign);
  }
  // Subnormal: the mantissa with its leading one, shifted to units of 2^-24.
  const uint32_t mantissa = (magnitude & 0x7fffffU) | 0x800000U;
  const uint32_t shift = 126 - (magnitude >> 23);
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1U << shift) - 1);
  const uint32_t half = 1U << (shift - 1);
  const uint32_t up = rest > half || (rest == half && (kept & 1U) != 0) ? 1U : 0U;
  return static_cast<uint16_t>(sign | (kept + up));
}

}  // namespace cambium
