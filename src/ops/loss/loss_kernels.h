// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

/// What one row contributes to LossSums.
struct LossRow {
  double cross_entropy;
  double forward_kl;
  double reverse_kl;
  bool agreement;
  bool correct;
};

template <class T>
struct LossRows {
  View<T> student;       // (rows, V) logits; becomes their gradient if `gradient`
  View<T> teacher;       // (rows, V) logits, or undefined; used as scratch
  const int32_t* label;  // (rows)
  bool gradient;
  // Weights of the terms in the gradient by the logits: the scale, and for the KL terms the
  // temperature (temperature^2 of the term, times d(logit / temperature) / d logit), are in them.
  double cross_entropy;
  double forward_kl;
  double reverse_kl;
  double temperature;
  LossRow* result;  // (rows)

  constexpr int64_t vocabulary() const { return student.channels; }
};
CAMBIUM_KERNEL(loss_rows, LossRows)

/// The same with a stored teacher, at temperature 1.
template <class T>
struct StoredLossRows {
  View<T> student;       // (rows, V) logits; becomes their gradient if `gradient`, else scratch
  const int32_t* token;  // (rows, k): of each row once, the likeliest first
  const float* log_p;    // (rows, k + 1): of these, and of all others together
  float* logit;          // (rows, k): scratch
  int64_t k;
  const int32_t* label;  // (rows)
  bool gradient;
  double cross_entropy, forward_kl, reverse_kl;  // as those of LossRows
  LossRow* result;                               // (rows)

  constexpr int64_t vocabulary() const { return student.channels; }
};
CAMBIUM_KERNEL(stored_loss_rows, StoredLossRows)

template <class T>
struct AlignRows {
  int64_t rows;
  const int64_t* row;   // (rows): which rows of the tensors
  View<T> out, target;  // (T, C); out.grad is added to, where wanted
  bool squared;
  double scale;
  double* result;  // (rows)
};
CAMBIUM_KERNEL(align_rows, AlignRows)

}  // namespace cambium
