#include "ops/elements_simd.h"
#include "ops/norm/norm_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Columns of a weight whose gradient one piece sums over all rows.
constexpr int64_t kColumnsPerPiece = 64;
constexpr int kColumnVectors = kColumnsPerPiece / kLanes;

// Calls f(row) for every row, in parallel.
template <class F>
void for_rows(const View<float>& x, F f) {
  parallel_for(x.count(), rows_per_piece(x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      f(r);
    }
  });
}

// Calls f(column, count of lanes) along a row.
template <class F>
inline void for_columns(int64_t channels, F f) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    f(c, channels - c < kLanes ? channels - c : kLanes);
  }
}

inline float inverse_root(float square, int64_t n, float eps) {
  return 1.0F / __builtin_sqrtf(square / static_cast<float>(n) + eps);
}

// sum[c] += the sum over rows r = first, first + step, ... of value(r, c, lanes), for columns
// [begin, end), at most kColumnsPerPiece: the rows are read once, the sums stay in registers.
template <class F>
inline void sum_rows(int64_t first, int64_t step, int64_t rows, int64_t begin, int64_t end,
                     float* sum, F value) {
  vf total[kColumnVectors] = {};
  for (int64_t r = first; r < rows; r += step) {
    int j = 0;
    for (int64_t c = begin; c < end; c += kLanes) {
      total[j++] += value(r, c, end - c);
    }
  }
  int j = 0;
  for (int64_t c = begin; c < end; c += kLanes) {
    vstore_upto(sum + c, vload_upto(sum + c, end - c) + total[j++], end - c);
  }
}

// A sum over all rows of value(r, c, lanes) is added to the gradient of each column of a weight.
template <class F>
void sum_columns(const View<float>& x, float* sum, F value) {
  parallel_for(x.channels, kColumnsPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += kColumnsPerPiece) {
      sum_rows(0, 1, x.count(), b, end < b + kColumnsPerPiece ? end : b + kColumnsPerPiece, sum,
               value);
    }
  });
}

struct Gate {
  vf value, slope;
};
template <bool kSigmoid>
inline Gate gate_of(vf z) {
  const vf s = vsigmoid(z);
  if constexpr (kSigmoid) {
    return {s, s * (1.0F - s)};
  } else {
    return {z * s, s * (1.0F + z * (1.0F - s))};
  }
}

template <bool kGateFirst, bool kSigmoid>
void gated_forward(const GatedNorm<float>& a) {
  const int64_t channels = a.x.channels;
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    const float* gate = a.gate.row(r);
    const float* weight = a.weight.data + r % a.groups * a.weight_step;
    float* y = a.y.row(r);
    vf squares = {};
    for_columns(channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      const vf gated = v * gate_of<kSigmoid>(vload_upto(gate + c, n)).value;
      squares += kGateFirst ? gated * gated : v * v;
      vstore_upto(y + c, gated, n);
    });
    const float rstd = inverse_root(vsum(squares), channels, a.eps);
    for_columns(channels, [&](int64_t c, int64_t n) {
      vstore_upto(y + c, vload_upto(y + c, n) * rstd * vload_upto(weight + c, n), n);
    });
  });
}

template <bool kGateFirst, bool kSigmoid>
void gated_backward(const GatedNorm<float>& a) {
  const int64_t channels = a.x.channels;
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    const float* gate = a.gate.row(r);
    const float* weight = a.weight.data + r % a.groups * a.weight_step;
    const float* dy = a.y.grad_row(r);
    vf squares = {};
    vf dots = {};
    for_columns(channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      const vf gated = v * gate_of<kSigmoid>(vload_upto(gate + c, n)).value;
      squares += kGateFirst ? gated * gated : v * v;
      dots += gated * vload_upto(dy + c, n) * vload_upto(weight + c, n);
    });
    const float rstd = inverse_root(vsum(squares), channels, a.eps);
    const float mean = vsum(dots) * rstd * rstd / static_cast<float>(channels);
    a.rstd[r] = rstd;
    for_columns(channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      const Gate g = gate_of<kSigmoid>(vload_upto(gate + c, n));
      const vf t = vload_upto(dy + c, n) * vload_upto(weight + c, n);
      const vf du = kGateFirst ? (t - v * g.value * mean) * rstd : (t * g.value - v * mean) * rstd;
      if (a.x.grad != nullptr) {
        float* dx = a.x.grad_row(r) + c;
        vstore_upto(dx, vload_upto(dx, n) + (kGateFirst ? du * g.value : du), n);
      }
      if (a.gate.grad != nullptr) {
        float* dgate = a.gate.grad_row(r) + c;
        vstore_upto(dgate, vload_upto(dgate, n) + (kGateFirst ? du : t * rstd) * v * g.slope, n);
      }
    });
  });
  if (a.weight.grad == nullptr) {
    return;
  }
  // A weight of its own per group has a sum over tokens for each; a shared one sums over all rows.
  const int64_t weights = a.weight_step == 0 ? 1 : a.groups;
  const int64_t pieces = (channels + kColumnsPerPiece - 1) / kColumnsPerPiece;
  parallel_for(weights * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t group = piece / pieces;
      const int64_t begin = piece % pieces * kColumnsPerPiece;
      const int64_t end = begin + kColumnsPerPiece < channels ? begin + kColumnsPerPiece : channels;
      sum_rows(group, weights, a.x.count(), begin, end, a.weight.grad + group * a.weight_step,
               [&](int64_t r, int64_t c, int64_t n) {
                 const vf v = vload_upto(a.x.row(r) + c, n);
                 const vf z = vload_upto(a.gate.row(r) + c, n);
                 const vf dy = vload_upto(a.y.grad_row(r) + c, n);
                 return dy * v * gate_of<kSigmoid>(z).value * a.rstd[r];
               });
    }
  });
}

template <bool kZeroCentred>
inline vf rms_weight(const float* weight, int64_t n) {
  const vf w = vload_upto(weight, n);
  return kZeroCentred ? w + 1.0F : w;
}

template <bool kZeroCentred>
void rms_forward(const RmsNorm<float>& a) {
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    float* y = a.y.row(r);
    vf squares = {};
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
    });
    const float rstd = inverse_root(vsum(squares), a.x.channels, a.eps);
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf w = rms_weight<kZeroCentred>(a.weight.data + c, n);
      vstore_upto(y + c, vload_upto(x + c, n) * rstd * w, n);
    });
  });
}

struct Statistics {
  float mean, rstd;
};
// Two passes: the variance is the mean square of what is left when the mean is gone.
inline Statistics layer_statistics(const float* x, int64_t channels, float eps) {
  vf sums = {};
  for_columns(channels, [&](int64_t c, int64_t n) { sums += vload_upto(x + c, n); });
  const float mean = vsum(sums) / static_cast<float>(channels);
  vf squares = {};
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const vf v = vload(x + c) - mean;
    squares += v * v;
  }
  float square = vsum(squares);
  for (; c < channels; ++c) {
    square += (x[c] - mean) * (x[c] - mean);
  }
  return {mean, inverse_root(square, channels, eps)};
}

template <bool kZeroCentred>
void add_rms_forward(const AddRmsNorm<float>& a) {
  for_rows(a.stream, [&](int64_t r) {
    float* stream = a.stream.row(r);
    const float* y = a.y.row(r);
    vf squares = {};
    for_columns(a.stream.channels, [&](int64_t c, int64_t n) {
      vf v = a.out * vload_upto(y + c, n);
      if (a.keep != 0.0F) {
        v = a.keep * vload_upto(stream + c, n) + v;
      }
      vstore_upto(stream + c, v, n);
      squares += v * v;
    });
    if (!a.x.defined()) {
      return;
    }
    float* x = a.x.row(r);
    const Statistics s =
        a.layer ? layer_statistics(stream, a.stream.channels, a.eps)
                : Statistics{0.0F, inverse_root(vsum(squares), a.stream.channels, a.eps)};
    for_columns(a.stream.channels, [&](int64_t c, int64_t n) {
      vf v = vload_upto(stream + c, n);
      if (a.weight.defined()) {
        v = (v - s.mean) * s.rstd * rms_weight<kZeroCentred>(a.weight.data + c, n);
      }
      if (a.bias.defined()) {
        v += vload_upto(a.bias.data + c, n);
      }
      vstore_upto(x + c, v, n);
    });
  });
}

// Two loops so that every sum is taken in a fixed order: rows own dx, columns own dweight.
template <bool kZeroCentred>
void rms_backward(const RmsNorm<float>& a) {
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    const float* dy = a.y.grad_row(r);
    vf squares = {};
    vf dots = {};
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
      dots += v * vload_upto(dy + c, n) * rms_weight<kZeroCentred>(a.weight.data + c, n);
    });
    const float rstd = inverse_root(vsum(squares), a.x.channels, a.eps);
    const float mean = vsum(dots) * rstd * rstd / static_cast<float>(a.x.channels);
    a.rstd[r] = rstd;
    if (a.x.grad == nullptr) {
      return;
    }
    float* dx = a.x.grad_row(r);
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf w = rms_weight<kZeroCentred>(a.weight.data + c, n);
      const vf t = vload_upto(dy + c, n) * w - vload_upto(x + c, n) * mean;
      vstore_upto(dx + c, vload_upto(dx + c, n) + t * rstd, n);
    });
  });
  if (a.weight.grad != nullptr) {
    sum_columns(a.x, a.weight.grad, [&](int64_t r, int64_t c, int64_t n) {
      return vload_upto(a.x.row(r) + c, n) * vload_upto(a.y.grad_row(r) + c, n) * a.rstd[r];
    });
  }
}

}  // namespace

void rms_norm_forward(const RmsNorm<float>& a) {
  a.zero_centred ? rms_forward<true>(a) : rms_forward<false>(a);
}

void add_rms_norm_forward(const AddRmsNorm<float>& a) {
  a.zero_centred ? add_rms_forward<true>(a) : add_rms_forward<false>(a);
}

void rms_norm_backward(const RmsNorm<float>& a) {
  a.zero_centred ? rms_backward<true>(a) : rms_backward<false>(a);
}

void layer_norm_forward(const LayerNorm<float>& a) {
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    float* y = a.y.row(r);
    const Statistics s = layer_statistics(x, a.x.channels, a.eps);
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf bias = a.bias.defined() ? vload_upto(a.bias.data + c, n) : vf{};
      const vf normed = (vload_upto(x + c, n) - s.mean) * s.rstd;
      vstore_upto(y + c, normed * vload_upto(a.weight.data + c, n) + bias, n);
    });
  });
}

void layer_norm_backward(const LayerNorm<float>& a) {
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    const float* dy = a.y.grad_row(r);
    const auto channels = static_cast<float>(a.x.channels);
    const Statistics s = layer_statistics(x, a.x.channels, a.eps);
    a.mean[r] = s.mean;
    a.rstd[r] = s.rstd;
    if (a.x.grad == nullptr) {
      return;
    }
    vf sums = {};
    vf dots = {};
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf t = vload_upto(dy + c, n) * vload_upto(a.weight.data + c, n);
      sums += t;
      dots += t * (vload_upto(x + c, n) - s.mean);  // lanes past the row: t is zero
    });
    const float mean_t = vsum(sums) / channels;
    const float along = vsum(dots) * s.rstd * s.rstd / channels;
    float* dx = a.x.grad_row(r);
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf t = vload_upto(dy + c, n) * vload_upto(a.weight.data + c, n);
      const vf centred = vload_upto(x + c, n) - s.mean;
      vstore_upto(dx + c, vload_upto(dx + c, n) + (t - mean_t - centred * along) * s.rstd, n);
    });
  });
  if (a.weight.grad != nullptr) {
    sum_columns(a.x, a.weight.grad, [&](int64_t r, int64_t c, int64_t n) {
      const vf centred = vload_upto(a.x.row(r) + c, n) - a.mean[r];
      return centred * vload_upto(a.y.grad_row(r) + c, n) * a.rstd[r];
    });
  }
  if (a.bias.grad != nullptr) {
    sum_columns(a.x, a.bias.grad, [&](int64_t r, int64_t c, int64_t n) {
      return vload_upto(a.y.grad_row(r) + c, n);
    });
  }
}

void gated_norm_forward(const GatedNorm<float>& a) {
  if (a.gate_first) {
    a.sigmoid ? gated_forward<true, true>(a) : gated_forward<true, false>(a);
  } else {
    a.sigmoid ? gated_forward<false, true>(a) : gated_forward<false, false>(a);
  }
}

void gated_norm_backward(const GatedNorm<float>& a) {
  if (a.gate_first) {
    a.sigmoid ? gated_backward<true, true>(a) : gated_backward<true, false>(a);
  } else {
    a.sigmoid ? gated_backward<false, true>(a) : gated_backward<false, false>(a);
  }
}

void l2_norm_forward(const L2Norm<float>& a) {
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    float* y = a.y.row(r);
    vf squares = {};
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
    });
    const float factor = a.scale * inverse_root(vsum(squares), 1, a.eps);
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      vstore_upto(y + c, vload_upto(x + c, n) * factor, n);
    });
  });
}

void l2_norm_backward(const L2Norm<float>& a) {
  for_rows(a.x, [&](int64_t r) {
    const float* x = a.x.row(r);
    const float* dy = a.y.grad_row(r);
    float* dx = a.x.grad_row(r);
    vf squares = {};
    vf dots = {};
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
      dots += v * vload_upto(dy + c, n);
    });
    const float inverse = inverse_root(vsum(squares), 1, a.eps);
    const float along = vsum(dots) * inverse * inverse;
    for_columns(a.x.channels, [&](int64_t c, int64_t n) {
      const vf t = vload_upto(dy + c, n) - vload_upto(x + c, n) * along;
      vstore_upto(dx + c, vload_upto(dx + c, n) + t * (a.scale * inverse), n);
    });
  });
}

}  // namespace cambium::CAMBIUM_ISA
