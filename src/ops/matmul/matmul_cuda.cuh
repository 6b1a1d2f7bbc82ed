// Private to the operation's CUDA half: what the host code over cuBLASLt (matmul_cuda.cc) asks of
// the kernels (matmul_cuda.cu, matmul_invariant_cuda.cu).
#pragma once

#include "ops/matmul/matmul_kernels.h"

namespace cambium::cuda {

/// Most rows of x that few_rows() multiplies in any case; more go to cuBLASLt.
inline constexpr int64_t kFewRows = 4;

/// All products of one x with at most kFewRows rows, or kStreamedRows where the weights stream, in
/// one launch. False, and nothing done, where the rows or the addresses do not suit it.
template <class T, class Y>
bool few_rows(const MatmulsTo<T, Y>& all, const Launch& on);

/// Most rows that stream_rows() multiplies.
inline constexpr int64_t kStreamedRows = 8;
/// The same for weights of bf16 that stream through shared memory (matmul_stream_cuda.cu,
/// matmul_stream_tensor_cuda.cu).
template <class Y>
bool stream_rows(const MatmulsTo<bf16, Y>& all, const Launch& on);

/// All products of one x, an element's sum over k in an order that depends on k alone: a row has
/// the same bits whatever number of rows there is (matmul_invariant_cuda.cu).
template <class T, class Y>
void batch_invariant_products(const MatmulsTo<T, Y>& all, const Launch& on);

/// The elements of a weight in the type of the product, which may be the weight's own memory.
template <class T>
const T* weight_as(const MatmulWeight<T>& weight, const Launch& on);

/// y = [y +] op(a) op(b) for sizes that cuBLASLt has no algorithm for: c (m, n) = sum over k, with
/// element strides.
template <class In, class Out>
struct PlainProduct {
  int64_t m, n, k;
  const In* a;
  int64_t a_row, a_column;
  const In* b;  // (k, n)
  int64_t b_row, b_column;
  Out* c;
  int64_t c_row;
  bool accumulate;
};
template <class In, class Out>
void plain_product(const PlainProduct<In, Out>& p, const Launch& on);

/// Adds the bias to every row of y.
template <class T>
void add_bias(const View<T>& y, const float* bias, const Launch& on);

}  // namespace cambium::cuda
