// The naive definition, in the precision of its element type, forward and backward.
#pragma once

#include "ops/scale_heads/scale_heads_kernels.h"

namespace cambium {

template <class T>
void scale_heads_forward::reference(const ScaleHeads<T>& a) {
  for (int64_t t = 0; t < a.tokens(); ++t) {
    for (int64_t h = 0; h < a.heads(); ++h) {
      for (int64_t c = 0; c < a.x.channels; ++c) {
        a.y.row(t, h)[c] = a.factor.data[h] * a.x.row(t, h)[c];
      }
    }
  }
}

template <class T>
void scale_heads_backward::reference(const ScaleHeads<T>& a) {
  for (int64_t t = 0; t < a.tokens(); ++t) {
    for (int64_t h = 0; h < a.heads(); ++h) {
      const T* dy = a.y.grad_row(t, h);
      for (int64_t c = 0; c < a.x.channels; ++c) {
        if (a.x.grad != nullptr) {
          a.x.grad_row(t, h)[c] += a.factor.data[h] * dy[c];
        }
        if (a.factor.grad != nullptr) {
          a.factor.grad[h] += a.x.row(t, h)[c] * dy[c];
        }
      }
    }
  }
}

}  // namespace cambium
