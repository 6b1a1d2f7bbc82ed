// Private to the operations' CUDA half: what its files share.
#pragma once

#include <cstdint>

#include "ops/activation/activation_kernels.h"
#include "ops/cuda.cuh"
#include "ops/experts/experts_kernels.h"

namespace cambium::cuda {

inline constexpr int kChunk = 8;  // elements that a thread brings at once

/// Whether chunks along the last axis are aligned: of rows `stride` apart from `data` on.
template <class T>
bool in_chunks(const T* data, int64_t stride) {
  constexpr int64_t kAlign = sizeof(T) * kChunk < 16 ? sizeof(T) * kChunk : 16;
  return aligned(data, kAlign) && stride % kChunk == 0;
}

/// Calls f with the data of the weight in its type.
template <class T, class F>
void with_weight(const MatmulWeight<T>& weight, const F& f) {
  if (weight.narrow.defined()) {
    f(static_cast<const bf16*>(weight.narrow.data));
  } else {
    f(static_cast<const float*>(weight.wide.data));
  }
}

/// Fills lists.row, slot and start from lists.expert (experts_order_cuda.cu).
void order_rows(const ExpertLists& lists, const Launch& on);

// --- Few rows by multiply-adds (experts_few_cuda.cu).

/// Whether so few experts have rows that each row reads its weight for itself.
inline bool hardly_shared(const ExpertLists& lists) {
  return 4 * lists.rows() <= lists.experts;
}
template <class T, class W>
void experts_of_few_rows(const ExpertsMatmul<T>& a, const W* weight, const Launch& on);
/// Each row reads its weights for itself, whatever their number.
template <class T, class W>
void hidden_of_few_rows(const ExpertsHidden<T>& a, const W* gate, const W* up, const Launch& on);

/// What is between gate and up and the product down.
__device__ __forceinline__ float hidden_of(float gate, float up, float limit) {
  float slope = 1.0F;
  if (limit > 0.0F) {
    gate = fminf(gate, limit);
    up = fminf(fmaxf(up, -limit), limit) + 1.0F;
    slope = kClampedSlope;
  }
  return up * gate * sigmoid_of<bf16>(slope * gate);
}

// --- Products in any type and width (experts_any_cuda.cu).
template <class T>
void experts_by_tiles(const ExpertsMatmul<T>& a, const Launch& on);
template <class T>
void experts_by_tiles(const ExpertsGradInput<T>& a, const Launch& on);
template <class T>
void experts_by_tiles(const ExpertsGradWeight<T>& a, const Launch& on);

// --- Products in bf16 by tensor cores (experts_tensor_cuda.cu).

/// Which of the products, of rows (rows of e), weights (E, N, K):
enum class ExpertsUse : uint8_t {
  kForward,     // c (rows, N) = a (rows, K) b (N, K)^T + bias
  kHidden,      // c (rows, N) = f(the same, the same of b2 and bias2), a (T, K) of tokens
  kGradInput,   // c (rows, K) = [c +] a (rows, N) b (N, K)
  kGradWeight,  // c (N, K) = [c +] a (rows, N)^T b (rows, K)
};

/// For each expert c (m, n) = [c +] op(a) op(b)^T + bias over k. Rows of a, b and c are in chunks,
/// the bias in pairs.
template <class C>
struct ExpertsProduct {
  const bf16* a;
  int64_t a_stride;
  const bf16* b;
  int64_t b_stride;
  int64_t b_expert = 0;  // elements from one expert's b to the next; 0: b are rows of the experts
  const float* bias = nullptr;  // (E, n), or null
  C* c;
  int64_t c_stride;
  int64_t c_expert = 0;         // as of b
  int32_t m = 0, n = 0, k = 0;  // the one that counts rows of experts is 0
  int32_t experts;
  bool accumulate = false;
  const int32_t* start;  // (E + 1)
  // Of kHidden alone: as of ExpertsHidden and its lists.
  const bf16* b2 = nullptr;
  const float* bias2 = nullptr;
  const int32_t* slot = nullptr;
  int32_t top = 1;
  float limit = 0.0F;
};

/// One launch. False, and nothing done, where the device has too little shared memory.
bool experts_by_tensor_cores(ExpertsUse use, const ExpertsProduct<bf16>& p,
                             const ExpertLists& lists, const Launch& on);
bool experts_by_tensor_cores(const ExpertsProduct<float>& p, const ExpertLists& lists,
                             const Launch& on);

// --- Many rows, by pairs of blocks (experts_pairs_cuda.cu).

/// As experts_by_tensor_cores(); false too where the device has no such kernels (other than sm_90a)
/// and of what is added to a result.
bool experts_by_pairs(ExpertsUse use, const ExpertsProduct<bf16>& p, const ExpertLists& lists,
                      const Launch& on);

}  // namespace cambium::cuda
