// The vector functions of base/simd.h against <cmath> in double precision, over all floats.
#include "vector_math.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace cambium {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

double exact(VectorFunction function, double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (function) {
    case VectorFunction::kExp:
      return std::exp(x);
    case VectorFunction::kLog:
      return std::log(x);
    case VectorFunction::kSoftplus:
      return x > 20 ? x : std::log1p(std::exp(x));
    case VectorFunction::kSigmoid:
      return sigmoid;
    case VectorFunction::kSilu:
      return x * sigmoid;
    case VectorFunction::kSiluGrad:
      return sigmoid * (1 + x * (1 - sigmoid));
  }
  return 0;
}

std::vector<float> evaluate(VectorFunction function, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  vector_math({function, static_cast<int64_t>(x.size()), x.data(), y.data()});
  return y;
}

template <class F>
void for_each_isa(F&& f) {
  const CpuIsa best = cpu_isa();
  for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
    set_cpu_isa(static_cast<CpuIsa>(isa));
    SCOPED_TRACE(cpu_isa_name(cpu_isa()));
    f();
  }
  set_cpu_isa(best);
}

struct Case {
  const char* name;
  VectorFunction function;
  double lo, hi;     // where the relative error counts
  double tolerance;  // of |error| / (|exact| + floor)
  double floor;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

class VectorMathTest : public ::testing::TestWithParam<Case> {};

TEST_P(VectorMathTest, IsCloseToTheExactValue) {
  const Case& c = GetParam();
  // Every float pattern in steps of a prime, so that all exponents and many mantissas occur.
  std::vector<float> x;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 10007) {
    const auto value = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (value >= c.lo && value <= c.hi) {
      x.push_back(value);
    }
  }
  for (int i = -2000; i <= 2000; ++i) {
    const auto value = static_cast<float>(i * 0.05);
    if (value >= c.lo && value <= c.hi) {
      x.push_back(value);
    }
  }
  ASSERT_GT(x.size(), 1000U);
  for_each_isa([&] {
    const auto y = evaluate(c.function, x);
    double worst = 0;
    float at = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = exact(c.function, x[i]);
      const double error = std::abs(y[i] - expected) / (std::abs(expected) + c.floor);
      if (!(error <= worst)) {
        worst = error;
        at = x[i];
      }
    }
    EXPECT_LE(worst, c.tolerance) << "at " << at;
  });
}

INSTANTIATE_TEST_SUITE_P(
    Functions, VectorMathTest,
    ::testing::Values(
        Case{"exp", VectorFunction::kExp, -87.3, 88.37, 1.5e-7, 0},
        Case{"exp_of_small_results", VectorFunction::kExp, -3e38, -87.3, 1, 1.2e-38},
        Case{"log", VectorFunction::kLog, 1.2e-38, 3.4e38, 2e-7, 0},
        Case{"softplus", VectorFunction::kSoftplus, -87.3, 3.4e38, 4e-7, 0},
        Case{"softplus_of_small_results", VectorFunction::kSoftplus, -3e38, -87.3, 1, 1.2e-38},
        Case{"sigmoid", VectorFunction::kSigmoid, -87.3, 3.4e38, 3e-7, 0},
        Case{"sigmoid_of_small_results", VectorFunction::kSigmoid, -3e38, -87.3, 1, 1.2e-38},
        Case{"silu", VectorFunction::kSilu, -80, 3.4e38, 4e-7, 0},
        Case{"silu_of_small_results", VectorFunction::kSilu, -3e38, -80, 1, 1e-33},
        // The slope passes through zero, so its error is absolute; x times the rounding of 1 - s.
        Case{"silu_slope", VectorFunction::kSiluGrad, -3e38, 3.4e38, 1e-6, 1}),
    ::testing::PrintToStringParamName());

TEST(VectorMathSpecial, LimitsAndNan) {
  struct Row {
    VectorFunction function;
    float x, expected;
  };
  const float denormal = std::numeric_limits<float>::denorm_min();
  const Row rows[] = {
      {VectorFunction::kExp, 0, 1},
      {VectorFunction::kExp, -0.0F, 1},
      {VectorFunction::kExp, denormal, 1},
      {VectorFunction::kExp, -kInfinity, 0},
      {VectorFunction::kExp, -1e30F, 0},
      {VectorFunction::kExp, 89, kInfinity},
      {VectorFunction::kExp, kInfinity, kInfinity},
      {VectorFunction::kExp, kNan, kNan},
      {VectorFunction::kLog, 1, 0},
      {VectorFunction::kLog, kNan, kNan},
      {VectorFunction::kSoftplus, kInfinity, kInfinity},
      {VectorFunction::kSoftplus, -kInfinity, 0},
      {VectorFunction::kSoftplus, kNan, kNan},
      {VectorFunction::kSigmoid, 0, 0.5F},
      {VectorFunction::kSigmoid, denormal, 0.5F},
      {VectorFunction::kSigmoid, kInfinity, 1},
      {VectorFunction::kSigmoid, -kInfinity, 0},
      {VectorFunction::kSigmoid, kNan, kNan},
      {VectorFunction::kSilu, -1e38F, 0},
      {VectorFunction::kSilu, kInfinity, kInfinity},
      {VectorFunction::kSilu, kNan, kNan},
      {VectorFunction::kSiluGrad, kNan, kNan},
  };
  for_each_isa([&] {
    for (const Row& row : rows) {
      const float y = evaluate(row.function, {row.x})[0];
      if (std::isnan(row.expected)) {
        EXPECT_TRUE(std::isnan(y)) << static_cast<int>(row.function) << " of NaN gave " << y;
      } else {
        EXPECT_EQ(y, row.expected) << static_cast<int>(row.function) << " of " << row.x;
      }
    }
  });
}

TEST(VectorParts, TouchOnlyTheirLanes) {
  constexpr int64_t kN = 16;
  std::vector<float> x((kN + 1) * kN);
  std::iota(x.begin(), x.end(), 1.0F);
  for_each_isa([&] {
    std::vector<float> y(x.size(), -1.0F);
    vector_parts({kN, x.data(), y.data()});
    for (int64_t r = 0; r <= 4; ++r) {  // every instruction set has at least four lanes
      for (int64_t c = 0; c < kN; ++c) {
        const auto i = static_cast<size_t>(r * kN + c);
        EXPECT_EQ(y[i], c < r ? x[i] : -1.0F) << r << ", " << c;
      }
    }
  });
}

TEST(VectorSquare, IsTransposed) {
  std::vector<float> x(256);
  std::iota(x.begin(), x.end(), 0.0F);
  for_each_isa([&] {
    std::vector<float> y(x.size());
    int lanes = 0;
    vector_square({x.data(), y.data(), &lanes});
    ASSERT_GE(lanes, 4);
    for (int i = 0; i < lanes * lanes; ++i) {
      EXPECT_EQ(y[static_cast<size_t>(i)], x[static_cast<size_t>(i % lanes * lanes + i / lanes)]);
    }
  });
}

}  // namespace
}  // namespace cambium
