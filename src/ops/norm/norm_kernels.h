// Private to the operations: what their definitions and kernels are given.
#pragma once

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct RmsNorm {
  View<T> x;            // (rows, C)
  View<Sum<T>> weight;  // (C)
  View<T> y;            // (rows, C) contiguous
  float eps;
  bool zero_centred;  // the weight counts from one: 1 + weight
  float* rstd;        // (rows) scratch of backward
};
CAMBIUM_KERNEL(rms_norm_forward, RmsNorm)
/// Reads y.grad; adds to x.grad and weight.grad.
CAMBIUM_KERNEL(rms_norm_backward, RmsNorm)

/// stream = keep stream + out y, and x = the norm of the stream. Where keep is 0 what the stream
/// held is not read; without a weight x is the stream itself; x may be undefined.
template <class T>
struct AddRmsNorm {
  View<Sum<T>> stream;  // (rows, C) contiguous
  float keep;
  View<T> y;  // (rows, C)
  float out;
  View<Sum<T>> weight;  // (C)
  View<T> x;            // (rows, C) contiguous
  float eps;
  bool zero_centred;
  bool layer;         // a layer norm: of the stream less its mean
  View<Sum<T>> bias;  // (C), of a layer norm, or undefined
};
CAMBIUM_KERNEL(add_rms_norm_forward, AddRmsNorm)

template <class T>
struct LayerNorm {
  View<T> x;                  // (rows, C)
  View<Sum<T>> weight, bias;  // (C); bias may be undefined
  View<T> y;                  // (rows, C) contiguous
  float eps;
  float* mean;  // (rows) scratch of backward
  float* rstd;
};
CAMBIUM_KERNEL(layer_norm_forward, LayerNorm)
CAMBIUM_KERNEL(layer_norm_backward, LayerNorm)

template <class T>
struct GatedNorm {
  View<T> x, gate;      // (T, groups, C): rows are the groups of the tokens
  View<Sum<T>> weight;  // of group g: at g * weight_step
  View<T> y;            // (T, groups, C) contiguous
  int64_t groups;
  int64_t weight_step;  // C, or 0 when the groups share the weight
  bool gate_first, sigmoid;
  float eps;
  float* rstd;  // (T * groups) scratch of backward
};
CAMBIUM_KERNEL(gated_norm_forward, GatedNorm)
CAMBIUM_KERNEL(gated_norm_backward, GatedNorm)

template <class T>
struct L2Norm {
  View<T> x, y;  // (rows, C); y contiguous
  float eps, scale;
};
CAMBIUM_KERNEL(l2_norm_forward, L2Norm)
CAMBIUM_KERNEL(l2_norm_backward, L2Norm)

}  // namespace cambium
