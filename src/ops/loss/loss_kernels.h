// Private to the operation: what its definition and its kernels are given.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace cambium {

/// What one row contributes to LossSums.
struct LossRow {
  double cross_entropy;
  double forward_kl;
  double reverse_kl;
  bool agreement;
  bool correct;
};

template <class Real>
struct LossArgs {
  int64_t rows;
  int64_t vocabulary;
  Real* student;         // (rows, vocabulary) logits; becomes their gradient if `gradient`
  Real* teacher;         // (rows, vocabulary) logits, or null; used as scratch
  const int32_t* label;  // (rows)
  bool gradient;
  // Weights of the terms in the gradient by the logits: the scale, and for the KL terms the
  // temperature (temperature^2 of the term, times d(logit / temperature) / d logit), are in them.
  double cross_entropy;
  double forward_kl;
  double reverse_kl;
  double temperature;
  LossRow* result;  // (rows)
};

template <class Real>
struct AlignArgs {
  int64_t rows;
  int64_t channels;
  const int64_t* row;  // (rows): which rows of the tensors
  const Real* out;
  int64_t out_stride;
  const Real* target;
  int64_t target_stride;
  Real* grad;  // strided as out, added to; or null
  bool squared;
  double scale;
  double* result;  // (rows)
};

using LossRowsF32 = LossArgs<float>;
using AlignRowsF32 = AlignArgs<float>;

CAMBIUM_CPU_KERNEL(loss_rows, LossRowsF32)
CAMBIUM_CPU_KERNEL(align_rows, AlignRowsF32)

}  // namespace cambium
