#include "hybrid/surrogate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

#include "base/error.h"

namespace cambium {
namespace {

/// Variance of the constant, of that of a single coefficient: wide.
constexpr double kConstant = 1e3;

double pair_variance(const Strengths& s, int64_t distance) {
  return s.single * s.pair / static_cast<double>(distance);
}

size_t at(int64_t i) {
  return static_cast<size_t>(i);
}

std::vector<double> ranks(const std::vector<double>& values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
  std::vector<double> rank(values.size());
  for (size_t i = 0; i < order.size();) {
    size_t end = i;
    while (end < order.size() && values[order[end]] == values[order[i]]) {
      ++end;
    }
    for (size_t k = i; k < end; ++k) {
      rank[order[k]] = 0.5 * static_cast<double>(i + end - 1);
    }
    i = end;
  }
  return rank;
}

}  // namespace

double rank_correlation(const std::vector<double>& a, const std::vector<double>& b) {
  CAMBIUM_CHECK(a.size() == b.size());
  if (a.size() < 2) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  std::vector<double> x = ranks(a);
  std::vector<double> y = ranks(b);
  const double centre = 0.5 * static_cast<double>(a.size() - 1);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] -= centre;
    y[i] -= centre;
  }
  return dot(x, y) / std::sqrt(dot(x, x) * dot(y, y));
}

int64_t SurrogateShape::features() const {
  int64_t count = layers * (kinds - 1);
  for (int64_t r = 1; r <= std::min(reach, layers - 1); ++r) {
    count += (layers - r) * (kinds - 1) * (kinds - 1);
  }
  return count;
}

Energy::Energy(const SurrogateShape& of) : shape(of), single(at(of.layers * of.kinds), 0.0) {
  shape.reach = std::min(shape.reach, shape.layers - 1);
  for (int64_t r = 1; r <= shape.reach; ++r) {
    pair.emplace_back(at((shape.layers - r) * shape.kinds * shape.kinds), 0.0);
  }
}

double& Energy::h(int64_t layer, int kind) {
  return single[at(layer * shape.kinds + kind)];
}
double Energy::h(int64_t layer, int kind) const {
  return single[at(layer * shape.kinds + kind)];
}
double& Energy::j(int64_t distance, int64_t layer, int kind, int next) {
  return pair[at(distance - 1)][at((layer * shape.kinds + kind) * shape.kinds + next)];
}
double Energy::j(int64_t distance, int64_t layer, int kind, int next) const {
  return pair[at(distance - 1)][at((layer * shape.kinds + kind) * shape.kinds + next)];
}

double Energy::of(const Choices& choices) const {
  double sum = constant;
  for (int64_t l = 0; l < shape.layers; ++l) {
    sum += h(l, choices[at(l)]);
    for (int64_t r = 1; r <= std::min(shape.reach, l); ++r) {
      sum += j(r, l - r, choices[at(l - r)], choices[at(l)]);
    }
  }
  return sum;
}

double ValueScale::to(double value) const {
  return log ? std::log(std::max(value, 0.0) + offset) : value;
}
double ValueScale::from(double scaled) const {
  return log ? std::exp(scaled) - offset : scaled;
}

Surrogate::Surrogate(const SurrogateShape& shape, std::vector<Choices> placements,
                     std::vector<double> values, const Strengths& strengths,
                     const ValueScale& scale)
    : shape_(shape),
      placements_(std::move(placements)),
      raw_(std::move(values)),
      strengths_(strengths),
      scale_(scale) {
  CAMBIUM_CHECK(placements_.size() == raw_.size() && raw_.size() >= 2);
  shape_.reach = std::min(shape_.reach, shape_.layers - 1);
  fit();
}

Surrogate::Surrogate(const SurrogateShape& shape, std::vector<Choices> placements,
                     std::vector<double> values)
    : Surrogate(shape, std::move(placements), std::move(values), {}, {}) {
  std::vector<ValueScale> scales = {{}};
  // Damage multiplies as often as it adds up; the offset keeps what is next to no damage from
  // standing infinitely far below.
  std::vector<double> sorted = raw_;
  std::sort(sorted.begin(), sorted.end());
  const double middle = sorted[sorted.size() / 2];
  if (sorted.front() >= 0.0 && middle > 0.0) {
    scales.push_back({true, 0.02 * middle});
  }
  double best = -std::numeric_limits<double>::infinity();
  Strengths strengths;
  ValueScale chosen;
  for (const ValueScale& scale : scales) {
    scale_ = scale;
    for (const double pair : {1.0, 0.3, 0.1, 0.03, 0.01}) {
      for (const double noise : {1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001}) {
        strengths_ = {1.0, pair, noise};
        fit();
        // The best strength of all at these shares of it is known in closed form.
        const auto n = static_cast<double>(values_.size());
        strengths_.single = std::max(dot(alpha_, values_) / n, 1e-300);
        fit();
        if (evidence_ > best) {
          best = evidence_;
          strengths = strengths_;
          chosen = scale_;
        }
      }
    }
  }
  scale_ = chosen;
  strengths_ = strengths;
  fit();
}

double Surrogate::kernel(const Choices& a, const Choices& b) const {
  double sum = kConstant * strengths_.single;
  for (int64_t l = 0; l < shape_.layers; ++l) {
    const int kind = a[at(l)];
    if (kind == 0 || b[at(l)] != kind) {
      continue;
    }
    sum += strengths_.single;
    for (int64_t r = 1; r <= std::min(shape_.reach, l); ++r) {
      const int before = a[at(l - r)];
      sum += before != 0 && b[at(l - r)] == before ? pair_variance(strengths_, r) : 0.0;
    }
  }
  return sum;
}

void Surrogate::fit() {
  const size_t n = raw_.size();
  values_.clear();
  double jacobian = 0.0;
  for (const double value : raw_) {
    values_.push_back(scale_.to(value));
    jacobian -= scale_.log ? values_.back() : 0.0;
  }
  std::vector<double> covariance(n * n, 0.0);
  for (size_t i = 0; i < n; ++i) {
    for (size_t k = 0; k <= i; ++k) {
      covariance[i * n + k] = kernel(placements_[i], placements_[k]);
    }
    covariance[i * n + i] += strengths_.noise * strengths_.single;
  }
  factor_ = std::make_unique<Cholesky>(std::move(covariance), static_cast<int64_t>(n));
  CAMBIUM_CHECK(factor_->ok(), "the noise is too small for {} measurements", n);
  alpha_ = factor_->solve(values_);
  evidence_ = -0.5 * (dot(alpha_, values_) + factor_->log_determinant() +
                      static_cast<double>(n) * std::log(2.0 * std::numbers::pi)) +
              jacobian;
}

Prediction Surrogate::predict(const Choices& choices) const {
  std::vector<double> k;
  k.reserve(placements_.size());
  for (const Choices& seen : placements_) {
    k.push_back(kernel(choices, seen));
  }
  const double mean = dot(k, alpha_);
  const std::vector<double> half = factor_->forward(std::move(k));
  return {mean, std::sqrt(std::max(kernel(choices, choices) - dot(half, half), 0.0))};
}

// prior covariance times features' times `weights` of the measurements.
Energy Surrogate::coefficients(const std::vector<double>& weights) const {
  Energy e(shape_);
  for (size_t i = 0; i < placements_.size(); ++i) {
    const Choices& p = placements_[i];
    e.constant += weights[i] * kConstant * strengths_.single;
    for (int64_t l = 0; l < shape_.layers; ++l) {
      const int kind = p[at(l)];
      if (kind == 0) {
        continue;
      }
      e.h(l, kind) += weights[i] * strengths_.single;
      for (int64_t r = 1; r <= std::min(shape_.reach, l); ++r) {
        if (const int before = p[at(l - r)]; before != 0) {
          e.j(r, l - r, before, kind) += weights[i] * pair_variance(strengths_, r);
        }
      }
    }
  }
  return e;
}

Energy Surrogate::mean() const {
  return coefficients(alpha_);
}

Energy Surrogate::deviations() const {
  Energy out(shape_);
  // Variance of one coefficient: prior - prior^2 f' K^-1 f, f its feature in each measurement.
  const auto deviation = [&](double prior, const auto& has) {
    std::vector<double> f;
    for (const Choices& p : placements_) {
      f.push_back(has(p) ? prior : 0.0);
    }
    const std::vector<double> half = factor_->forward(std::move(f));
    return std::sqrt(std::max(prior - dot(half, half), 0.0));
  };
  out.constant = deviation(kConstant * strengths_.single, [](const Choices&) { return true; });
  for (int64_t l = 0; l < shape_.layers; ++l) {
    for (int kind = 1; kind < shape_.kinds; ++kind) {
      const auto has = [&](const Choices& p) { return p[at(l)] == kind; };
      out.h(l, kind) = deviation(strengths_.single, has);
      for (int64_t r = 1; r <= std::min(shape_.reach, l); ++r) {
        for (int before = 1; before < shape_.kinds; ++before) {
          out.j(r, l - r, before, kind) =
              deviation(pair_variance(strengths_, r),
                        [&](const Choices& p) { return has(p) && p[at(l - r)] == before; });
        }
      }
    }
  }
  return out;
}

// A draw of the prior, moved by what the measurements say against it (Matheron's rule).
Energy Surrogate::draw(Rng& rng) const {
  const double single = std::sqrt(strengths_.single);
  Energy prior(shape_);
  prior.constant = std::sqrt(kConstant) * single * static_cast<double>(rng.normal());
  for (int64_t l = 0; l < shape_.layers; ++l) {
    for (int kind = 1; kind < shape_.kinds; ++kind) {
      prior.h(l, kind) = single * static_cast<double>(rng.normal());
      for (int64_t r = 1; r <= std::min(shape_.reach, l); ++r) {
        for (int before = 1; before < shape_.kinds; ++before) {
          prior.j(r, l - r, before, kind) =
              std::sqrt(pair_variance(strengths_, r)) * static_cast<double>(rng.normal());
        }
      }
    }
  }
  std::vector<double> off;
  for (size_t i = 0; i < placements_.size(); ++i) {
    const double noise = std::sqrt(strengths_.noise) * single * static_cast<double>(rng.normal());
    off.push_back(values_[i] - prior.of(placements_[i]) - noise);
  }
  const Energy moved = coefficients(factor_->solve(std::move(off)));
  prior.constant += moved.constant;
  for (size_t i = 0; i < prior.single.size(); ++i) {
    prior.single[i] += moved.single[i];
  }
  for (size_t r = 0; r < prior.pair.size(); ++r) {
    for (size_t i = 0; i < prior.pair[r].size(); ++i) {
      prior.pair[r][i] += moved.pair[r][i];
    }
  }
  return prior;
}

double Surrogate::left_out_rank(double share) const {
  const size_t n = raw_.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return raw_[a] < raw_[b]; });
  order.resize(std::min(n, static_cast<size_t>(std::ceil(share * static_cast<double>(n)))));
  std::vector<double> measured;
  std::vector<double> predicted;
  for (const size_t i : order) {
    // What the others say of it: its value less alpha over the diagonal of the inverse covariance.
    std::vector<double> unit(n, 0.0);
    unit[i] = 1.0;
    const std::vector<double> half = factor_->forward(std::move(unit));
    measured.push_back(values_[i]);
    predicted.push_back(values_[i] - alpha_[i] / dot(half, half));
  }
  return rank_correlation(measured, predicted);
}

}  // namespace cambium
