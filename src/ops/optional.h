// Pointers of tensors that may be left undefined.
#pragma once

#include "tensor/tensor.h"

namespace cambium {

template <class Real>
Real* data_or_null(const Tensor& t) {
  return t.defined() ? t.ptr<Real>() : nullptr;
}

template <class Real>
Real* grad_or_null(const Tensor& t) {
  return t.defined() ? t.grad_ptr<Real>() : nullptr;
}

}  // namespace cambium
