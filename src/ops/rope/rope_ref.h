// The naive definition, in the precision of its argument type: it needs no table.
#pragma once

#include <cmath>

#include "ops/rope/rope_kernels.h"

namespace cambium {

/// out (channels) = in turned by the angles of token t, times `direction`; added where `add`.
template <class T>
void turn_head(const Rope<T>& a, int64_t t, double direction, bool add, const T* in, T* out) {
  const auto lengths = a.position[t] / a.length;
  const T scale = static_cast<T>(1.0 + a.beta * std::log1p(static_cast<double>(lengths)));
  for (int64_t c = 0; c < a.x.channels; ++c) {
    T value = in[c];
    if (c < 2 * a.half) {
      const int64_t i = a.interleaved ? c / 2 : c % a.half;
      const bool first = a.interleaved ? c % 2 == 0 : c < a.half;
      const int64_t other = a.interleaved ? c ^ 1 : (c + a.half) % (2 * a.half);
      const double angle = static_cast<double>(a.position[t]) * a.frequency[t][i];
      const T cos = static_cast<T>(std::cos(angle) * a.amplitude);
      const T sin = static_cast<T>(std::sin(angle) * a.amplitude * direction);
      value = in[c] * cos + (first ? -in[other] * sin : in[other] * sin);
    }
    value *= scale;
    out[c] = add ? out[c] + value : value;
  }
}

template <class T>
void rope_forward::reference(const Ropes<T>& all) {
  for (int64_t i = 0; i < all.count; ++i) {
    const Rope<T>& a = all.each[i];
    for (int64_t r = 0; r < a.x.count(); ++r) {
      turn_head(a, r / a.x.rows.inner, 1.0, false, a.x.row(r), a.y.row(r));
    }
  }
}

template <class T>
void rope_backward::reference(const Ropes<T>& all) {
  for (int64_t i = 0; i < all.count; ++i) {
    const Rope<T>& a = all.each[i];
    for (int64_t r = 0; r < a.x.count() && a.x.grad != nullptr; ++r) {
      turn_head(a, r / a.x.rows.inner, -1.0, true, a.y.grad_row(r), a.x.grad_row(r));
    }
  }
}

}  // namespace cambium
