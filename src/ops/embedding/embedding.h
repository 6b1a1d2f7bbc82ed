// Token embedding.
#pragma once

#include <cstdint>
#include <span>

#include "tensor/context.h"

namespace cambium {

/// Rows of table (V, C), F32, F64 or BF16, for the tokens (T) -> (T, C), of the context's type of
/// activations (F64 for an F64 table). A token outside [0, V) is an Error, but that a token -1 - i
/// is the i-th of `newest` (N), I32 on the table's device, where the host does not know it yet.
/// `tokens` must outlive the tape.
Tensor embedding(Context& ctx, const Tensor& table, std::span<const int32_t> tokens,
                 const Tensor& newest = {});

}  // namespace cambium
