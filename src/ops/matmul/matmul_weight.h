// Weights of products as operations check them and hand them to kernels. Private to operations.
#pragma once

#include <type_traits>

#include "ops/matmul/matmul_kernels.h"
#include "tensor/tensor.h"

namespace cambium {

/// Whether x can be multiplied with a weight of this type: that of x's sums, or bf16 beside f32.
inline bool is_weight_type(const Tensor& weight, const Tensor& x) {
  return weight.dtype == sum_dtype(x.dtype) ||
         (weight.dtype == Dtype::kBF16 && x.dtype != Dtype::kF64);
}
/// The types that is_weight_type() means, in words.
inline const char* weight_types(const Tensor& x) {
  return x.dtype == Dtype::kF64 ? "f64" : "f32 or bf16";
}

inline void expect_trainable(const char* operation, const Tensor& weight) {
  expect(weight.dtype != Dtype::kBF16 || !weight.has_grad(),
         "[{}] a bf16 weight has no gradient; train the f32 weight, got {}", operation, weight);
}

/// Of an f32 weight that somebody keeps rounded, products of bf16 are given that.
template <class T>
MatmulWeight<T> weight_view(const Tensor& weight) {
  if (std::is_same_v<T, bf16> && weight.rounded != nullptr) {
    return {{}, view<bf16, float>(weight.rounded_tensor())};
  }
  const bool narrow = weight.dtype == Dtype::kBF16;
  return {view<Sum<T>>(narrow ? Tensor{} : weight), view<bf16, float>(narrow ? weight : Tensor{})};
}

}  // namespace cambium
