// The naive definition, in the precision of its element type, forward and backward.
#pragma once

#include "ops/join_heads/join_heads_kernels.h"

namespace cambium {

template <class T>
void join_heads_forward::reference(const JoinHeads<T>& j) {
  for (int64_t t = 0; t < j.a.rows.outer; ++t) {
    for (int64_t h = 0; h < j.heads(); ++h) {
      T* y = j.y.row(t, h);
      for (int64_t c = 0; c < j.a.channels; ++c) {
        y[c] = j.a.row(t, h)[c];
      }
      for (int64_t c = 0; c < j.b.channels; ++c) {
        y[j.a.channels + c] = j.b.row(t, j.shared() ? 0 : h)[c];
      }
    }
  }
}

template <class T>
void join_heads_backward::reference(const JoinHeads<T>& j) {
  for (int64_t t = 0; t < j.a.rows.outer; ++t) {
    for (int64_t h = 0; h < j.heads(); ++h) {
      const T* dy = j.y.grad_row(t, h);
      for (int64_t c = 0; j.a.grad != nullptr && c < j.a.channels; ++c) {
        j.a.grad_row(t, h)[c] += dy[c];
      }
      for (int64_t c = 0; j.b.grad != nullptr && c < j.b.channels; ++c) {
        j.b.grad_row(t, j.shared() ? 0 : h)[c] += dy[j.a.channels + c];
      }
    }
  }
}

}  // namespace cambium
