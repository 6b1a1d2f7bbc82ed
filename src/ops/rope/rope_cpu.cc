#include "base/parallel.h"
#include "base/simd.h"
#include "ops/rope/rope_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

inline void put(const Rotate& a, float* y, vf value, int64_t n) {
  vstore_upto(y, a.accumulate ? vload_upto(y, n) + value : value, n);
}

}  // namespace

void rotate(const Rotate& a) {
  const int64_t grain = 8192 / (a.x_rows.inner * a.channels + 1) + 1;
  parallel_for(a.x_rows.outer, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* cos = a.cos + a.position[t] * a.half;
      const float* sin = a.sin + a.position[t] * a.half;
      for (int64_t h = 0; h < a.x_rows.inner; ++h) {
        const float* x = a.x + t * a.x_rows.outer_stride + h * a.x_rows.inner_stride;
        float* y = a.y + t * a.y_rows.outer_stride + h * a.y_rows.inner_stride;
        for (int64_t i = 0; i < a.half; i += kLanes) {
          const int64_t n = a.half - i;
          const vf x1 = vload_upto(x + i, n);
          const vf x2 = vload_upto(x + a.half + i, n);
          const vf c = vload_upto(cos + i, n);
          const vf s = a.inverse ? -vload_upto(sin + i, n) : vload_upto(sin + i, n);
          put(a, y + i, x1 * c - x2 * s, n);
          put(a, y + a.half + i, x2 * c + x1 * s, n);
        }
        for (int64_t i = 2 * a.half; i < a.channels; i += kLanes) {
          put(a, y + i, vload_upto(x + i, a.channels - i), a.channels - i);
        }
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
