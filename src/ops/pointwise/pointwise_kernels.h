// Private to the operations: what their definitions and kernels are given. Results are contiguous;
// backward kernels read y.grad and add to the gradients of the inputs that have one, or, where they
// are told to (on CUDA alone), set them.
#pragma once

#include "ops/kernel.h"
#include "ops/pair_sets.h"
#include "tensor/view.h"

namespace cambium {

/// y = f(a, b), element by element; b is undefined for functions of one argument.
template <class T>
struct Pointwise {
  View<T> a, b, y;  // (rows, C)
  PairSets sets = {};
};
CAMBIUM_KERNEL(multiply_forward, Pointwise)
CAMBIUM_KERNEL(multiply_backward, Pointwise)
CAMBIUM_KERNEL(sigmoid_gate_forward, Pointwise)
CAMBIUM_KERNEL(sigmoid_gate_backward, Pointwise)

/// A gate: in the type of sums.
template <class T>
struct Sigmoid {
  View<T> x;       // (rows, C)
  View<Sum<T>> y;  // (rows, C)
  float scale;
};
CAMBIUM_KERNEL(sigmoid_forward, Sigmoid)
CAMBIUM_KERNEL(sigmoid_backward, Sigmoid)

template <class T>
struct AddScaled {
  float a;
  View<T> x;  // (rows, C)
  float b;
  View<T> y;           // (rows, C)
  View<T> sum;         // (rows, C): a x + b y
  PairSets sets = {};  // of x, y
};
CAMBIUM_KERNEL(add_scaled_forward, AddScaled)
CAMBIUM_KERNEL(add_scaled_backward, AddScaled)

template <class T>
struct ScaleBlocks {
  static constexpr int kMost = 8;
  View<T> x, y;        // (rows, C)
  int count;           // of blocks
  int64_t end[kMost];  // of their columns
  double factor[kMost];

  constexpr double factor_of(int64_t column) const {
    int block = 0;
    while (column >= end[block]) {
      ++block;
    }
    return factor[block];
  }
};
CAMBIUM_KERNEL(scale_blocks_forward, ScaleBlocks)
CAMBIUM_KERNEL(scale_blocks_backward, ScaleBlocks)

/// Gates of the heads of a token, in the type of sums.
template <class T>
struct PerHead {
  View<T> x;       // (T, H)
  View<Sum<T>> p;  // (H): bias or a_log
  View<Sum<T>> q;  // (H): a_log of bounded_decay, else undefined
  View<Sum<T>> y;  // (T, H)
  float lo, hi;    // of step_size; lo is the bound of bounded_decay
};
CAMBIUM_KERNEL(step_size_forward, PerHead)
CAMBIUM_KERNEL(step_size_backward, PerHead)
CAMBIUM_KERNEL(log_decay_forward, PerHead)
CAMBIUM_KERNEL(log_decay_backward, PerHead)
CAMBIUM_KERNEL(bounded_decay_forward, PerHead)
CAMBIUM_KERNEL(bounded_decay_backward, PerHead)

template <class T>
struct RepeatHeads {
  View<T> x;  // (T, G, N)
  View<T> y;  // (T, G * times, N)
  int64_t times;
};
CAMBIUM_KERNEL(repeat_heads_forward, RepeatHeads)
CAMBIUM_KERNEL(repeat_heads_backward, RepeatHeads)

template <class T>
struct MixHeads {
  View<T> a, b;  // (T, H, D)
  View<T> gate;  // (T, H, 1)
  View<T> y;     // (T, H, D)
  int64_t heads;
  const uint8_t* closed;  // (T), or null

  /// Whether the token of row r, counted over tokens and heads, has its gate closed.
  constexpr bool is_closed(int64_t r) const { return closed != nullptr && closed[r / heads] != 0; }
};
CAMBIUM_KERNEL(mix_heads_forward, MixHeads)
CAMBIUM_KERNEL(mix_heads_backward, MixHeads)

}  // namespace cambium
