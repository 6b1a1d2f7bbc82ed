#include "hybrid/least_squares.h"

#include <cmath>

#include "base/parallel.h"

namespace cambium {
namespace {

/// Sum over i of a[i] b[i], in one order.
double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

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

/// L of g + ridge = L L^T, g (n, n) symmetric; below the diagonal of the result, and on it.
std::vector<double> cholesky(const float* g, int64_t n, double ridge) {
  std::vector<double> l(static_cast<size_t>(n * n));
  for (int64_t j = 0; j < n; ++j) {
    const double* above = l.data() + j * n;
    const auto rest = [&](int64_t i) {
      double sum = g[i * n + j] + (i == j ? ridge : 0.0);
      const double* row = l.data() + i * n;
      for (int64_t k = 0; k < j; ++k) {
        sum -= row[k] * above[k];
      }
      return sum;
    };
    const double corner = std::sqrt(std::max(rest(j), ridge));
    parallel_for(n - j, kRows, [&](int64_t from, int64_t to) {
      for (int64_t i = j + from; i < j + to; ++i) {
        l[static_cast<size_t>(i * n + j)] = i == j ? corner : rest(i) / corner;
      }
    });
  }
  return l;
}

/// x with L L^T x = b, in place of b.
void solve(const std::vector<double>& l, int64_t n, std::vector<double>& b) {
  for (int64_t i = 0; i < n; ++i) {
    double sum = b[static_cast<size_t>(i)];
    for (int64_t k = 0; k < i; ++k) {
      sum -= l[static_cast<size_t>(i * n + k)] * b[static_cast<size_t>(k)];
    }
    b[static_cast<size_t>(i)] = sum / l[static_cast<size_t>(i * n + i)];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    double sum = b[static_cast<size_t>(i)];
    for (int64_t k = i + 1; k < n; ++k) {
      sum -= l[static_cast<size_t>(k * n + i)] * b[static_cast<size_t>(k)];
    }
    b[static_cast<size_t>(i)] = sum / l[static_cast<size_t>(i * n + i)];
  }
}

}  // namespace

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
  const std::vector<double> l = cholesky(g, n, ridge * trace / static_cast<double>(n));
  parallel_for(cross.dim(0), 1, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const float* b = cross.ptr<float>() + r * n;
      std::vector<double> x(b, b + n);
      solve(l, n, x);
      for (int64_t i = 0; i < n; ++i) {
        weight.ptr<float>()[r * n + i] += static_cast<float>(x[static_cast<size_t>(i)]);
      }
    }
  });
}

}  // namespace cambium
