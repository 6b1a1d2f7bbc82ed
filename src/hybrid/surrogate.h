// What a placement of mixers costs in quality, predicted from a few that were measured.
//
// The model is one of neighbours (Super Apriel, arXiv 2604.19877, describes such a surrogate in
// words): with m_l the kind of mixer of layer l of L, kind 0 (attention) of the M kinds being the
// reference that costs nothing,
//
//   E(m) = c + sum_l h_l[m_l] + sum_{r=1..R} sum_l J_{l,r}[m_l, m_{l+r}]
//
// with h_l[0] = J[0, .] = J[., 0] = 0. It is fitted by Bayesian linear regression: every h has the
// prior N(0, a^2), every J of distance r N(0, (b a)^2 / r) with b <= 1, the measurements the noise
// s^2, which is what neighbours do not explain. a, b, s maximise the evidence. Its dual form costs
// O(n^3) for n measurements, however many coefficients there are (Rasmussen and Williams, "Gaussian
// Processes for Machine Learning", 2006, chapter 2 and 5.4).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "hybrid/least_squares.h"

namespace cambium {

/// The kind of each open layer, by number; 0 is attention.
using Choices = std::vector<int>;

struct SurrogateShape {
  int64_t layers = 0;
  int64_t kinds = 0;  // attention among them
  int64_t reach = 1;  // R

  /// Coefficients beside the constant.
  int64_t features() const;
};

/// The coefficients.
struct Energy {
  SurrogateShape shape;
  double constant = 0.0;
  std::vector<double> single;             // (L, M)
  std::vector<std::vector<double>> pair;  // of distance r at r - 1: (L - r, M, M)

  explicit Energy(const SurrogateShape& of);
  double& h(int64_t layer, int kind);
  double h(int64_t layer, int kind) const;
  double& j(int64_t distance, int64_t layer, int kind, int next);
  double j(int64_t distance, int64_t layer, int kind, int next) const;
  double of(const Choices& choices) const;
};

/// On the scale that the surrogate works in: the values themselves, or log(value + offset).
struct ValueScale {
  bool log = false;
  double offset = 0.0;

  double to(double value) const;
  double from(double scaled) const;
};

struct Prediction {
  double mean = 0.0;
  double deviation = 0.0;  // of the posterior, without the noise of a measurement
};

/// How strong coefficients may be, as variances.
struct Strengths {
  double single = 1.0;
  double pair = 0.25;   // of `single`
  double noise = 0.01;  // of `single`
};

class Surrogate {
 public:
  /// Fits `values` (smaller = better, finite) of `placements`, at least two. Strengths and scale by
  /// evidence.
  Surrogate(const SurrogateShape& shape, std::vector<Choices> placements,
            std::vector<double> values);
  /// The same with what an earlier fit found: quicker.
  Surrogate(const SurrogateShape& shape, std::vector<Choices> placements,
            std::vector<double> values, const Strengths& strengths, const ValueScale& scale);

  const Strengths& strengths() const { return strengths_; }
  const ValueScale& scale() const { return scale_; }
  /// ln of the density that the model gave the values.
  double evidence() const { return evidence_; }

  /// On the scale of scale().
  Prediction predict(const Choices& choices) const;
  /// Coefficients: the mean of the posterior, their deviations, and a draw from it.
  Energy mean() const;
  Energy deviations() const;
  Energy draw(Rng& rng) const;
  /// Rank correlation (Spearman) of the values of the best `share` of the measurements with what
  /// the others say of each: 1 = the surrogate orders them rightly.
  double left_out_rank(double share) const;

 private:
  void fit();
  double kernel(const Choices& a, const Choices& b) const;
  Energy coefficients(const std::vector<double>& weights) const;

  SurrogateShape shape_;
  std::vector<Choices> placements_;
  std::vector<double> raw_, values_;  // as given, and scaled
  Strengths strengths_;
  ValueScale scale_;
  std::unique_ptr<Cholesky> factor_;  // of the covariance of the values
  std::vector<double> alpha_;         // covariance^-1 values
  double evidence_ = 0.0;
};

/// Spearman's rank correlation; equal values share the mean of their ranks. NaN for fewer than two,
/// and where all values of one side are equal.
double rank_correlation(const std::vector<double>& a, const std::vector<double>& b);

}  // namespace cambium
