// Private to the operations: what their definitions and kernels are given.
#pragma once

#include "ops/experts/experts_lists.h"
#include "ops/kernel.h"
#include "ops/matmul/matmul_kernels.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct Route {
  View<T> logits;            // (T, E)
  View<Sum<T>> choice_bias;  // (E), or undefined
  View<Sum<T>> weight;       // (T, top)
  ExpertLists lists;         // written by the forward kernel
  RouterConfig config;
};
CAMBIUM_KERNEL(route_forward, Route)
/// Reads weight.grad; adds to logits.grad.
CAMBIUM_KERNEL(route_backward, Route)

template <class T>
struct RouterLosses {
  View<T> logits;       // (T, E)
  View<Sum<T>> losses;  // (2, T) contiguous
  ExpertLists lists;    // read
  RouterScore score;

  /// What a token's weighted scores are multiplied by.
  constexpr Sum<T> share() const {
    return static_cast<Sum<T>>(lists.experts) / static_cast<Sum<T>>(lists.rows());
  }
  constexpr Sum<T> count(int64_t e) const {
    return static_cast<Sum<T>>(lists.start[e + 1] - lists.start[e]);
  }
};
CAMBIUM_KERNEL(router_losses_forward, RouterLosses)
/// Reads losses.grad; adds to logits.grad.
CAMBIUM_KERNEL(router_losses_backward, RouterLosses)

template <class T>
struct Dispatch {
  View<T> x;  // (T, C)
  View<T> y;  // (T * top, C) contiguous
  ExpertLists lists;
};
CAMBIUM_KERNEL(dispatch_forward, Dispatch)
CAMBIUM_KERNEL(dispatch_backward, Dispatch)

template <class T>
struct Combine {
  View<T> x;            // (T * top, C)
  View<Sum<T>> weight;  // (T, top) contiguous
  View<T> y;            // (T, C) contiguous
  ExpertLists lists;
  View<T> added;  // (T, C), or undefined: the forward kernel adds sigmoid(gate) times it
  View<T> gate;   // (T, 1), or undefined: adds it as it is
};
CAMBIUM_KERNEL(combine_forward, Combine)
CAMBIUM_KERNEL(combine_backward, Combine)

/// y = x weight[e]^T + bias[e]
template <class T>
struct ExpertsMatmul {
  View<T> x;               // (T * top, K)
  MatmulWeight<T> weight;  // (E * N, K)
  View<Sum<T>> bias;       // (E, N), or undefined
  View<T> y;               // (T * top, N)
  ExpertLists lists;
};
CAMBIUM_PLANNED_KERNEL(experts_matmul_forward, ExpertsMatmul)

/// y = f(x gate[e]^T + gate_bias[e], x up[e]^T + up_bias[e]) of the token of each row
template <class T>
struct ExpertsHidden {
  View<T> x;                        // (T, K)
  MatmulWeight<T> gate, up;         // (E * N, K)
  View<Sum<T>> gate_bias, up_bias;  // (E, N), or both undefined
  View<T> y;                        // (T * top, N)
  float limit;                      // f is clamped_swiglu with it; 0: swiglu
  ExpertLists lists;
};
CAMBIUM_PLANNED_KERNEL(experts_hidden_forward, ExpertsHidden)

/// out = [out +] dy weight[e]
template <class T>
struct ExpertsGradInput {
  View<T> dy;              // (T * top, N)
  MatmulWeight<T> weight;  // (E * N, K)
  View<T> out;             // (T * top, K)
  bool accumulate;
  ExpertLists lists;
};
CAMBIUM_PLANNED_KERNEL(experts_grad_input, ExpertsGradInput)

/// out[e] = [out[e] +] dy^T x over the rows of e; zero where it has none
template <class T>
struct ExpertsGradWeight {
  View<T> dy;        // (T * top, N)
  View<T> x;         // (T * top, K)
  View<Sum<T>> out;  // (E * N, K)
  bool accumulate;
  ExpertLists lists;
};
CAMBIUM_PLANNED_KERNEL(experts_grad_weight, ExpertsGradWeight)

/// out[e] += the sum of dy over the rows of e
template <class T>
struct ExpertsGradBias {
  View<T> dy;   // (T * top, N)
  Sum<T>* out;  // (E, N)
  ExpertLists lists;
};
CAMBIUM_PLANNED_KERNEL(experts_grad_bias, ExpertsGradBias)

/// On CUDA, rows of an expert, evenly, from which on pairs of blocks multiply them: they were
/// faster with 256 and more, no faster with 160, and not timed with fewer (docs/performance.md).
/// Tests set it, to reach pairs with few rows.
inline int64_t experts_pair_rows = 192;

}  // namespace cambium
