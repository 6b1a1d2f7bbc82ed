#include "hybrid/least_squares.h"

#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/parallel.h"

namespace cambium {
namespace {

constexpr int64_t kRows = 64;      // of x, a piece
constexpr int64_t kChannels = 16;  // of x, a piece

/// y = X p, a number a row.
std::vector<double> times(const std::vector<Tensor>& inputs, const std::vector<double>& p) {
  std::vector<double> y;
  for (const Tensor& x : inputs) {
    const int64_t channels = x.dim(1);
    const auto* rows = x.ptr<float>();
    const size_t begin = y.size();
    y.resize(begin + static_cast<size_t>(x.dim(0)));
    parallel_for(x.dim(0), kRows, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        double sum = 0.0;
        for (int64_t c = 0; c < channels; ++c) {
          sum += p[static_cast<size_t>(c)] * rows[t * channels + c];
        }
        y[begin + static_cast<size_t>(t)] = sum;
      }
    });
  }
  return y;
}

/// X^T y, a number a channel.
std::vector<double> transposed_times(const std::vector<Tensor>& inputs,
                                     const std::vector<double>& y) {
  const int64_t channels = inputs[0].dim(1);
  std::vector<double> out(static_cast<size_t>(channels));
  parallel_for(channels, kChannels, [&](int64_t from, int64_t to) {
    size_t row = 0;
    for (const Tensor& x : inputs) {
      const auto* rows = x.ptr<float>();
      for (int64_t t = 0; t < x.dim(0); ++t, ++row) {
        for (int64_t c = from; c < to; ++c) {
          out[static_cast<size_t>(c)] += y[row] * rows[t * channels + c];
        }
      }
    }
  });
  return out;
}

}  // namespace

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
  for (size_t j = 0; j < size; ++j) {
    double& diagonal = lower_[j * size + j];
    const double square = diagonal - dot(row(j, j), row(j, j));
    // What is left of the diagonal by rounding alone is not a pivot.
    if (!(square > 1e-13 * std::abs(diagonal))) {
      ok_ = false;
      return;
    }
    diagonal = std::sqrt(square);
    parallel_for(n - static_cast<int64_t>(j) - 1, kRows, [&](int64_t from, int64_t to) {
      for (size_t i = j + 1 + static_cast<size_t>(from); i < j + 1 + static_cast<size_t>(to); ++i) {
        double& at = lower_[i * size + j];
        at = (at - dot(row(i, j), row(j, j))) / diagonal;
      }
    });
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

std::vector<float> constant_direction(const std::vector<Tensor>& inputs, int64_t steps) {
  CAMBIUM_CHECK(!inputs.empty());
  std::vector<double> u(static_cast<size_t>(inputs[0].dim(1)));
  std::vector<double> residual(times(inputs, u).size(), 1.0);  // 1 - X u
  std::vector<double> gradient = transposed_times(inputs, residual);
  std::vector<double> direction = gradient;
  double size = dot(gradient, gradient);
  const double enough = 1e-12 * size;
  for (int64_t step = 0; step < steps && size > enough; ++step) {
    const std::vector<double> along = times(inputs, direction);
    const double length = size / dot(along, along);
    for (size_t i = 0; i < u.size(); ++i) {
      u[i] += length * direction[i];
    }
    for (size_t i = 0; i < residual.size(); ++i) {
      residual[i] -= length * along[i];
    }
    gradient = transposed_times(inputs, residual);
    const double next = dot(gradient, gradient);
    for (size_t i = 0; i < u.size(); ++i) {
      direction[i] = gradient[i] + next / size * direction[i];
    }
    size = next;
  }
  return {u.begin(), u.end()};
}

void add_ridge_solution(const Tensor& weight, const Tensor& gram, const Tensor& cross,
                        double ridge) {
  const int64_t n = gram.dim(0);
  CAMBIUM_CHECK(gram.dim(1) == n && cross.dim(1) == n && weight.same_shape(cross) && ridge > 0.0);
  const float* g = gram.ptr<float>();
  double trace = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    trace += g[i * n + i];
  }
  if (!(trace > 0.0)) {
    return;  // y is zero: no weight does better than another
  }
  std::vector<double> matrix(g, g + n * n);
  for (int64_t i = 0; i < n; ++i) {
    matrix[static_cast<size_t>(i * n + i)] += ridge * trace / static_cast<double>(n);
  }
  const Cholesky factor(std::move(matrix), n);
  CAMBIUM_CHECK(factor.ok(), "a ridge of {}", ridge);
  parallel_for(cross.dim(0), 1, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const float* b = cross.ptr<float>() + r * n;
      const std::vector<double> x = factor.solve({b, b + n});
      for (int64_t i = 0; i < n; ++i) {
        weight.ptr<float>()[r * n + i] += static_cast<float>(x[static_cast<size_t>(i)]);
      }
    }
  });
}

}  // namespace cambium
