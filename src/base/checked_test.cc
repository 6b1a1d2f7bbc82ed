#include "base/checked.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/testing.h"

namespace cambium {
namespace {

using testing::error_of;

TEST(Checked, RangesIncludeTheirEndsAndNameWhatCame) {
  EXPECT_EQ(in_range("model", "heads", int64_t{1}, 1, 8), 1);
  EXPECT_EQ(in_range("model", "heads", int64_t{8}, 1, 8), 8);
  EXPECT_EQ(error_of([] { in_range("model", "heads", int64_t{9}, 1, 8); }),
            "model: expected 'heads' to be a whole number from 1 to 8, got 9");
  EXPECT_EQ(error_of([] { in_range("model", "heads", int64_t{0}, 1, 8); }),
            "model: expected 'heads' to be a whole number from 1 to 8, got 0");
}

TEST(Checked, TheLargerErrorIsNeverPassedByForWhatComesAfterIt) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(larger_error(1.0, 2.0), 2.0);
  EXPECT_EQ(larger_error(2.0, 1.0), 2.0);
  EXPECT_TRUE(std::isnan(larger_error(1.0, nan)));
  EXPECT_TRUE(std::isnan(larger_error(nan, 1.0)));
}

TEST(Checked, NumbersAreFinite) {
  EXPECT_EQ(in_range("model", "eps", 0.5, 0.0, 1.0), 0.5);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(),
                           std::numeric_limits<double>::infinity(), -0.1, 1.1}) {
    EXPECT_THROW(in_range("model", "eps", bad, 0.0, 1.0), Error) << bad;
  }
}

TEST(Checked, ProductsThatDoNotFitAreErrors) {
  EXPECT_EQ(checked_product("m", "elements", {3, 5, 7}), 105);
  EXPECT_EQ(checked_product("m", "elements", {}), 1);
  EXPECT_EQ(checked_product("m", "elements", {kMaxElements, 0}), 0);
  const int64_t large = int64_t{1} << 62;
  EXPECT_THROW(checked_product("m", "elements", {large, 4}), Error);      // wraps to 0
  EXPECT_THROW(checked_product("m", "elements", {large + 2, 4}), Error);  // wraps to 8
  EXPECT_THROW(checked_product("m", "elements", {-1, 4}), Error);
  EXPECT_THROW(checked_product("m", "elements", {5, 3}, 14), Error);
}

}  // namespace
}  // namespace cambium
