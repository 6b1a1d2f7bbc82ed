// Small dense symmetric systems, in double precision: least squares and Bayesian regression.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace cambium {

/// A symmetric positive definite matrix as L L', L lower triangular.
class Cholesky {
 public:
  /// `matrix` (n, n), of which the lower triangle is read. ok() is false where it is not positive
  /// definite, and nothing else may then be asked.
  Cholesky(std::vector<double> matrix, int64_t n);

  bool ok() const { return ok_; }
  /// L^-1 b: its squares add up to b' A^-1 b.
  std::vector<double> forward(std::vector<double> b) const;
  /// A^-1 b.
  std::vector<double> solve(std::vector<double> b) const;
  double log_determinant() const;

 private:
  int64_t n_;
  bool ok_ = true;
  std::vector<double> lower_;  // (n, n)
};

double dot(std::span<const double> a, std::span<const double> b);

/// The w with the least sum of (rows w - values)^2. `rows` (values.size(), unknowns). Error where
/// the rows do not tell all unknowns apart.
std::vector<double> least_squares(std::span<const double> rows, std::span<const double> values,
                                  int64_t unknowns);

}  // namespace cambium
