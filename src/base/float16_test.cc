#include "base/float16.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

namespace cambium {
namespace {

/// A 16-bit format by its definition, for the narrowing tests.
struct Format {
  const char* name;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
  uint16_t infinity;
};
constexpr std::array kFormats{Format{"f16", f16_to_f32, f32_to_f16, 0x7c00},
                              Format{"bf16", bf16_to_f32, f32_to_bf16, 0x7f80}};

TEST(Float16, EveryValueComesBack) {
  for (const Format& format : kFormats) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const auto half = static_cast<uint16_t>(bits);
      const float wide = format.widen(half);
      if (std::isnan(wide)) {
        EXPECT_TRUE(std::isnan(format.widen(format.narrow(wide)))) << format.name << " " << bits;
        EXPECT_EQ(format.narrow(wide) & 0x8000, half & 0x8000);
      } else {
        ASSERT_EQ(format.narrow(wide), half) << format.name << " " << bits;
      }
    }
  }
}

// Between neighbours: the midpoint goes to the even one, a little off the midpoint to the nearer.
TEST(Float16, RoundsToNearestEven) {
  for (const Format& format : kFormats) {
    for (uint16_t low = 0; low + 1 < format.infinity; ++low) {
      const auto high = static_cast<uint16_t>(low + 1);
      const auto middle = static_cast<float>(
          (static_cast<double>(format.widen(low)) + static_cast<double>(format.widen(high))) / 2);
      const auto even = static_cast<uint16_t>(low % 2 == 0 ? low : high);
      const float below = std::nextafter(middle, 0.0F);
      const float above = std::nextafter(middle, std::numeric_limits<float>::infinity());
      ASSERT_EQ(format.narrow(middle), even) << format.name << " " << low;
      ASSERT_EQ(format.narrow(below), low) << format.name << " " << low;
      ASSERT_EQ(format.narrow(above), high) << format.name << " " << low;
      ASSERT_EQ(format.narrow(-above), high | 0x8000) << format.name << " " << low;
    }
  }
}

TEST(Float16, KnownValues) {
  EXPECT_EQ(f16_to_f32(0x3c00), 1.0F);
  EXPECT_EQ(f16_to_f32(0x7bff), 65504.0F);
  EXPECT_EQ(f16_to_f32(0x0001), 0x1p-24F);
  EXPECT_EQ(f32_to_f16(65519.9F), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0F), 0x7c00);
  EXPECT_EQ(f32_to_f16(-1e30F), 0xfc00);
  EXPECT_EQ(bf16_to_f32(0x3f80), 1.0F);
  EXPECT_EQ(f32_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(f32_to_bf16(-std::numeric_limits<float>::infinity()), 0xff80);
  // A NaN whose payload is only in the low bits must not become infinity.
  const float low_payload = std::bit_cast<float>(0x7f800001U);
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(low_payload))));
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(low_payload))));
}

}  // namespace
}  // namespace cambium
