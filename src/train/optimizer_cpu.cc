#include "base/parallel.h"
#include "base/simd.h"
#include "train/optimizer_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kGrain = 16384;
constexpr int64_t kBlock = 1024;

inline vf root(vf x) {
  float lanes[kLanes];
  vstore(lanes, x);
  for (float& lane : lanes) {
    lane = __builtin_sqrtf(lane);
  }
  return vload(lanes);
}

}  // namespace

void adamw_update(const AdamwUpdate& a) {
  parallel_for(a.n, kGrain, [&](int64_t begin, int64_t end) {
    const float keep = 1.0F - a.rate * a.weight_decay;
    const auto update = [&](vf p, vf g, vf& m, vf& v) {
      g *= a.gradient_scale;
      m = a.beta1 * m + (1.0F - a.beta1) * g;
      v = a.beta2 * v + (1.0F - a.beta2) * g * g;
      return p * keep - a.rate * (m * a.m_correction) / (root(v * a.v_correction) + a.epsilon);
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      vf m = vload(a.m + i);
      vf v = vload(a.v + i);
      vstore(a.p + i, update(vload(a.p + i), vload(a.g + i), m, v));
      vstore(a.m + i, m);
      vstore(a.v + i, v);
      vstore(a.g + i, vf{});
    }
    if (i < end) {
      const int64_t n = end - i;
      vf m = vload_part(a.m + i, n);
      vf v = vload_part(a.v + i, n);
      vstore_part(a.p + i, update(vload_part(a.p + i, n), vload_part(a.g + i, n), m, v), n);
      vstore_part(a.m + i, m, n);
      vstore_part(a.v + i, v, n);
      vstore_part(a.g + i, vf{}, n);
    }
  });
}

void sum_squares(const SumSquares& a) {
  double sum = 0.0;
  for (int64_t block = 0; block < a.n; block += kBlock) {
    const int64_t end = block + kBlock < a.n ? block + kBlock : a.n;
    vf s = {};
    int64_t i = block;
    for (; i + kLanes <= end; i += kLanes) {
      const vf x = vload(a.x + i);
      s += x * x;
    }
    if (i < end) {
      const vf x = vload_part(a.x + i, end - i);
      s += x * x;
    }
    sum += static_cast<double>(vsum(s));
  }
  *a.result = sum;
}

}  // namespace cambium::CAMBIUM_ISA
