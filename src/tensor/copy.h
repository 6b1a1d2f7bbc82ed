// Elements moved without being computed with: what is not an operation and yet must not be a host
// pointer. All devices are those this build has memory on. Nothing here is recorded on a tape.
// Initialising and grafting weights stay on the host (nn, hybrid) and upload what they made.
#pragma once

#include <span>
#include <vector>

#include "tensor/tensor.h"

namespace cambium {

/// Copies the elements of `from` to `to`, tensors of one shape. Types may differ: values are
/// widened, or rounded to nearest (f64 to f32 to bf16); integers only go to their own type. Both
/// contiguous, or, where the types are the same, with rows.
void copy(const Tensor& to, const Tensor& from);

/// Sets every element of a contiguous tensor of f32, f64 or bf16; fill(t, 0) of any type.
void fill(const Tensor& t, double value);

/// out row i = x row rows[i].   x (N, C) with contiguous rows, out (rows.size(), C) contiguous, of
/// one type. A row outside [0, N) is an Error.
void gather_rows(const Tensor& out, const Tensor& x, std::span<const int64_t> rows);

/// y row rows[i] += x row i, in the order of i; on a CUDA device no row may repeat.   y (N, C) with
/// contiguous rows, x (rows.size(), C) contiguous, f32 or f64 (on a CUDA device f32 or bf16).
void add_rows(const Tensor& y, const Tensor& x, std::span<const int64_t> rows);

/// The elements of a contiguous tensor of f32 or bf16, of any device.
std::vector<float> elements_of(const Tensor& t);

}  // namespace cambium
