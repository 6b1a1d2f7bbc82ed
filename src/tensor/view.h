// View: what a kernel sees of a tensor: typed pointers and the walk over its rows. Free of
// containers, for kernels of every backend.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"
#include "tensor/rows.h"

namespace cambium {

/// T is the type of the elements, G that of the gradient: T itself for activations, Sum<T> for
/// weights.
template <class T, class G = T>
struct View {
  T* data = nullptr;  // null: the operation goes without this input
  G* grad = nullptr;  // null: not wanted; else of the same layout as data
  Rows rows{};
  int64_t channels = 0;  // elements of a row

  constexpr bool defined() const { return data != nullptr; }
  constexpr int64_t count() const { return rows.count(); }
  /// Row r, counted over tokens and rows of a token.
  constexpr T* row(int64_t r) const { return data + rows.offset(r); }
  constexpr G* grad_row(int64_t r) const { return grad + rows.offset(r); }
  /// Element `offset` of token t, whose rows lie together, and its gradient or null.
  constexpr T* at(int64_t t, int64_t offset) const { return data + t * rows.outer_stride + offset; }
  constexpr G* grad_at(int64_t t, int64_t offset) const {
    return grad == nullptr ? nullptr : grad + t * rows.outer_stride + offset;
  }
  /// Row i of token t.
  constexpr T* row(int64_t t, int64_t i) const { return data + rows.offset(t, i); }
  constexpr G* grad_row(int64_t t, int64_t i) const { return grad + rows.offset(t, i); }
};

}  // namespace cambium
