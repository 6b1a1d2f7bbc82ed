// Element types. Free of containers, for kernels.
#pragma once

#include <cstdint>

#include "base/float8.h"

namespace cambium {

/// F64 exists for the reference path: every operation computes F64 tensors with its naive
/// definition in double precision.
enum class Dtype : uint8_t { kF32, kBF16, kF64, kF16, kI32, kI64, kU8, kF8E4M3 };
int64_t dtype_size(Dtype dtype);
const char* dtype_name(Dtype dtype);

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kF32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::kF64;
};
template <>
struct DtypeOf<bf16> {
  static constexpr Dtype value = Dtype::kBF16;
};
template <>
struct DtypeOf<f8e4m3> {
  static constexpr Dtype value = Dtype::kF8E4M3;
};
template <>
struct DtypeOf<int32_t> {
  static constexpr Dtype value = Dtype::kI32;
};
template <>
struct DtypeOf<int64_t> {
  static constexpr Dtype value = Dtype::kI64;
};
template <>
struct DtypeOf<uint8_t> {
  static constexpr Dtype value = Dtype::kU8;
};

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
/// What sums over elements of T are taken in: the type of norms' weights, gates, states and
/// weights' gradients beside activations of T.
template <class T>
using Sum = typename SumOf<T>::type;
constexpr Dtype sum_dtype(Dtype dtype) {
  return dtype == Dtype::kBF16 ? Dtype::kF32 : dtype;
}

}  // namespace cambium
