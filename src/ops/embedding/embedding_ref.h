// The naive definition, in the precision of its element type.
#pragma once

#include "ops/embedding/embedding_kernels.h"

namespace cambium {

template <class T>
void embedding_forward::reference(const Embedding<T>& e) {
  for (int64_t t = 0; t < e.count; ++t) {
    for (int64_t c = 0; c < e.y.channels; ++c) {
      e.y.row(t)[c] = e.narrow.defined() ? static_cast<T>(widen(e.narrow.row(e.token(t))[c]))
                                         : e.table.row(e.token(t))[c];
    }
  }
}

template <class T>
void embedding_backward::reference(const Embedding<T>& e) {
  for (int64_t t = 0; t < e.count; ++t) {
    for (int64_t c = 0; c < e.y.channels; ++c) {
      e.table.grad_row(e.tokens[t])[c] += e.y.grad_row(t)[c];
    }
  }
}

}  // namespace cambium
