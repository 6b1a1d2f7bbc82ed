// Private to the operation: what its definition and kernels are given.
#pragma once

#include "ops/kernel.h"
#include "ops/sampling/sampling_config.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct SampleRows {
  View<T> logits;                // (R, V)
  const SamplingConfig* config;  // (R)
  const double* uniform;         // (R)
  int32_t* token;                // (R)
  float* log_probability;        // (R)
};
CAMBIUM_PLANNED_KERNEL(sample_rows, SampleRows)

}  // namespace cambium
