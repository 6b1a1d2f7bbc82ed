#include "base/parallel.h"
#include "base/simd.h"
#include "ops/pointwise/pointwise_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Elements of a piece: enough to pay for handing it to a thread.
constexpr int64_t kElementsPerPiece = 8192;

inline int64_t rows_per_piece(int64_t channels) {
  return kElementsPerPiece / (channels < 1 ? 1 : channels) + 1;
}

// y = f(a, b)
template <class F>
void pointwise(const Pointwise& p, F f) {
  parallel_for(p.a_rows.count(), rows_per_piece(p.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* a = p.a + p.a_rows.offset(r);
      const float* b = p.b == nullptr ? a : p.b + p.b_rows.offset(r);
      float* y = p.y + r * p.channels;
      for (int64_t c = 0; c < p.channels; c += kLanes) {
        const int64_t n = p.channels - c;
        vstore_upto(y + c, f(vload_upto(a + c, n), vload_upto(b + c, n)), n);
      }
    }
  });
}

// da += fa(a, b, dy), db += fb(a, b, dy). da may be the same memory as db: a + a.
template <class Fa, class Fb>
void pointwise_grad(const PointwiseGrad& p, Fa fa, Fb fb) {
  parallel_for(p.a_rows.count(), rows_per_piece(p.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at_a = p.a_rows.offset(r);
      const int64_t at_b = p.b == nullptr ? at_a : p.b_rows.offset(r);
      const float* a = p.a + at_a;
      const float* b = p.b == nullptr ? a : p.b + at_b;
      const float* dy = p.dy + r * p.channels;
      for (int64_t c = 0; c < p.channels; c += kLanes) {
        const int64_t n = p.channels - c;
        const vf va = vload_upto(a + c, n);
        const vf vb = vload_upto(b + c, n);
        const vf grad = vload_upto(dy + c, n);
        if (p.da != nullptr) {
          float* da = p.da + at_a + c;
          vstore_upto(da, vload_upto(da, n) + fa(va, vb, grad), n);
        }
        if (p.db != nullptr) {
          float* db = p.db + at_b + c;
          vstore_upto(db, vload_upto(db, n) + fb(va, vb, grad), n);
        }
      }
    }
  });
}

// y = f(x, p), p the same for all tokens.
template <class F>
void per_head(const PerHead& h, F f) {
  parallel_for(h.tokens, rows_per_piece(h.heads), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c = 0; c < h.heads; c += kLanes) {
        const int64_t n = h.heads - c;
        const vf x = vload_upto(h.x + t * h.x_row + c, n);
        vstore_upto(h.y + t * h.heads + c, f(x, vload_upto(h.p + c, n)), n);
      }
    }
  });
}

// dx += fx(x, p, dy), dp += the sum over tokens of fp(x, p, dy). Columns are split among threads,
// never the sum.
template <class Fx, class Fp>
void per_head_grad(const PerHeadGrad& h, Fx fx, Fp fp) {
  parallel_for(h.heads, 4 * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t n = end - c;
      const vf p = vload_upto(h.p + c, n);
      vf sum = {};
      for (int64_t t = 0; t < h.tokens; ++t) {
        const vf x = vload_upto(h.x + t * h.x_row + c, n);
        const vf dy = vload_upto(h.dy + t * h.heads + c, n);
        if (h.dx != nullptr) {
          float* dx = h.dx + t * h.x_row + c;
          vstore_upto(dx, vload_upto(dx, n) + fx(x, p, dy), n);
        }
        sum += fp(x, p, dy);
      }
      if (h.dp != nullptr) {
        vstore_upto(h.dp + c, vload_upto(h.dp + c, n) + sum, n);
      }
    }
  });
}

}  // namespace

void add_forward(const Pointwise& p) {
  pointwise(p, [](vf a, vf b) { return a + b; });
}
void add_backward(const PointwiseGrad& p) {
  const auto same = [](vf, vf, vf dy) { return dy; };
  pointwise_grad(p, same, same);
}

void swiglu_forward(const Pointwise& p) {
  pointwise(p, [](vf gate, vf up) { return vsilu(gate) * up; });
}
void swiglu_backward(const PointwiseGrad& p) {
  pointwise_grad(
      p, [](vf gate, vf up, vf dy) { return dy * up * vsilu_grad(gate); },
      [](vf gate, vf, vf dy) { return dy * vsilu(gate); });
}

void sigmoid_forward(const Pointwise& p) {
  pointwise(p, [](vf x, vf) { return vsigmoid(x); });
}
void sigmoid_backward(const PointwiseGrad& p) {
  const auto grad = [](vf x, vf, vf dy) {
    const vf s = vsigmoid(x);
    return dy * s * (1.0F - s);
  };
  pointwise_grad(p, grad, grad);
}

void step_size_forward(const PerHead& h) {
  const vf lo = vset(h.lo);
  const vf hi = vset(h.hi);
  per_head(h, [&](vf x, vf bias) { return vmin(hi, vmax(lo, vsoftplus(x + bias))); });
}
void step_size_backward(const PerHeadGrad& h) {
  const vf lo = vset(h.lo);
  const vf hi = vset(h.hi);
  const auto grad = [&](vf x, vf bias, vf dy) {
    const vf raw = x + bias;
    const vf step = vsoftplus(raw);
    const vf slope = raw > vset(20.0F) ? vset(1.0F) : vsigmoid(raw);
    const vf above = step > lo ? dy * slope : vf{};
    return step < hi ? above : vf{};
  };
  per_head_grad(h, grad, grad);
}

void log_decay_forward(const PerHead& h) {
  per_head(h, [](vf x, vf a_log) { return -vexp(a_log) * x; });
}
void log_decay_backward(const PerHeadGrad& h) {
  per_head_grad(
      h, [](vf, vf a_log, vf dy) { return -vexp(a_log) * dy; },
      [](vf x, vf a_log, vf dy) { return -vexp(a_log) * dy * x; });
}

void repeat_heads_forward(const RepeatHeads& h) {
  const int64_t bytes = h.channels * static_cast<int64_t>(sizeof(float));
  parallel_for(h.rows.count(), rows_per_piece(h.channels * h.times),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   for (int64_t copy = 0; copy < h.times; ++copy) {
                     std::memcpy(h.y + (r * h.times + copy) * h.channels, h.x + h.rows.offset(r),
                                 static_cast<size_t>(bytes));
                   }
                 }
               });
}
void repeat_heads_backward(const RepeatHeadsGrad& h) {
  parallel_for(h.rows.count(), rows_per_piece(h.channels * h.times),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   float* dx = h.dx + h.rows.offset(r);
                   for (int64_t c = 0; c < h.channels; c += kLanes) {
                     const int64_t n = h.channels - c;
                     vf sum = vload_upto(dx + c, n);
                     for (int64_t copy = 0; copy < h.times; ++copy) {
                       sum += vload_upto(h.dy + (r * h.times + copy) * h.channels + c, n);
                     }
                     vstore_upto(dx + c, sum, n);
                   }
                 }
               });
}

}  // namespace cambium::CAMBIUM_ISA
