#include "base/float8.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace cambium {
namespace {

/// By the format's definition.
double value_of(int code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

bool is_nan_code(int code) {
  return (code & 0x7f) == 0x7f;
}

TEST(Float8, EveryCodeHasItsValueAndComesBack) {
  for (int code = 0; code < 256; ++code) {
    const float wide = e4m3_to_f32(static_cast<uint8_t>(code));
    if (is_nan_code(code)) {
      EXPECT_TRUE(std::isnan(wide)) << code;
    } else {
      EXPECT_EQ(static_cast<double>(wide), value_of(code)) << code;
      EXPECT_EQ(std::signbit(wide), code >= 128) << code;
    }
    EXPECT_EQ(f32_to_e4m3(wide), code);
  }
}

// Between neighbours: the midpoint goes to the even one, a little off the midpoint to the nearer.
TEST(Float8, RoundsToNearestEven) {
  for (uint8_t low = 0; low < 0x7e; ++low) {
    const auto high = static_cast<uint8_t>(low + 1);
    const auto middle = static_cast<float>((value_of(low) + value_of(high)) / 2);
    const auto even = static_cast<uint8_t>(low % 2 == 0 ? low : high);
    const float below = std::nextafter(middle, 0.0F);
    const float above = std::nextafter(middle, std::numeric_limits<float>::infinity());
    EXPECT_EQ(f32_to_e4m3(middle), even) << int{low};
    EXPECT_EQ(f32_to_e4m3(-middle), even | 0x80) << int{low};
    EXPECT_EQ(f32_to_e4m3(below), low) << int{low};
    EXPECT_EQ(f32_to_e4m3(above), high) << int{low};
    EXPECT_EQ(f32_to_e4m3(-above), high | 0x80) << int{low};
  }
}

TEST(Float8, SaturatesAndKeepsNan) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float x :
       {448.0F, 464.0F, 480.0F, 1e10F, std::numeric_limits<float>::max(), kInfinity}) {
    EXPECT_EQ(f32_to_e4m3(x), 0x7e) << x;
    EXPECT_EQ(f32_to_e4m3(-x), 0xfe) << x;
  }
  EXPECT_EQ(f32_to_e4m3(std::numeric_limits<float>::denorm_min()), 0x00);
  EXPECT_EQ(f32_to_e4m3(-0.0F), 0x80);
  EXPECT_EQ(f32_to_e4m3(0x1p-10F), 0x00);  // half of the least: to even
  EXPECT_EQ(f32_to_e4m3(0x1.8p-9F), 0x02);
  EXPECT_EQ(f32_to_e4m3(std::bit_cast<float>(0x7f800001U)), 0x7f);
  EXPECT_EQ(f32_to_e4m3(std::bit_cast<float>(0xffc00000U)), 0xff);
}

struct Row {
  std::vector<f8e4m3> codes;
  bf16 scale;

  explicit Row(const std::vector<float>& numbers) {
    uint32_t largest = 0;
    for (const float x : numbers) {
      largest = std::max(largest, magnitude_bits(x));
    }
    scale = e4m3_scale(largest);
    for (const float x : numbers) {
      codes.push_back(to_scaled(x, 1.0F / widen(scale)));
    }
  }
  float operator[](size_t i) const { return widen(from_scaled(codes[i], scale)); }
};

// The largest number is off by what bf16 is of itself and of its scale; each other by half a step
// of 2^-3 of itself, or of the least step where it is far below the largest.
TEST(Float8Rows, AreNearTheirNumbersWhateverTheirSize) {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal;
  for (const float size : {1.0F, 1e-20F, 1e-3F, 37.0F, 2e4F}) {
    std::vector<float> numbers(64);
    for (float& x : numbers) {
      x = size * normal(random);
    }
    numbers[5] = -5.5F * size;
    const Row row(numbers);
    EXPECT_NEAR(row[5], numbers[5], std::ldexp(std::abs(numbers[5]), -7));
    for (size_t i = 0; i < numbers.size(); ++i) {
      const float most =
          std::max(std::ldexp(std::abs(numbers[i]), -4) * 1.02F, std::ldexp(widen(row.scale), -10));
      EXPECT_NEAR(row[i], numbers[i], most) << size << " " << i;
    }
  }
}

TEST(Float8Rows, ZerosLimitsAndWhatIsNotFinite) {
  const Row zeros(std::vector<float>(3, 0.0F));
  EXPECT_EQ(zeros[0], 0.0F);
  EXPECT_EQ(widen(zeros.scale), kLeastE4m3Scale);
  const Row large({3e38F, -1.0F, 448.0F * 255.0F});
  EXPECT_EQ(widen(large.scale), kLargestE4m3Scale);
  EXPECT_EQ(large[0], widen(round_to_bf16(448.0F * 255.0F)));
  EXPECT_EQ(large[2], large[0]);
  for (const float bad : {std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), std::nanf("")}) {
    const Row row({1.0F, bad, 0.0F});
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_TRUE(std::isnan(row[i])) << bad << " " << i;
    }
  }
  // What memory that was given back is filled with.
  EXPECT_TRUE(std::isnan(widen(from_scaled({0x00}, bf16{0xffff}))));
}

// What kernels do: the bits moved to their places in a bf16, times 2^120 scale, rounded once.
TEST(Float8Rows, OneProductWidensAndScales) {
  for (const float s : {kLeastE4m3Scale, 0.0123F, 1.0F, 7.7F, kLargestE4m3Scale}) {
    const bf16 scale = round_to_bf16(s);
    const float factor = widen(scale) * 0x1p120F;
    EXPECT_EQ(widen(round_to_bf16(factor)), factor);
    EXPECT_TRUE(std::isfinite(factor));
    for (int code = 0; code < 256; ++code) {
      if (is_nan_code(code)) {
        continue;
      }
      const auto moved = static_cast<uint16_t>(((code & 0x80) << 8) | ((code & 0x7f) << 4));
      EXPECT_EQ(round_to_bf16(bf16_to_f32(moved) * factor),
                from_scaled({static_cast<uint8_t>(code)}, scale))
          << code << " " << s;
    }
  }
}

}  // namespace
}  // namespace cambium
