// Private to the operation: what its kernels are given.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "tensor/rows.h"

namespace cambium {

struct RmsNormForward {
  Rows rows;  // of x
  int64_t channels;
  const float* x;
  const float* weight;  // (channels)
  float eps;
  float* y;  // (rows.count(), channels) contiguous
};

struct RmsNormBackward {
  Rows rows;  // of x
  int64_t channels;
  const float* x;
  const float* weight;
  float eps;
  const float* dy;  // (rows.count(), channels) contiguous
  float* dx;        // added to, strided as x; null when not wanted
  float* dweight;   // (channels), added to; null when not wanted
  float* rstd;      // (rows.count()) scratch
};

/// Rows are the groups of the tokens: outer tokens, inner groups.
struct GatedNormForward {
  Rows x_rows, gate_rows;
  int64_t group;
  bool gate_first, sigmoid;
  const float* x;
  const float* gate;
  const float* weight;  // of group g: at g * weight_step
  int64_t weight_step;  // group, or 0 when the groups share it
  float eps;
  float* y;  // (x_rows.count(), group) contiguous
};

struct GatedNormBackward {
  Rows x_rows, gate_rows;
  int64_t group;
  bool gate_first, sigmoid;
  const float* x;
  const float* gate;
  const float* weight;
  int64_t weight_step;
  float eps;
  const float* dy;  // (x_rows.count(), group) contiguous
  float* dx;        // added to, strided as x; null when not wanted
  float* dgate;     // added to, strided as gate; null when not wanted
  float* dweight;   // added to; null when not wanted
  float* rstd;      // (x_rows.count()) scratch
};

struct L2NormForward {
  Rows rows;  // of x
  int64_t channels;
  float eps, scale;
  const float* x;
  float* y;  // (rows.count(), channels) contiguous
};

struct L2NormBackward {
  Rows rows;
  int64_t channels;
  float eps, scale;
  const float* x;
  const float* dy;
  float* dx;  // added to, strided as x
};

CAMBIUM_CPU_KERNEL(rms_norm_forward, RmsNormForward)
CAMBIUM_CPU_KERNEL(rms_norm_backward, RmsNormBackward)
CAMBIUM_CPU_KERNEL(gated_norm_forward, GatedNormForward)
CAMBIUM_CPU_KERNEL(gated_norm_backward, GatedNormBackward)
CAMBIUM_CPU_KERNEL(l2_norm_forward, L2NormForward)
CAMBIUM_CPU_KERNEL(l2_norm_backward, L2NormBackward)

}  // namespace cambium
