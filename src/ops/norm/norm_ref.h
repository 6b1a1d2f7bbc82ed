// The naive definitions, in the precision of their element type, forward and backward.
#pragma once

#include <cmath>

#include "ops/norm/norm_kernels.h"

namespace cambium {

template <class T>
void rms_norm_forward::reference(const RmsNorm<T>& a) {
  const int64_t channels = a.x.channels;
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    T square = 0;
    for (int64_t c = 0; c < channels; ++c) {
      square += x[c] * x[c];
    }
    const T rstd = 1 / std::sqrt(square / static_cast<T>(channels) + static_cast<T>(a.eps));
    for (int64_t c = 0; c < channels; ++c) {
      const T w = a.weight.data[c] + static_cast<T>(a.zero_centred ? 1 : 0);
      a.y.row(r)[c] = x[c] * rstd * w;
    }
  }
}

template <class T>
void layer_norm_statistics(const T* x, int64_t channels, float eps, T* mean, T* rstd) {
  T sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    sum += x[c];
  }
  *mean = sum / static_cast<T>(channels);
  T square = 0;
  for (int64_t c = 0; c < channels; ++c) {
    square += (x[c] - *mean) * (x[c] - *mean);
  }
  *rstd = 1 / std::sqrt(square / static_cast<T>(channels) + static_cast<T>(eps));
}

template <class T>
void add_rms_norm_forward::reference(const AddRmsNorm<T>& a) {
  const int64_t channels = a.stream.channels;
  for (int64_t r = 0; r < a.stream.count(); ++r) {
    auto* stream = a.stream.row(r);
    T square = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T added = static_cast<T>(a.out) * a.y.row(r)[c];
      stream[c] = a.keep == 0.0F ? added : static_cast<T>(a.keep) * stream[c] + added;
      square += stream[c] * stream[c];
    }
    if (!a.x.defined()) {
      continue;
    }
    T mean = 0;
    T rstd = 1 / std::sqrt(square / static_cast<T>(channels) + static_cast<T>(a.eps));
    if (a.layer) {
      layer_norm_statistics<T>(stream, channels, a.eps, &mean, &rstd);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T bias = a.bias.defined() ? a.bias.data[c] : T{};
      a.x.row(r)[c] = a.weight.defined()
                          ? (stream[c] - mean) * rstd *
                                    (a.weight.data[c] + static_cast<T>(a.zero_centred ? 1 : 0)) +
                                bias
                          : stream[c];
    }
  }
}

/// dx += rstd (t - x^ mean(x^ t)), dweight += dy x^, with t = dy weight and x^ = x rstd.
template <class T>
void rms_norm_backward::reference(const RmsNorm<T>& a) {
  const int64_t channels = a.x.channels;
  const T one = static_cast<T>(a.zero_centred ? 1 : 0);
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    const T* dy = a.y.grad_row(r);
    T square = 0;
    for (int64_t c = 0; c < channels; ++c) {
      square += x[c] * x[c];
    }
    const T rstd = 1 / std::sqrt(square / static_cast<T>(channels) + static_cast<T>(a.eps));
    T mean = 0;
    for (int64_t c = 0; c < channels; ++c) {
      mean += x[c] * rstd * dy[c] * (a.weight.data[c] + one);
    }
    mean /= static_cast<T>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      if (a.x.grad != nullptr) {
        a.x.grad_row(r)[c] += rstd * (dy[c] * (a.weight.data[c] + one) - x[c] * rstd * mean);
      }
      if (a.weight.grad != nullptr) {
        a.weight.grad[c] += dy[c] * x[c] * rstd;
      }
    }
  }
}

template <class T>
void layer_norm_forward::reference(const LayerNorm<T>& a) {
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    T mean;
    T rstd;
    layer_norm_statistics(x, a.x.channels, a.eps, &mean, &rstd);
    for (int64_t c = 0; c < a.x.channels; ++c) {
      const T bias = a.bias.defined() ? a.bias.data[c] : T{};
      a.y.row(r)[c] = (x[c] - mean) * rstd * a.weight.data[c] + bias;
    }
  }
}

/// dx += rstd (t - mean(t) - x^ mean(x^ t)), dweight += dy x^, dbias += dy, with t = dy weight and
/// x^ = (x - mean(x)) rstd.
template <class T>
void layer_norm_backward::reference(const LayerNorm<T>& a) {
  const int64_t channels = a.x.channels;
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    const T* dy = a.y.grad_row(r);
    T mean;
    T rstd;
    layer_norm_statistics(x, channels, a.eps, &mean, &rstd);
    T mean_t = 0;
    T mean_xt = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T t = dy[c] * a.weight.data[c];
      mean_t += t;
      mean_xt += (x[c] - mean) * rstd * t;
    }
    mean_t /= static_cast<T>(channels);
    mean_xt /= static_cast<T>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const T normed = (x[c] - mean) * rstd;
      if (a.x.grad != nullptr) {
        a.x.grad_row(r)[c] += rstd * (dy[c] * a.weight.data[c] - mean_t - normed * mean_xt);
      }
      if (a.weight.grad != nullptr) {
        a.weight.grad[c] += dy[c] * normed;
      }
      if (a.bias.grad != nullptr) {
        a.bias.grad[c] += dy[c];
      }
    }
  }
}

/// silu or sigmoid of a gate.
template <class T>
T gate_value(bool sigmoid, T z) {
  const T s = 1 / (1 + std::exp(-z));
  return sigmoid ? s : z * s;
}
template <class T>
T gate_slope(bool sigmoid, T z) {
  const T s = 1 / (1 + std::exp(-z));
  return sigmoid ? s * (1 - s) : s * (1 + z * (1 - s));
}

template <class T>
void gated_norm_forward::reference(const GatedNorm<T>& a) {
  const int64_t channels = a.x.channels;
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    const T* z = a.gate.row(r);
    const T* w = a.weight.data + r % a.groups * a.weight_step;
    T square = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T u = a.gate_first ? x[c] * gate_value(a.sigmoid, z[c]) : x[c];
      square += u * u;
    }
    const T rstd = 1 / std::sqrt(square / static_cast<T>(channels) + static_cast<T>(a.eps));
    for (int64_t c = 0; c < channels; ++c) {
      a.y.row(r)[c] = x[c] * gate_value(a.sigmoid, z[c]) * rstd * w[c];
    }
  }
}

/// Gate first: with u = x a(z), t = dy weight: du = rstd (t - u^ mean(u^ t)), dx += du a(z),
/// dgate += du x a'(z). Norm first: with t = dy weight a(z): dx += rstd (t - x^ mean(x^ t)),
/// dgate += dy x^ weight a'(z). Either way dweight += dy x a(z) rstd.
template <class T>
void gated_norm_backward::reference(const GatedNorm<T>& a) {
  const int64_t channels = a.x.channels;
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    const T* z = a.gate.row(r);
    const int64_t at_weight = r % a.groups * a.weight_step;
    const T* w = a.weight.data + at_weight;
    const T* dy = a.y.grad_row(r);
    T square = 0;
    T dot = 0;  // of what is normalised with its scaled gradient: x a(z) dy w in either order
    for (int64_t c = 0; c < channels; ++c) {
      const T value = gate_value(a.sigmoid, z[c]);
      const T u = a.gate_first ? x[c] * value : x[c];
      square += u * u;
      dot += x[c] * value * dy[c] * w[c];
    }
    const T rstd = 1 / std::sqrt(square / static_cast<T>(channels) + static_cast<T>(a.eps));
    const T mean = dot * rstd * rstd / static_cast<T>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const T value = gate_value(a.sigmoid, z[c]);
      const T slope = gate_slope(a.sigmoid, z[c]);
      const T t = dy[c] * w[c];
      const T du =
          a.gate_first ? rstd * (t - x[c] * value * mean) : rstd * (t * value - x[c] * mean);
      if (a.x.grad != nullptr) {
        a.x.grad_row(r)[c] += a.gate_first ? du * value : du;
      }
      if (a.gate.grad != nullptr) {
        a.gate.grad_row(r)[c] += (a.gate_first ? du : t * rstd) * x[c] * slope;
      }
      if (a.weight.grad != nullptr) {
        a.weight.grad[at_weight + c] += dy[c] * x[c] * value * rstd;
      }
    }
  }
}

template <class T>
void l2_norm_forward::reference(const L2Norm<T>& a) {
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    T square = 0;
    for (int64_t c = 0; c < a.x.channels; ++c) {
      square += x[c] * x[c];
    }
    const T inverse = 1 / std::sqrt(square + static_cast<T>(a.eps));
    for (int64_t c = 0; c < a.x.channels; ++c) {
      a.y.row(r)[c] = static_cast<T>(a.scale) * x[c] * inverse;
    }
  }
}

/// With r = rsqrt(sum(x^2) + eps): dx += scale r (dy - x r^2 (x . dy)).
template <class T>
void l2_norm_backward::reference(const L2Norm<T>& a) {
  for (int64_t r = 0; r < a.x.count(); ++r) {
    const T* x = a.x.row(r);
    const T* dy = a.y.grad_row(r);
    T square = 0;
    T dot = 0;
    for (int64_t c = 0; c < a.x.channels; ++c) {
      square += x[c] * x[c];
      dot += x[c] * dy[c];
    }
    const T inverse = 1 / std::sqrt(square + static_cast<T>(a.eps));
    for (int64_t c = 0; c < a.x.channels; ++c) {
      a.x.grad_row(r)[c] +=
          static_cast<T>(a.scale) * inverse * (dy[c] - x[c] * inverse * inverse * dot);
    }
  }
}

}  // namespace cambium
