// Kimi Delta Attention and Lightning written out token by token, as their papers have them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "base/testing.h"
#include "nn/testing.h"

namespace cambium {
namespace {

constexpr int64_t kWidth = 12;
constexpr int64_t kTokens = 21;

std::map<std::string, std::vector<double>> values_of(Unit& unit) {
  std::map<std::string, std::vector<double>> values;
  unit.visit(
      [&](const std::string& name, Parameter& p) { values[name] = testing::values_of(p.tensor); });
  return values;
}

double sigmoid_of(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}
double silu_of(double x) {
  return x * sigmoid_of(x);
}
double dot(const double* a, const double* b, int64_t n) {
  return std::inner_product(a, a + n, b, 0.0);
}
/// Rows of x times those of a matrix (rows, columns).
std::vector<double> product(const std::vector<double>& x, const std::vector<double>& matrix,
                            int64_t columns) {
  std::vector<double> y;
  for (auto t = x.begin(); t != x.end(); t += columns) {
    for (auto row = matrix.begin(); row != matrix.end(); row += columns) {
      y.push_back(std::inner_product(t, t + columns, row, 0.0));
    }
  }
  return y;
}
/// What is left of x when its root mean square is one.
void normalise(double* x, int64_t n, double eps) {
  const double scale = 1.0 / std::sqrt(dot(x, x, n) / static_cast<double>(n) + eps);
  std::transform(x, x + n, x, [&](double value) { return scale * value; });
}

// Section 3 and equation 1 of arXiv 2510.26692, token by token, for the first case of its kind.
TEST(UnitsOfPapers, KimiDeltaIsWhatItsPaperSays) {
  constexpr int64_t kHeads = 4;
  constexpr int64_t kDim = 6;
  constexpr int64_t kInner = kHeads * kDim;
  constexpr int64_t kTaps = 3;
  const auto unit =
      make_unit({"kimi_delta", {{"heads", kHeads}, {"head_dim", kDim}, {"conv", kTaps}}}, kWidth);
  const testing::Memory memory(*unit, Dtype::kF64);
  auto w = values_of(*unit);
  const OwnedTensor rows = testing::random_rows(kTokens, kWidth, Dtype::kF64);
  const std::vector<double> x = testing::values_of(rows.view);
  const std::vector<double> raw = product(x, w["in_proj.weight"], kWidth);
  const std::vector<double> write = product(x, w["beta_proj.weight"], kWidth);
  const auto through = [&](const char* a, const char* b) {
    return product(product(x, w[a], kWidth), w[b], kDim);
  };
  const std::vector<double> fade = through("decay_a_proj.weight", "decay_b_proj.weight");
  const std::vector<double> open = through("gate_a_proj.weight", "gate_b_proj.weight");
  std::vector<double> state(kInner * kDim);  // (H, K, V)
  std::vector<double> mixed(kTokens * kInner);
  for (int64_t t = 0; t < kTokens; ++t) {
    double qkv[3][kInner];
    for (int64_t c = 0; c < 3 * kInner; ++c) {
      double sum = 0.0;
      for (int64_t j = std::max<int64_t>(0, kTaps - 1 - t); j < kTaps; ++j) {
        sum += w["conv1d.weight"][c * kTaps + j] * raw[(t - kTaps + 1 + j) * 3 * kInner + c];
      }
      qkv[c / kInner][c % kInner] = silu_of(sum);
    }
    for (int64_t h = 0; h < kHeads; ++h) {
      double* q = qkv[0] + h * kDim;
      double* k = qkv[1] + h * kDim;
      const double* v = qkv[2] + h * kDim;
      const double q_scale = 1.0 / std::sqrt((dot(q, q, kDim) + 1e-6) * kDim);
      const double k_scale = 1.0 / std::sqrt(dot(k, k, kDim) + 1e-6);
      double* y = &mixed[t * kInner + h * kDim];
      for (int64_t i = 0; i < kDim; ++i) {
        q[i] *= q_scale;
        k[i] *= k_scale;
        const int64_t c = h * kDim + i;
        const double step = std::log1p(std::exp(fade[t * kInner + c] + w["dt_bias"][c]));
        for (int64_t j = 0; j < kDim; ++j) {
          state[c * kDim + j] *= std::exp(-std::exp(w["A_log"][h]) * step);
        }
      }
      for (int64_t j = 0; j < kDim; ++j) {
        double read = 0.0;
        for (int64_t i = 0; i < kDim; ++i) {
          read += k[i] * state[(h * kDim + i) * kDim + j];
        }
        const double change = sigmoid_of(write[t * kHeads + h]) * (v[j] - read);
        for (int64_t i = 0; i < kDim; ++i) {
          state[(h * kDim + i) * kDim + j] += k[i] * change;
          y[j] += q[i] * state[(h * kDim + i) * kDim + j];
        }
      }
      normalise(y, kDim, 1e-5);
      for (int64_t j = 0; j < kDim; ++j) {
        y[j] *= w["norm.weight"][j] * sigmoid_of(open[t * kInner + h * kDim + j]);
      }
    }
  }
  RopeTable rope({.dim = kDim});
  Arena arena;
  Context ctx{.arena = &arena};
  const std::vector<double> y =
      testing::values_of(testing::run(ctx, *unit, rows.view, testing::piece(kTokens), rope));
  EXPECT_LT(testing::largest_difference(y, product(mixed, w["out_proj.weight"], kInner)), 1e-8);
}

// arXiv 2501.08313, token by token: rows by head, SiLU of all three, the norm over all heads, and
// slopes of layer 2 of 5. Three heads take those of two and one between.
TEST(UnitsOfPapers, LightningIsWhatItsPaperSays) {
  constexpr int64_t kHeads = 3;
  constexpr int64_t kDim = 4;
  constexpr int64_t kInner = kHeads * kDim;
  const auto unit = make_unit({"lightning",
                               {{"heads", kHeads},
                                {"head_dim", kDim},
                                {"rows_by_head", true},
                                {"layer_of_slopes", int64_t{2}},
                                {"layers", int64_t{5}}}},
                              kWidth);
  const testing::Memory memory(*unit, Dtype::kF64);
  auto w = values_of(*unit);
  const OwnedTensor rows = testing::random_rows(kTokens, kWidth, Dtype::kF64);
  const std::vector<double> x = testing::values_of(rows.view);
  std::vector<double> raw = product(x, w["qkv_proj.weight"], kWidth);
  std::transform(raw.begin(), raw.end(), raw.begin(), silu_of);
  const std::vector<double> open = product(x, w["gate_proj.weight"], kWidth);
  constexpr double kSlopes[] = {0.0625, 0.00390625, 0.25};  // 2^-4, 2^-8, 2^-2
  std::vector<double> state(kInner * kDim);                 // (H, K, V)
  std::vector<double> mixed(kTokens * kInner);
  for (int64_t t = 0; t < kTokens; ++t) {
    double* y = &mixed[t * kInner];
    for (int64_t h = 0; h < kHeads; ++h) {
      const double* q = &raw[t * 3 * kInner + h * 3 * kDim];
      const double* k = q + kDim;
      const double* v = k + kDim;
      const double kept = std::exp(-kSlopes[h] * (1.0 - 2.0 / (4.0 + 1e-5) + 1e-5));
      for (int64_t i = 0; i < kDim; ++i) {
        for (int64_t j = 0; j < kDim; ++j) {
          double& s = state[(h * kDim + i) * kDim + j];
          s = kept * s + k[i] * v[j];
          y[h * kDim + j] += q[i] * s;
        }
      }
    }
    normalise(y, kInner, 1e-6);
    for (int64_t c = 0; c < kInner; ++c) {
      y[c] *= w["norm.weight"][c] * sigmoid_of(open[t * kInner + c]);
    }
  }
  RopeTable rope({.dim = kDim});
  Arena arena;
  Context ctx{.arena = &arena};
  const std::vector<double> y =
      testing::values_of(testing::run(ctx, *unit, rows.view, testing::piece(kTokens), rope));
  EXPECT_LT(testing::largest_difference(y, product(mixed, w["out_proj.weight"], kInner)), 1e-8);
}

}  // namespace
}  // namespace cambium
