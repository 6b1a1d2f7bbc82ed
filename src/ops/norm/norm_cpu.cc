#include "base/parallel.h"
#include "base/simd.h"
#include "ops/norm/norm_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kRowsPerPiece = 64;

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_rms(const float* x, int64_t n, float eps) {
  vf sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf v = vload(x + i);
    sum += v * v;
  }
  if (i < n) {
    const vf v = vload_part(x + i, n - i);
    sum += v * v;
  }
  return 1.0F / __builtin_sqrtf(vsum(sum) / static_cast<float>(n) + eps);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  parallel_for(a.rows.count(), kRowsPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = a.x + a.rows.offset(r);
      float* y = a.y + r * a.channels;
      const float rstd = inverse_rms(x, a.channels, a.eps);
      int64_t c = 0;
      for (; c + kLanes <= a.channels; c += kLanes) {
        vstore(y + c, vload(x + c) * rstd * vload(a.weight + c));
      }
      for (; c < a.channels; ++c) {
        y[c] = x[c] * rstd * a.weight[c];
      }
    }
  });
}

// Two loops so that every sum is taken in a fixed order: rows own dx, columns own dweight.
void rms_norm_backward(const RmsNormBackward& a) {
  if (a.dx != nullptr) {
    parallel_for(a.rows.count(), kRowsPerPiece, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const float* x = a.x + a.rows.offset(r);
        const float* dy = a.dy + r * a.channels;
        float* dx = a.dx + a.rows.offset(r);
        const float rstd = inverse_rms(x, a.channels, a.eps);
        vf dots = {};
        int64_t c = 0;
        for (; c + kLanes <= a.channels; c += kLanes) {
          dots += vload(x + c) * vload(dy + c) * vload(a.weight + c);
        }
        float dot = vsum(dots);
        for (; c < a.channels; ++c) {
          dot += x[c] * dy[c] * a.weight[c];
        }
        const float mean = dot * rstd * rstd / static_cast<float>(a.channels);
        for (c = 0; c + kLanes <= a.channels; c += kLanes) {
          const vf t = vload(dy + c) * vload(a.weight + c) - vload(x + c) * mean;
          vstore(dx + c, vload(dx + c) + t * rstd);
        }
        for (; c < a.channels; ++c) {
          dx[c] += rstd * (dy[c] * a.weight[c] - x[c] * mean);
        }
      }
    });
  }
  if (a.dweight != nullptr) {
    parallel_for(a.channels, 4 * kLanes, [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; r < a.rows.count(); ++r) {
        const float* x = a.x + a.rows.offset(r);
        const float* dy = a.dy + r * a.channels;
        const float rstd = inverse_rms(x, a.channels, a.eps);
        for (int64_t c = begin; c < end; ++c) {
          a.dweight[c] += dy[c] * x[c] * rstd;
        }
      }
    });
  }
}

}  // namespace cambium::CAMBIUM_ISA
