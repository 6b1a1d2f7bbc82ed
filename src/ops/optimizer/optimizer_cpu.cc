#include "base/parallel.h"
#include "base/simd.h"
#include "ops/optimizer/optimizer_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kGrain = 16384;
constexpr int64_t kBlocksPerPiece = kGrain / kReductionBlock;

inline vf root(vf x) {
  float lanes[kLanes];
  vstore(lanes, x);
  for (float& lane : lanes) {
    lane = __builtin_sqrtf(lane);
  }
  return vload(lanes);
}

// Calls f(element, count of lanes) for n elements, in parallel.
template <class F>
void for_elements(int64_t n, F f) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      f(i, static_cast<int64_t>(kLanes));
    }
    if (i < end) {
      f(i, end - i);
    }
  });
}

// Calls f(row, column, count of lanes) for a matrix, in parallel.
template <class F>
void for_matrix(int64_t rows, int64_t columns, F f) {
  parallel_for(rows, kGrain / (columns + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        f(r, c, columns - c < kLanes ? columns - c : kLanes);
      }
    }
  });
}

// The lanes of row r at column c of a matrix that lies transposed, rows apart.
inline vf load_column(const float* x, int64_t rows, int64_t r, int64_t c, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t l = 0; l < n; ++l) {
    lanes[l] = x[(c + l) * rows + r];
  }
  return vload(lanes);
}
inline void store_column(float* x, int64_t rows, int64_t r, int64_t c, vf value, int64_t n) {
  float lanes[kLanes];
  vstore(lanes, value);
  for (int64_t l = 0; l < n; ++l) {
    x[(c + l) * rows + r] = lanes[l];
  }
}

struct Moments {
  vf m, v;
};

/// A step of n elements from i on: writes p and gives the moments to be stored.
template <class Args>
Moments adamw_step(const Args& a, int64_t i, int64_t n) {
  const AdamwConfig& o = a.config;
  const float keep = 1.0F - o.rate * o.weight_decay;
  const vf g = vload_upto(a.g + i, n) * o.gradient_scale;
  const vf m = o.beta1 * vload_upto(a.m + i, n) + (1.0F - o.beta1) * g;
  const vf v = o.beta2 * vload_upto(a.v + i, n) + (1.0F - o.beta2) * g * g;
  const vf step = o.rate * (m * o.m_correction) / (root(v * o.v_correction) + o.epsilon);
  vstore_upto(a.p + i, vload_upto(a.p + i, n) * keep - step, n);
  return {m, v};
}

}  // namespace

void adamw(const Adamw<float>& a) {
  for_elements(a.n, [&](int64_t i, int64_t n) {
    const auto [m, v] = adamw_step(a, i, n);
    vstore_upto(a.m + i, m, n);
    vstore_upto(a.v + i, v, n);
  });
}

void adamw_narrow(const AdamwNarrow<float>& a) {
  for_elements(a.n, [&](int64_t i, int64_t n) {
    const auto [m, v] = adamw_step(a, i, n);
    float m_lanes[kLanes];
    float v_lanes[kLanes];
    vstore(m_lanes, m);
    vstore(v_lanes, v);
    for (int64_t k = 0; k < n; ++k) {
      a.m[i + k] = rounded_m(a.key, i + k, m_lanes[k]);
      a.v[i + k] = rounded_v(a.key, i + k, v_lanes[k]);
    }
  });
}

void muon_momentum(const MuonMomentum<float>& a) {
  for_matrix(a.rows, a.columns, [&](int64_t r, int64_t c, int64_t n) {
    const int64_t i = r * a.columns + c;
    const vf g = (1.0F - a.momentum) * (vload_upto(a.g + i, n) * a.gradient_scale);
    const vf m = a.momentum * vload_upto(a.m + i, n) + g;
    const vf u = a.momentum * m + g;
    vstore_upto(a.m + i, m, n);
    if (a.rows <= a.columns) {
      vstore_upto(a.x + i, u, n);
    } else {
      store_column(a.x, a.rows, r, c, u, n);
    }
  });
}

void scale_in_place(const Scale<float>& a) {
  for_elements(a.n, [&](int64_t i, int64_t n) {
    vstore_upto(a.x + i, vload_upto(a.x + i, n) * a.factor, n);
  });
}

void muon_polynomial(const MuonPolynomial<float>& a) {
  for_matrix(a.count * a.n, a.n, [&](int64_t r, int64_t c, int64_t n) {
    const int64_t i = r * a.n + c;
    const vf sum = a.b * vload_upto(a.x + i, n) + a.c * vload_upto(a.square + i, n);
    vstore_upto(a.square + i, sum, n);
    const int64_t diagonal = r % a.n;
    if (diagonal >= c && diagonal < c + n) {
      a.square[r * a.n + diagonal] += a.a;
    }
  });
}

void muon_apply(const MuonApply<float>& a) {
  for_matrix(a.rows, a.columns, [&](int64_t r, int64_t c, int64_t n) {
    const int64_t i = r * a.columns + c;
    const vf x = a.rows <= a.columns ? vload_upto(a.x + i, n) : load_column(a.x, a.rows, r, c, n);
    vstore_upto(a.p + i, vload_upto(a.p + i, n) * a.keep - a.factor * x, n);
    vstore_upto(a.g + i, vf{}, n);
  });
}

void block_squares(const Reduction<float>& a) {
  parallel_for(a.blocks(), kBlocksPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = a.end(block);
      vf sum = {};
      for (int64_t i = block * kReductionBlock; i < last; i += kLanes) {
        const vf x = vload_upto(a.x + i, last - i);
        sum += x * x;
      }
      a.part[block] = static_cast<double>(vsum(sum));
    }
  });
}

void block_not_finite(const Reduction<float>& a) {
  parallel_for(a.blocks(), kBlocksPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = a.end(block);
      vf found = {};
      for (int64_t i = block * kReductionBlock; i < last; i += kLanes) {
        const vf x = vload_upto(a.x + i, last - i);
        found += x - x == vf{} ? vf{} : vset(1.0F);  // NaN - NaN and inf - inf are NaN
      }
      a.part[block] = static_cast<double>(vsum(found));
    }
  });
}

void fold_parts(const FoldParts<float>& a) {
  for (int64_t group = 0; group < a.groups(); ++group) {
    double sum = 0;
    for (int64_t i = group * kReductionBlock; i < a.end(group); ++i) {
      sum += a.part[i];
    }
    a.total[group] = sum;
  }
}

}  // namespace cambium::CAMBIUM_ISA
