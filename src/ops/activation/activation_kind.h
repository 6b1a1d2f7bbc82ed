// Which function: for callers and kernels alike.
#pragma once

#include <cstdint>

namespace cambium {

enum class ActivationKind : uint8_t {
  kSilu,      // x / (1 + exp(-x))
  kRelu2,     // max(x, 0)^2   (So et al. 2021, arXiv 2109.08668)
  kGelu,      // x Phi(x), by the error function   (Hendrycks & Gimpel 2016, arXiv 1606.08415)
  kGeluTanh,  // the same paper's approximation: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
};

}  // namespace cambium
