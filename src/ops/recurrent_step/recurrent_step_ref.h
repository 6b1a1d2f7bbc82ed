// The naive definition, in the precision of its element type.
#pragma once

#include <cmath>
#include <vector>

#include "ops/conv/conv_token_ref.h"
#include "ops/pointwise/pointwise_ref.h"
#include "ops/recurrent_step/recurrent_step_kernels.h"

namespace cambium {

/// silu of the convolution of segment s's token (C); leaves the newest inputs in its state.
template <class T>
std::vector<T> convolved_token(const RecurrentStep<T>& a, int64_t s) {
  std::vector<T> u(static_cast<size_t>(a.channels()));
  for (int64_t c = 0; c < a.channels(); ++c) {
    u[static_cast<size_t>(c)] = convolve_token(
        a.conv_weight.row(c), a.taps(), a.conv_bias.defined() ? a.conv_bias.data[c] : T{},
        a.conv_of(s) + c * (a.taps() - 1), a.segments.continues(s),
        *a.x.at(a.segments.begin(s), c));
  }
  return u;
}

/// A head of q or k (K) as it enters the recurrence: of length `scale` where lengths are asked for,
/// and turned.
template <class T>
std::vector<T> step_key(const RecurrentStep<T>& a, const T* u, int64_t t, float scale) {
  std::vector<T> x(u, u + a.key_dim);
  T square = 0;
  for (const T value : x) {
    square += value * value;
  }
  for (T& value : x) {
    value *= a.unit_eps > 0 ? static_cast<T>(scale) / std::sqrt(square + a.unit_eps) : T{1};
  }
  for (int64_t i = 0; i < a.half; ++i) {
    const T angle = static_cast<T>(a.position[t]) * static_cast<T>(a.frequency[t][i]);
    const T cos = std::cos(angle) * static_cast<T>(a.amplitude);
    const T sin = std::sin(angle) * static_cast<T>(a.amplitude);
    T& first = x[static_cast<size_t>(a.interleaved ? 2 * i : i)];
    T& second = x[static_cast<size_t>(a.interleaved ? 2 * i + 1 : a.half + i)];
    const T turned = first * cos - second * sin;
    second = second * cos + first * sin;
    first = turned;
  }
  return x;
}

template <class T>
T step_size_of(const RecurrentStep<T>& a, int64_t t, int64_t at) {
  return definition::softplus(*a.decay.at(t, at) + a.dt_bias.data[at]);
}
template <class T>
T step_decay(const RecurrentStep<T>& a, int64_t t, int64_t h, int64_t i) {
  const int64_t at = a.decay_at(h, i);
  const T rate = std::exp(a.a_log.data[h]);
  return std::exp(
      a.bound < 0 ? a.bound * definition::sigmoid(rate * (*a.decay.at(t, at) + a.dt_bias.data[at]))
                  : -rate * step_size_of(a, t, at));
}
template <class T>
T step_weight(const RecurrentStep<T>& a, int64_t t, int64_t h) {
  return a.weight.defined() ? a.strongest * definition::sigmoid(*a.weight.at(t, h))
                            : step_size_of(a, t, h);
}

/// What the norm makes of a head's results y (V), in place.
template <class T>
void gate_head(const RecurrentStep<T>& a, int64_t t, int64_t h, T* y) {
  const T* z = a.z.at(t, h * a.dim);
  T square = 0;
  std::vector<T> gate(static_cast<size_t>(a.dim));
  for (int64_t j = 0; j < a.dim; ++j) {
    const T open = definition::sigmoid(z[j]);
    T& value = gate[static_cast<size_t>(j)];
    value = a.sigmoid ? open : z[j] * open;
    const T normed = a.gate_first ? y[j] * value : y[j];
    square += normed * normed;
  }
  for (int64_t j = 0; j < a.dim; ++j) {
    y[j] *= gate[static_cast<size_t>(j)];
    if (a.norm.defined()) {
      y[j] *= a.norm.data[h * a.norm_step + j] /
              std::sqrt(square / static_cast<T>(a.dim) + static_cast<T>(a.norm_eps));
    }
  }
}

template <class T>
void recurrent_step_forward::reference(const RecurrentStep<T>& a) {
  for (int64_t s = 0; s < a.segments.count; ++s) {
    const int64_t t = a.segments.begin(s);
    const std::vector<T> u = convolved_token(a, s);
    for (int64_t h = 0; h < a.heads; ++h) {
      const std::vector<T> q = step_key(a, u.data() + a.q_channel(h), t, a.q_scale);
      const std::vector<T> k = step_key(a, u.data() + a.k_channel(h), t, 1.0F);
      const T* v = u.data() + a.v_channel(h);
      const T weight = step_weight(a, t, h);
      T* y = a.y.at(t, h * a.dim);
      for (int64_t j = 0; j < a.dim; ++j) {
        T read = 0;
        for (int64_t i = 0; i < a.key_dim; ++i) {
          T& state = a.state_of(s, h)[i * a.dim + j];
          state = a.segments.continues(s) ? step_decay(a, t, h, i) * state : T{};
          read += state * k[static_cast<size_t>(i)];
        }
        const T written = weight * (a.delta ? v[j] - read : v[j]);
        y[j] = a.skip.defined() ? a.skip.data[h] * v[j] : T{};
        for (int64_t i = 0; i < a.key_dim; ++i) {
          T& state = a.state_of(s, h)[i * a.dim + j];
          state += k[static_cast<size_t>(i)] * written;
          y[j] += state * q[static_cast<size_t>(i)];
        }
      }
      gate_head(a, t, h, y);
    }
  }
}

}  // namespace cambium
