// The naive definitions, in the precision of their element type.
#pragma once

#include <algorithm>
#include <cmath>

#include "ops/pointwise/pointwise_kernels.h"

namespace cambium {
namespace definition {

template <class T>
T sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}
/// log(1 + exp(x)); x itself above 20.
template <class T>
T softplus(T x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}
template <class T>
T softplus_grad(T x) {
  return x > 20 ? 1 : sigmoid(x);
}

// y = value(a, b)
template <class T, class F>
void pointwise(const Pointwise<T>& p, F value) {
  for (int64_t r = 0; r < p.a.count(); ++r) {
    for (int64_t c = 0; c < p.a.channels; ++c) {
      p.y.row(r)[c] = value(p.a.row(r)[c], p.b.defined() ? p.b.row(r)[c] : T{});
    }
  }
}

// da += grad_a(a, b, dy), db += grad_b(a, b, dy)
template <class T, class Fa, class Fb>
void pointwise_grad(const Pointwise<T>& p, Fa grad_a, Fb grad_b) {
  for (int64_t r = 0; r < p.a.count(); ++r) {
    for (int64_t c = 0; c < p.a.channels; ++c) {
      const T a = p.a.row(r)[c];
      const T b = p.b.defined() ? p.b.row(r)[c] : T{};
      const T dy = p.y.grad_row(r)[c];
      if (p.a.grad != nullptr) {
        p.a.grad_row(r)[c] += grad_a(a, b, dy);
      }
      if (p.b.grad != nullptr) {
        p.b.grad_row(r)[c] += grad_b(a, b, dy);
      }
    }
  }
}

}  // namespace definition

template <class T>
void multiply_forward::reference(const Pointwise<T>& p) {
  definition::pointwise(p, [](T a, T b) { return a * b; });
}
template <class T>
void multiply_backward::reference(const Pointwise<T>& p) {
  definition::pointwise_grad(
      p, [](T, T b, T dy) { return dy * b; }, [](T a, T, T dy) { return dy * a; });
}

template <class T>
void scale_blocks_forward::reference(const ScaleBlocks<T>& s) {
  for (int64_t r = 0; r < s.x.count(); ++r) {
    for (int64_t c = 0; c < s.x.channels; ++c) {
      s.y.row(r)[c] = static_cast<T>(s.factor_of(c)) * s.x.row(r)[c];
    }
  }
}
template <class T>
void scale_blocks_backward::reference(const ScaleBlocks<T>& s) {
  for (int64_t r = 0; r < s.x.count(); ++r) {
    for (int64_t c = 0; c < s.x.channels; ++c) {
      s.x.grad_row(r)[c] += static_cast<T>(s.factor_of(c)) * s.y.grad_row(r)[c];
    }
  }
}

template <class T>
void sigmoid_gate_forward::reference(const Pointwise<T>& p) {
  definition::pointwise(p, [](T gate, T x) { return definition::sigmoid(gate) * x; });
}
template <class T>
void sigmoid_gate_backward::reference(const Pointwise<T>& p) {
  definition::pointwise_grad(
      p,
      [](T gate, T x, T dy) {
        const T s = definition::sigmoid(gate);
        return dy * x * s * (1 - s);
      },
      [](T gate, T, T dy) { return dy * definition::sigmoid(gate); });
}

template <class T>
void sigmoid_forward::reference(const Sigmoid<T>& s) {
  const T scale = s.scale;
  definition::pointwise(Pointwise<T>{s.x, {}, s.y},
                        [=](T x, T) { return scale * definition::sigmoid(x); });
}
template <class T>
void sigmoid_backward::reference(const Sigmoid<T>& s) {
  const T scale = s.scale;
  const auto grad = [=](T x, T, T dy) {
    const T y = definition::sigmoid(x);
    return scale * dy * y * (1 - y);
  };
  definition::pointwise_grad(Pointwise<T>{s.x, {}, s.y}, grad, grad);
}

template <class T>
void add_scaled_forward::reference(const AddScaled<T>& s) {
  for (int64_t r = 0; r < s.x.count(); ++r) {
    for (int64_t c = 0; c < s.x.channels; ++c) {
      s.sum.row(r)[c] = static_cast<T>(s.a) * s.x.row(r)[c] + static_cast<T>(s.b) * s.y.row(r)[c];
    }
  }
}
template <class T>
void add_scaled_backward::reference(const AddScaled<T>& s) {
  for (int64_t r = 0; r < s.x.count(); ++r) {
    for (int64_t c = 0; c < s.x.channels; ++c) {
      if (s.x.grad != nullptr) {
        s.x.grad_row(r)[c] += static_cast<T>(s.a) * s.sum.grad_row(r)[c];
      }
      if (s.y.grad != nullptr) {
        s.y.grad_row(r)[c] += static_cast<T>(s.b) * s.sum.grad_row(r)[c];
      }
    }
  }
}

template <class T>
void step_size_forward::reference(const PerHead<T>& h) {
  for (int64_t t = 0; t < h.x.count(); ++t) {
    for (int64_t i = 0; i < h.x.channels; ++i) {
      const T step = definition::softplus(h.x.row(t)[i] + h.p.data[i]);
      h.y.row(t)[i] = std::clamp(step, static_cast<T>(h.lo), static_cast<T>(h.hi));
    }
  }
}

template <class T>
void step_size_backward::reference(const PerHead<T>& h) {
  for (int64_t t = 0; t < h.x.count(); ++t) {
    for (int64_t i = 0; i < h.x.channels; ++i) {
      const T raw = h.x.row(t)[i] + h.p.data[i];
      const T step = definition::softplus(raw);
      const T grad = step > static_cast<T>(h.lo) && step < static_cast<T>(h.hi)
                         ? h.y.grad_row(t)[i] * definition::softplus_grad(raw)
                         : 0;
      if (h.x.grad != nullptr) {
        h.x.grad_row(t)[i] += grad;
      }
      if (h.p.grad != nullptr) {
        h.p.grad[i] += grad;
      }
    }
  }
}

template <class T>
void log_decay_forward::reference(const PerHead<T>& h) {
  for (int64_t t = 0; t < h.x.count(); ++t) {
    for (int64_t i = 0; i < h.x.channels; ++i) {
      h.y.row(t)[i] = -std::exp(h.p.data[i]) * h.x.row(t)[i];
    }
  }
}

template <class T>
void log_decay_backward::reference(const PerHead<T>& h) {
  for (int64_t t = 0; t < h.x.count(); ++t) {
    for (int64_t i = 0; i < h.x.channels; ++i) {
      const T grad = -std::exp(h.p.data[i]) * h.y.grad_row(t)[i];
      if (h.x.grad != nullptr) {
        h.x.grad_row(t)[i] += grad;
      }
      if (h.p.grad != nullptr) {
        h.p.grad[i] += grad * h.x.row(t)[i];
      }
    }
  }
}

template <class T>
void bounded_decay_forward::reference(const PerHead<T>& h) {
  for (int64_t t = 0; t < h.x.count(); ++t) {
    for (int64_t i = 0; i < h.x.channels; ++i) {
      const T raw = std::exp(h.q.data[i]) * (h.x.row(t)[i] + h.p.data[i]);
      h.y.row(t)[i] = static_cast<T>(h.lo) * definition::sigmoid(raw);
    }
  }
}

template <class T>
void bounded_decay_backward::reference(const PerHead<T>& h) {
  for (int64_t t = 0; t < h.x.count(); ++t) {
    for (int64_t i = 0; i < h.x.channels; ++i) {
      const T rate = std::exp(h.q.data[i]);
      const T raw = rate * (h.x.row(t)[i] + h.p.data[i]);
      const T s = definition::sigmoid(raw);
      const T grad = static_cast<T>(h.lo) * s * (1 - s) * h.y.grad_row(t)[i];
      if (h.x.grad != nullptr) {
        h.x.grad_row(t)[i] += rate * grad;
      }
      if (h.p.grad != nullptr) {
        h.p.grad[i] += rate * grad;
      }
      if (h.q.grad != nullptr) {
        h.q.grad[i] += raw * grad;
      }
    }
  }
}

template <class T>
void repeat_heads_forward::reference(const RepeatHeads<T>& h) {
  for (int64_t r = 0; r < h.y.count(); ++r) {
    for (int64_t c = 0; c < h.x.channels; ++c) {
      h.y.row(r)[c] = h.x.row(r / h.times)[c];
    }
  }
}
template <class T>
void repeat_heads_backward::reference(const RepeatHeads<T>& h) {
  for (int64_t r = 0; r < h.y.count(); ++r) {
    for (int64_t c = 0; c < h.x.channels; ++c) {
      h.x.grad_row(r / h.times)[c] += h.y.grad_row(r)[c];
    }
  }
}

template <class T>
void mix_heads_forward::reference(const MixHeads<T>& h) {
  for (int64_t r = 0; r < h.a.count(); ++r) {
    const T s = h.is_closed(r) ? 0 : definition::sigmoid(*h.gate.row(r));
    for (int64_t c = 0; c < h.a.channels; ++c) {
      h.y.row(r)[c] = s * h.a.row(r)[c] + (1 - s) * h.b.row(r)[c];
    }
  }
}
template <class T>
void mix_heads_backward::reference(const MixHeads<T>& h) {
  for (int64_t r = 0; r < h.a.count(); ++r) {
    const T s = h.is_closed(r) ? 0 : definition::sigmoid(*h.gate.row(r));
    T to_gate = 0;
    for (int64_t c = 0; c < h.a.channels; ++c) {
      const T dy = h.y.grad_row(r)[c];
      to_gate += dy * (h.a.row(r)[c] - h.b.row(r)[c]);
      if (h.a.grad != nullptr) {
        h.a.grad_row(r)[c] += s * dy;
      }
      if (h.b.grad != nullptr) {
        h.b.grad_row(r)[c] += (1 - s) * dy;
      }
    }
    if (h.gate.grad != nullptr) {
      *h.gate.grad_row(r) += s * (1 - s) * to_gate;
    }
  }
}

}  // namespace cambium
