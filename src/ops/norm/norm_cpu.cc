#include "base/parallel.h"
#include "base/simd.h"
#include "ops/norm/norm_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kElementsPerPiece = 8192;
// Columns of a weight whose gradient one piece sums over all rows.
constexpr int64_t kColumnsPerPiece = 64;
constexpr int kColumnVectors = kColumnsPerPiece / kLanes;

inline int64_t rows_per_piece(int64_t channels) {
  return kElementsPerPiece / (channels < 1 ? 1 : channels) + 1;
}

// Calls f(row) for every row, in parallel.
template <class F>
void for_rows(const Rows& rows, int64_t channels, F f) {
  parallel_for(rows.count(), rows_per_piece(channels), [&](int64_t begin, int64_t end) {
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
void gated_forward(const GatedNormForward& a) {
  for_rows(a.x_rows, a.group, [&](int64_t r) {
    const float* x = a.x + a.x_rows.offset(r);
    const float* gate = a.gate + a.gate_rows.offset(r);
    const float* weight = a.weight + r % a.x_rows.inner * a.weight_step;
    float* y = a.y + r * a.group;
    vf squares = {};
    for_columns(a.group, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      const vf gated = v * gate_of<kSigmoid>(vload_upto(gate + c, n)).value;
      squares += kGateFirst ? gated * gated : v * v;
      vstore_upto(y + c, gated, n);
    });
    const float rstd = inverse_root(vsum(squares), a.group, a.eps);
    for_columns(a.group, [&](int64_t c, int64_t n) {
      vstore_upto(y + c, vload_upto(y + c, n) * rstd * vload_upto(weight + c, n), n);
    });
  });
}

template <bool kGateFirst, bool kSigmoid>
void gated_backward(const GatedNormBackward& a) {
  for_rows(a.x_rows, a.group, [&](int64_t r) {
    const int64_t at_x = a.x_rows.offset(r);
    const int64_t at_gate = a.gate_rows.offset(r);
    const float* weight = a.weight + r % a.x_rows.inner * a.weight_step;
    const float* dy = a.dy + r * a.group;
    vf squares = {};
    vf dots = {};
    for_columns(a.group, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(a.x + at_x + c, n);
      const vf gated = v * gate_of<kSigmoid>(vload_upto(a.gate + at_gate + c, n)).value;
      squares += kGateFirst ? gated * gated : v * v;
      dots += gated * vload_upto(dy + c, n) * vload_upto(weight + c, n);
    });
    const float rstd = inverse_root(vsum(squares), a.group, a.eps);
    const float mean = vsum(dots) * rstd * rstd / static_cast<float>(a.group);
    a.rstd[r] = rstd;
    for_columns(a.group, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(a.x + at_x + c, n);
      const Gate g = gate_of<kSigmoid>(vload_upto(a.gate + at_gate + c, n));
      const vf t = vload_upto(dy + c, n) * vload_upto(weight + c, n);
      const vf du = kGateFirst ? (t - v * g.value * mean) * rstd : (t * g.value - v * mean) * rstd;
      if (a.dx != nullptr) {
        float* dx = a.dx + at_x + c;
        vstore_upto(dx, vload_upto(dx, n) + (kGateFirst ? du * g.value : du), n);
      }
      if (a.dgate != nullptr) {
        float* dgate = a.dgate + at_gate + c;
        vstore_upto(dgate, vload_upto(dgate, n) + (kGateFirst ? du : t * rstd) * v * g.slope, n);
      }
    });
  });
  if (a.dweight == nullptr) {
    return;
  }
  // A weight of its own per group has a sum over tokens for each; a shared one sums over all rows.
  const int64_t weights = a.weight_step == 0 ? 1 : a.x_rows.inner;
  const int64_t pieces = (a.group + kColumnsPerPiece - 1) / kColumnsPerPiece;
  parallel_for(weights * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t group = piece / pieces;
      const int64_t begin = piece % pieces * kColumnsPerPiece;
      const int64_t end = begin + kColumnsPerPiece < a.group ? begin + kColumnsPerPiece : a.group;
      sum_rows(group, weights, a.x_rows.count(), begin, end, a.dweight + group * a.weight_step,
               [&](int64_t r, int64_t c, int64_t n) {
                 const vf v = vload_upto(a.x + a.x_rows.offset(r) + c, n);
                 const vf z = vload_upto(a.gate + a.gate_rows.offset(r) + c, n);
                 const vf dy = vload_upto(a.dy + r * a.group + c, n);
                 return dy * v * gate_of<kSigmoid>(z).value * a.rstd[r];
               });
    }
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  for_rows(a.rows, a.channels, [&](int64_t r) {
    const float* x = a.x + a.rows.offset(r);
    float* y = a.y + r * a.channels;
    vf squares = {};
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
    });
    const float rstd = inverse_root(vsum(squares), a.channels, a.eps);
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      vstore_upto(y + c, vload_upto(x + c, n) * rstd * vload_upto(a.weight + c, n), n);
    });
  });
}

// Two loops so that every sum is taken in a fixed order: rows own dx, columns own dweight.
void rms_norm_backward(const RmsNormBackward& a) {
  for_rows(a.rows, a.channels, [&](int64_t r) {
    const float* x = a.x + a.rows.offset(r);
    const float* dy = a.dy + r * a.channels;
    vf squares = {};
    vf dots = {};
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
      dots += v * vload_upto(dy + c, n) * vload_upto(a.weight + c, n);
    });
    const float rstd = inverse_root(vsum(squares), a.channels, a.eps);
    const float mean = vsum(dots) * rstd * rstd / static_cast<float>(a.channels);
    a.rstd[r] = rstd;
    if (a.dx == nullptr) {
      return;
    }
    float* dx = a.dx + a.rows.offset(r);
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      const vf t =
          vload_upto(dy + c, n) * vload_upto(a.weight + c, n) - vload_upto(x + c, n) * mean;
      vstore_upto(dx + c, vload_upto(dx + c, n) + t * rstd, n);
    });
  });
  if (a.dweight == nullptr) {
    return;
  }
  parallel_for(a.channels, kColumnsPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += kColumnsPerPiece) {
      sum_rows(0, 1, a.rows.count(), b, end < b + kColumnsPerPiece ? end : b + kColumnsPerPiece,
               a.dweight, [&](int64_t r, int64_t c, int64_t n) {
                 return vload_upto(a.x + a.rows.offset(r) + c, n) *
                        vload_upto(a.dy + r * a.channels + c, n) * a.rstd[r];
               });
    }
  });
}

void gated_norm_forward(const GatedNormForward& a) {
  if (a.gate_first) {
    a.sigmoid ? gated_forward<true, true>(a) : gated_forward<true, false>(a);
  } else {
    a.sigmoid ? gated_forward<false, true>(a) : gated_forward<false, false>(a);
  }
}

void gated_norm_backward(const GatedNormBackward& a) {
  if (a.gate_first) {
    a.sigmoid ? gated_backward<true, true>(a) : gated_backward<true, false>(a);
  } else {
    a.sigmoid ? gated_backward<false, true>(a) : gated_backward<false, false>(a);
  }
}

void l2_norm_forward(const L2NormForward& a) {
  for_rows(a.rows, a.channels, [&](int64_t r) {
    const float* x = a.x + a.rows.offset(r);
    float* y = a.y + r * a.channels;
    vf squares = {};
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
    });
    const float factor = a.scale * inverse_root(vsum(squares), 1, a.eps);
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      vstore_upto(y + c, vload_upto(x + c, n) * factor, n);
    });
  });
}

void l2_norm_backward(const L2NormBackward& a) {
  for_rows(a.rows, a.channels, [&](int64_t r) {
    const float* x = a.x + a.rows.offset(r);
    const float* dy = a.dy + r * a.channels;
    float* dx = a.dx + a.rows.offset(r);
    vf squares = {};
    vf dots = {};
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      const vf v = vload_upto(x + c, n);
      squares += v * v;
      dots += v * vload_upto(dy + c, n);
    });
    const float inverse = inverse_root(vsum(squares), 1, a.eps);
    const float along = vsum(dots) * inverse * inverse;
    for_columns(a.channels, [&](int64_t c, int64_t n) {
      const vf t = vload_upto(dy + c, n) - vload_upto(x + c, n) * along;
      vstore_upto(dx + c, vload_upto(dx + c, n) + t * (a.scale * inverse), n);
    });
  });
}

}  // namespace cambium::CAMBIUM_ISA
