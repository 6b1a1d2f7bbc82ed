#include "hybrid/cholesky.h"

#include <cmath>
#include <numeric>

#include "base/error.h"

namespace cambium {

double dot(std::span<const double> a, std::span<const double> b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

Cholesky::Cholesky(std::vector<double> matrix, int64_t n) : n_(n), lower_(std::move(matrix)) {
  CAMBIUM_CHECK(static_cast<int64_t>(lower_.size()) == n * n, "{} numbers, n = {}", lower_.size(),
                n);
  const auto size = static_cast<size_t>(n);
  const auto row = [&](size_t i, size_t count) {
    return std::span<const double>(lower_).subspan(i * size, count);
  };
  for (size_t i = 0; i < size; ++i) {
    for (size_t j = 0; j < i; ++j) {
      double& at = lower_[i * size + j];
      at = (at - dot(row(i, j), row(j, j))) / lower_[j * size + j];
    }
    double& diagonal = lower_[i * size + i];
    const double square = diagonal - dot(row(i, i), row(i, i));
    // What is left of the diagonal by rounding alone is not a pivot.
    if (!(square > 1e-13 * std::abs(diagonal))) {
      ok_ = false;
      return;
    }
    diagonal = std::sqrt(square);
  }
}

std::vector<double> Cholesky::forward(std::vector<double> b) const {
  CAMBIUM_CHECK(ok_ && static_cast<int64_t>(b.size()) == n_);
  const auto size = static_cast<size_t>(n_);
  for (size_t i = 0; i < size; ++i) {
    const std::span<const double> row = std::span(lower_).subspan(i * size, i);
    b[i] = (b[i] - dot(row, std::span(b).first(i))) / lower_[i * size + i];
  }
  return b;
}

std::vector<double> Cholesky::solve(std::vector<double> b) const {
  b = forward(std::move(b));
  const auto size = static_cast<size_t>(n_);
  for (size_t i = size; i-- > 0;) {
    b[i] /= lower_[i * size + i];
    for (size_t j = 0; j < i; ++j) {
      b[j] -= lower_[i * size + j] * b[i];
    }
  }
  return b;
}

double Cholesky::log_determinant() const {
  CAMBIUM_CHECK(ok_);
  double sum = 0.0;
  for (int64_t i = 0; i < n_; ++i) {
    sum += 2.0 * std::log(lower_[static_cast<size_t>(i * n_ + i)]);
  }
  return sum;
}

std::vector<double> least_squares(std::span<const double> rows, std::span<const double> values,
                                  int64_t unknowns) {
  const auto n = static_cast<size_t>(unknowns);
  CAMBIUM_CHECK(rows.size() == values.size() * n);
  std::vector<double> normal(n * n, 0.0);
  std::vector<double> right(n, 0.0);
  for (size_t r = 0; r < values.size(); ++r) {
    const double* row = rows.data() + r * n;
    for (size_t i = 0; i < n; ++i) {
      right[i] += row[i] * values[r];
      for (size_t j = 0; j < n; ++j) {
        normal[i * n + j] += row[i] * row[j];
      }
    }
  }
  const Cholesky factor(std::move(normal), unknowns);
  expect(factor.ok(), "{} measurements do not tell {} unknowns apart", values.size(), unknowns);
  return factor.solve(std::move(right));
}

}  // namespace cambium
