#include <cmath>

#include "ops/elements_simd.h"
#include "ops/pointwise/pointwise_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

inline vf second(const PerHead<float>& h, int64_t c, int64_t n) {
  return h.q.defined() ? vload_upto(h.q.data + c, n) : vf{};
}

// y = f(x, p, q), p and q the same for all tokens.
template <class F>
void per_head(const PerHead<float>& h, F f) {
  const int64_t heads = h.x.channels;
  parallel_for(h.x.count(), rows_per_piece(heads), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c = 0; c < heads; c += kLanes) {
        const int64_t n = heads - c;
        const vf x = vload_upto(h.x.row(t) + c, n);
        vstore_upto(h.y.row(t) + c, f(x, vload_upto(h.p.data + c, n), second(h, c, n)), n);
      }
    }
  });
}

struct HeadGrad {
  vf x, p, q;
};

// d = f(x, p, q, dy): dx += d.x, dp and dq += the sums of d.p and d.q over tokens. Columns are
// split among threads, never the sum.
template <class F>
void per_head_grad(const PerHead<float>& h, F f) {
  parallel_for(h.x.channels, 4 * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t n = end - c;
      const vf p = vload_upto(h.p.data + c, n);
      const vf q = second(h, c, n);
      HeadGrad sum = {};
      for (int64_t t = 0; t < h.x.count(); ++t) {
        const vf x = vload_upto(h.x.row(t) + c, n);
        const HeadGrad d = f(x, p, q, vload_upto(h.y.grad_row(t) + c, n));
        if (h.x.grad != nullptr) {
          float* dx = h.x.grad_row(t) + c;
          vstore_upto(dx, vload_upto(dx, n) + d.x, n);
        }
        sum.p += d.p;
        sum.q += d.q;
      }
      if (h.p.grad != nullptr) {
        vstore_upto(h.p.grad + c, vload_upto(h.p.grad + c, n) + sum.p, n);
      }
      if (h.q.grad != nullptr) {
        vstore_upto(h.q.grad + c, vload_upto(h.q.grad + c, n) + sum.q, n);
      }
    }
  });
}

}  // namespace

void add_scaled_forward(const AddScaled<float>& s) {
  pointwise(s.x, s.y, s.sum, [&](vf x, vf y) { return s.a * x + s.b * y; });
}
void add_scaled_backward(const AddScaled<float>& s) {
  pointwise_grad(
      s.x, s.y, s.sum, [&](vf, vf, vf dy) { return s.a * dy; },
      [&](vf, vf, vf dy) { return s.b * dy; });
}

void multiply_forward(const Pointwise<float>& p) {
  pointwise(p.a, p.b, p.y, [](vf a, vf b) { return a * b; });
}
void multiply_backward(const Pointwise<float>& p) {
  pointwise_grad(
      p.a, p.b, p.y, [](vf, vf b, vf dy) { return dy * b; },
      [](vf a, vf, vf dy) { return dy * a; });
}

namespace {

// Calls f(row, first column, columns, factor) for the blocks of every row.
template <class F>
void each_block(const ScaleBlocks<float>& s, F f) {
  parallel_for(s.x.count(), rows_per_piece(s.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int block = 0; block < s.count; ++block) {
        const int64_t first = block == 0 ? 0 : s.end[block - 1];
        const vf factor = vset(static_cast<float>(s.factor[block]));
        for (int64_t c = first; c < s.end[block]; c += kLanes) {
          f(r, c, s.end[block] - c, factor);
        }
      }
    }
  });
}

}  // namespace

void scale_blocks_forward(const ScaleBlocks<float>& s) {
  each_block(s, [&](int64_t r, int64_t c, int64_t n, vf factor) {
    vstore_upto(s.y.row(r) + c, factor * vload_upto(s.x.row(r) + c, n), n);
  });
}
void scale_blocks_backward(const ScaleBlocks<float>& s) {
  each_block(s, [&](int64_t r, int64_t c, int64_t n, vf factor) {
    float* dx = s.x.grad_row(r) + c;
    vstore_upto(dx, vload_upto(dx, n) + factor * vload_upto(s.y.grad_row(r) + c, n), n);
  });
}

void sigmoid_gate_forward(const Pointwise<float>& p) {
  pointwise(p.a, p.b, p.y, [](vf gate, vf x) { return vsigmoid(gate) * x; });
}
void sigmoid_gate_backward(const Pointwise<float>& p) {
  pointwise_grad(
      p.a, p.b, p.y,
      [](vf gate, vf x, vf dy) {
        const vf s = vsigmoid(gate);
        return dy * x * s * (1.0F - s);
      },
      [](vf gate, vf, vf dy) { return dy * vsigmoid(gate); });
}

void sigmoid_forward(const Sigmoid<float>& s) {
  pointwise(s.x, {}, s.y, [&](vf x, vf) { return s.scale * vsigmoid(x); });
}
void sigmoid_backward(const Sigmoid<float>& s) {
  const auto grad = [&](vf x, vf, vf dy) {
    const vf y = vsigmoid(x);
    return s.scale * dy * y * (1.0F - y);
  };
  pointwise_grad(s.x, {}, s.y, grad, grad);
}

void step_size_forward(const PerHead<float>& h) {
  const vf lo = vset(h.lo);
  const vf hi = vset(h.hi);
  per_head(h, [&](vf x, vf bias, vf) { return vmin(hi, vmax(lo, vsoftplus(x + bias))); });
}
void step_size_backward(const PerHead<float>& h) {
  const vf lo = vset(h.lo);
  const vf hi = vset(h.hi);
  per_head_grad(h, [&](vf x, vf bias, vf, vf dy) {
    const vf raw = x + bias;
    const vf step = vsoftplus(raw);
    const vf slope = raw > vset(20.0F) ? vset(1.0F) : vsigmoid(raw);
    const vf above = step > lo ? dy * slope : vf{};
    const vf d = step < hi ? above : vf{};
    return HeadGrad{d, d, {}};
  });
}

void log_decay_forward(const PerHead<float>& h) {
  per_head(h, [](vf x, vf a_log, vf) { return -vexp(a_log) * x; });
}
void log_decay_backward(const PerHead<float>& h) {
  per_head_grad(h, [](vf x, vf a_log, vf, vf dy) {
    const vf d = -vexp(a_log) * dy;
    return HeadGrad{d, d * x, {}};
  });
}

void bounded_decay_forward(const PerHead<float>& h) {
  per_head(h, [&](vf x, vf bias, vf a_log) { return h.lo * vsigmoid(vexp(a_log) * (x + bias)); });
}
void bounded_decay_backward(const PerHead<float>& h) {
  per_head_grad(h, [&](vf x, vf bias, vf a_log, vf dy) {
    const vf rate = vexp(a_log);
    const vf raw = rate * (x + bias);
    const vf s = vsigmoid(raw);
    const vf d = h.lo * s * (1.0F - s) * dy;
    return HeadGrad{rate * d, rate * d, raw * d};
  });
}

void repeat_heads_forward(const RepeatHeads<float>& h) {
  const auto bytes = static_cast<size_t>(h.x.channels) * sizeof(float);
  parallel_for(h.x.count(), rows_per_piece(h.x.channels * h.times),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   for (int64_t copy = 0; copy < h.times; ++copy) {
                     std::memcpy(h.y.row(r * h.times + copy), h.x.row(r), bytes);
                   }
                 }
               });
}
void repeat_heads_backward(const RepeatHeads<float>& h) {
  parallel_for(h.x.count(), rows_per_piece(h.x.channels * h.times),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   float* dx = h.x.grad_row(r);
                   for (int64_t c = 0; c < h.x.channels; c += kLanes) {
                     const int64_t n = h.x.channels - c;
                     vf sum = vload_upto(dx + c, n);
                     for (int64_t copy = 0; copy < h.times; ++copy) {
                       sum += vload_upto(h.y.grad_row(r * h.times + copy) + c, n);
                     }
                     vstore_upto(dx + c, sum, n);
                   }
                 }
               });
}

namespace {

inline float open_share(const MixHeads<float>& h, int64_t r) {
  return h.is_closed(r) ? 0.0F : 1.0F / (1.0F + std::exp(-*h.gate.row(r)));
}

}  // namespace

void mix_heads_forward(const MixHeads<float>& h) {
  const int64_t dim = h.a.channels;
  parallel_for(h.a.count(), rows_per_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const vf s = vset(open_share(h, r));
      for (int64_t c = 0; c < dim; c += kLanes) {
        const int64_t n = dim - c;
        const vf a = vload_upto(h.a.row(r) + c, n);
        const vf b = vload_upto(h.b.row(r) + c, n);
        vstore_upto(h.y.row(r) + c, s * a + (1.0F - s) * b, n);
      }
    }
  });
}
void mix_heads_backward(const MixHeads<float>& h) {
  const int64_t dim = h.a.channels;
  parallel_for(h.a.count(), rows_per_piece(dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float share = open_share(h, r);
      const vf s = vset(share);
      vf sum = {};
      for (int64_t c = 0; c < dim; c += kLanes) {
        const int64_t n = dim - c;
        const vf dy = vload_upto(h.y.grad_row(r) + c, n);
        sum += dy * (vload_upto(h.a.row(r) + c, n) - vload_upto(h.b.row(r) + c, n));
        if (h.a.grad != nullptr) {
          float* da = h.a.grad_row(r) + c;
          vstore_upto(da, vload_upto(da, n) + s * dy, n);
        }
        if (h.b.grad != nullptr) {
          float* db = h.b.grad_row(r) + c;
          vstore_upto(db, vload_upto(db, n) + (1.0F - s) * dy, n);
        }
      }
      if (h.gate.grad != nullptr) {
        *h.gate.grad_row(r) += share * (1.0F - share) * vsum(sum);
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
