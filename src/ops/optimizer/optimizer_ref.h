// The naive definitions, in the precision of their element type.
#pragma once

#include <cmath>

#include "ops/optimizer/optimizer_kernels.h"

namespace cambium {

template <class T>
void adamw::reference(const Adamw<T>& a) {
  const AdamwConfig& c = a.config;
  const auto rate = static_cast<T>(c.rate);
  for (int64_t i = 0; i < a.n; ++i) {
    const T g = a.g[i] * static_cast<T>(c.gradient_scale);
    a.m[i] = static_cast<T>(c.beta1) * a.m[i] + (1 - static_cast<T>(c.beta1)) * g;
    a.v[i] = static_cast<T>(c.beta2) * a.v[i] + (1 - static_cast<T>(c.beta2)) * g * g;
    const T step = a.m[i] * static_cast<T>(c.m_correction) /
                   (std::sqrt(a.v[i] * static_cast<T>(c.v_correction)) + static_cast<T>(c.epsilon));
    a.p[i] = a.p[i] * (1 - rate * static_cast<T>(c.weight_decay)) - rate * step;
  }
}

template <class T>
void adamw_narrow::reference(const AdamwNarrow<T>& a) {
  const AdamwConfig& c = a.config;
  const auto rate = static_cast<T>(c.rate);
  for (int64_t i = 0; i < a.n; ++i) {
    const T g = a.g[i] * static_cast<T>(c.gradient_scale);
    const T m =
        static_cast<T>(c.beta1) * static_cast<T>(widen(a.m[i])) + (1 - static_cast<T>(c.beta1)) * g;
    const T v = static_cast<T>(c.beta2) * static_cast<T>(widen(a.v[i])) +
                (1 - static_cast<T>(c.beta2)) * g * g;
    const T step = m * static_cast<T>(c.m_correction) /
                   (std::sqrt(v * static_cast<T>(c.v_correction)) + static_cast<T>(c.epsilon));
    a.p[i] = a.p[i] * (1 - rate * static_cast<T>(c.weight_decay)) - rate * step;
    a.m[i] = rounded_m(a.key, i, static_cast<float>(m));
    a.v[i] = rounded_v(a.key, i, static_cast<float>(v));
  }
}

/// Where element (r, c) of a matrix lies in one that is as large and never taller than wide.
constexpr int64_t wide_index(int64_t rows, int64_t columns, int64_t r, int64_t c) {
  return rows <= columns ? r * columns + c : c * rows + r;
}

template <class T>
void muon_momentum::reference(const MuonMomentum<T>& a) {
  const auto momentum = static_cast<T>(a.momentum);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = 0; c < a.columns; ++c) {
      const int64_t i = r * a.columns + c;
      const T g = a.g[i] * static_cast<T>(a.gradient_scale);
      a.m[i] = momentum * a.m[i] + (1 - momentum) * g;
      a.x[wide_index(a.rows, a.columns, r, c)] = momentum * a.m[i] + (1 - momentum) * g;
    }
  }
}

template <class T>
void scale_in_place::reference(const Scale<T>& a) {
  for (int64_t i = 0; i < a.n; ++i) {
    a.x[i] *= static_cast<T>(a.factor);
  }
}

template <class T>
void muon_polynomial::reference(const MuonPolynomial<T>& a) {
  for (int64_t i = 0; i < a.count * a.n; ++i) {
    for (int64_t j = 0; j < a.n; ++j) {
      const int64_t at = i * a.n + j;
      a.square[at] = static_cast<T>(a.b) * a.x[at] + static_cast<T>(a.c) * a.square[at] +
                     (i % a.n == j ? static_cast<T>(a.a) : 0);
    }
  }
}

template <class T>
void muon_apply::reference(const MuonApply<T>& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t c = 0; c < a.columns; ++c) {
      const int64_t i = r * a.columns + c;
      a.p[i] = a.p[i] * static_cast<T>(a.keep) -
               static_cast<T>(a.factor) * a.x[wide_index(a.rows, a.columns, r, c)];
      a.g[i] = 0;
    }
  }
}

template <class T>
void block_squares::reference(const Reduction<T>& a) {
  for (int64_t block = 0; block < a.blocks(); ++block) {
    double sum = 0;
    for (int64_t i = block * kReductionBlock; i < a.end(block); ++i) {
      sum += static_cast<double>(a.x[i]) * static_cast<double>(a.x[i]);
    }
    a.part[block] = sum;
  }
}

template <class T>
void block_not_finite::reference(const Reduction<T>& a) {
  for (int64_t block = 0; block < a.blocks(); ++block) {
    double count = 0;
    for (int64_t i = block * kReductionBlock; i < a.end(block); ++i) {
      count += std::isfinite(a.x[i]) ? 0 : 1;
    }
    a.part[block] = count;
  }
}

template <class T>
void fold_parts::reference(const FoldParts<T>& a) {
  for (int64_t group = 0; group < a.groups(); ++group) {
    double sum = 0;
    for (int64_t i = group * kReductionBlock; i < a.end(group); ++i) {
      sum += a.part[i];
    }
    a.total[group] = sum;
  }
}

}  // namespace cambium
