#include "base/parallel.h"
#include "base/simd.h"
#include "ops/rope/rope_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

template <bool kAdd>
void put(float* y, vf value, int64_t n) {
  vstore_upto(y, kAdd ? vload_upto(y, n) + value : value, n);
}

/// y = x turned by (cos, sin), or by the inverse and added to y.
template <bool kBackward>
void turn(const Rope<float>& a, int64_t t, const float* x, float* y) {
  const float* cos = a.cos + t * a.half;
  const float* sin = a.sin + t * a.half;
  const vf scale = vset(a.scale == nullptr ? 1.0F : a.scale[t]);
  if (a.interleaved) {
    for (int64_t i = 0; i < a.half; ++i) {
      const float s = (kBackward ? -sin[i] : sin[i]) * scale[0];
      const float c = cos[i] * scale[0];
      const float y1 = x[2 * i] * c - x[2 * i + 1] * s;
      const float y2 = x[2 * i + 1] * c + x[2 * i] * s;
      y[2 * i] = kBackward ? y[2 * i] + y1 : y1;
      y[2 * i + 1] = kBackward ? y[2 * i + 1] + y2 : y2;
    }
  }
  for (int64_t i = 0; !a.interleaved && i < a.half; i += kLanes) {
    const int64_t n = a.half - i;
    const vf x1 = vload_upto(x + i, n);
    const vf x2 = vload_upto(x + a.half + i, n);
    const vf c = vload_upto(cos + i, n);
    const vf s = kBackward ? -vload_upto(sin + i, n) : vload_upto(sin + i, n);
    put<kBackward>(y + i, (x1 * c - x2 * s) * scale, n);
    put<kBackward>(y + a.half + i, (x2 * c + x1 * s) * scale, n);
  }
  const int64_t channels = a.x.channels;
  for (int64_t i = 2 * a.half; i < channels; i += kLanes) {
    put<kBackward>(y + i, vload_upto(x + i, channels - i) * scale, channels - i);
  }
}

template <class Head>
void for_each_head(const Rope<float>& a, const Head& head) {
  const int64_t heads = a.x.rows.inner;
  const int64_t grain = 8192 / (heads * a.x.channels + 1) + 1;
  parallel_for(a.x.rows.outer, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        head(t, h);
      }
    }
  });
}

}  // namespace

void rope_forward(const Ropes<float>& all) {
  for (int64_t i = 0; i < all.count; ++i) {
    const Rope<float>& a = all.each[i];
    for_each_head(a,
                  [&](int64_t t, int64_t h) { turn<false>(a, t, a.x.row(t, h), a.y.row(t, h)); });
  }
}

void rope_backward(const Ropes<float>& all) {
  for (int64_t i = 0; i < all.count; ++i) {
    const Rope<float>& a = all.each[i];
    if (a.x.grad != nullptr) {
      for_each_head(a, [&](int64_t t, int64_t h) {
        turn<true>(a, t, a.y.grad_row(t, h), a.x.grad_row(t, h));
      });
    }
  }
}

}  // namespace cambium::CAMBIUM_ISA
