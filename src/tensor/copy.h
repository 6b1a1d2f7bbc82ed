// Elements moved without being computed with: what is not an operation and yet must not be a host
// pointer. All devices are those this build has memory on. Nothing here is recorded on a tape.
// Initialising and grafting weights stay on the host (nn, hybrid) and upload what they made.
#pragma once

#include <functional>
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

/// Hands the elements of a contiguous tensor, of any device, to `use` in their order, as `as` has
/// them (its own type, or one that copy() makes of it): some megabytes at a time, where they are
/// not on the host as they are, so that large weights take no memory beside them.
void read_in_pieces(const Tensor& t, Dtype as,
                    const std::function<void(std::span<const std::byte>)>& use);

/// Whether contiguous tensors, of any device, have one shape and the same bits; of two types, as
/// f32.
bool same_elements(const Tensor& a, const Tensor& b);

}  // namespace cambium
