// Private to the operations: what their definitions and kernels are given. Results are contiguous;
// backward kernels read y.grad and add to the gradients of the inputs that have one, or, where they
// are told to (on CUDA alone), set them.
#pragma once

#include "ops/activation/activation_kind.h"
#include "ops/kernel.h"
#include "ops/pair_sets.h"
#include "tensor/view.h"

namespace cambium {

/// y = f(x), or f(x) up where `up` is defined.
template <class T>
struct Activate {
  View<T> x, up, y;  // (rows, C)
  ActivationKind kind;
  PairSets sets = {};  // of x, up
};
CAMBIUM_KERNEL(activation_forward, Activate)
CAMBIUM_KERNEL(activation_backward, Activate)

/// Calls run with that of the types, a kernel's own, whose function is asked for.
template <class Silu, class Relu2, class Gelu, class GeluTanh, class Run>
void with_kind(ActivationKind kind, const Run& run) {
  switch (kind) {
    case ActivationKind::kSilu:
      return run(Silu{});
    case ActivationKind::kRelu2:
      return run(Relu2{});
    case ActivationKind::kGelu:
      return run(Gelu{});
    case ActivationKind::kGeluTanh:
      return run(GeluTanh{});
  }
}

/// The factor inside the sigmoid of clamped_swiglu.
inline constexpr float kClampedSlope = 1.702F;
template <class T>
struct ClampedSwiglu {
  View<T> gate, up, y;  // (rows, C)
  float limit;
  PairSets sets = {};  // of gate, up
};
CAMBIUM_KERNEL(clamped_swiglu_forward, ClampedSwiglu)
CAMBIUM_KERNEL(clamped_swiglu_backward, ClampedSwiglu)

template <class T>
struct Xielu {
  View<T> x, y;                   // (rows, C)
  View<Sum<T>> alpha_p, alpha_n;  // (1)
  float beta, eps;
  float* sums;  // (2, rows) scratch of backward: a row's gradients of p and n
};
CAMBIUM_KERNEL(xielu_forward, Xielu)
CAMBIUM_KERNEL(xielu_backward, Xielu)

/// x = cap tanh(x / cap), or, with y the result of that, x = x (1 - (y / cap)^2).
template <class T>
struct SoftCap {
  View<T> x;  // (rows, C) contiguous
  View<T> y;  // likewise, or undefined
  float cap;
};
CAMBIUM_KERNEL(soft_cap_rows, SoftCap)

}  // namespace cambium
