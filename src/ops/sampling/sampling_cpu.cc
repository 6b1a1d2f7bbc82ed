#include "base/simd.h"
#include "ops/sampling/logit_rows.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Sums of exponentials are taken in fp32 over this many elements, then in fp64.
constexpr int64_t kBlock = 64 * kLanes;
constexpr float kInfinity = __builtin_inff();

inline vf load_or(const float* p, int64_t n, float fill) {
  if (n >= kLanes) {
    return vload(p);
  }
  float values[kLanes];
  vstore(values, vset(fill));
  vstore_part(values, vload_part(p, n), n);
  return vload(values);
}

}  // namespace

void read_logit_row(const LogitRow& row) {
  vf best = vset(0.0F) - kInfinity;
  vi where = vi{} - 1;
  vi index = {};
  vi ordered = vi{} - 1;
  for (int l = 0; l < kLanes; ++l) {
    index[l] = l;
  }
  for (int64_t i = 0; i < row.n; i += kLanes) {
    const vf v = load_or(row.logits + i, row.n - i, -kInfinity);
    const vi better = v > best;
    ordered &= v == v;
    best = better ? v : best;
    where = better ? index : where;
    index += kLanes;
  }
  float largest = -kInfinity;
  *row.largest = -1;
  for (int l = 0; l < kLanes; ++l) {
    if (ordered[l] == 0) {
      *row.largest = -1;
      return;
    }
    if (where[l] >= 0 && (best[l] > largest || (best[l] == largest && where[l] < *row.largest))) {
      largest = best[l];
      *row.largest = where[l];
    }
  }
  double sum = 0.0;
  for (int64_t block = 0; *row.largest >= 0 && block < row.n; block += kBlock) {
    const int64_t end = block + kBlock < row.n ? block + kBlock : row.n;
    vf part = {};
    for (int64_t i = block; i < end; i += kLanes) {
      part += vexp(load_or(row.logits + i, row.n - i, -kInfinity) - largest);
    }
    sum += static_cast<double>(vsum(part));
  }
  *row.log_sum = __builtin_log(sum);
}

}  // namespace cambium::CAMBIUM_ISA
