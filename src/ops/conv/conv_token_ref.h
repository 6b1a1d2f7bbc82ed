// The convolution's definition for one token of one channel, as part of another definition.
#pragma once

#include <cmath>
#include <cstdint>

namespace cambium {

/// silu(bias + sum_j weight[j] input_j), the newest input being x and `past` (taps - 1) those
/// before it, oldest first; none where the sequence begins. `past` then ends with x.
template <class T>
T convolve_token(const T* weight, int64_t taps, T bias, T* past, bool continues, T x) {
  const int64_t back = taps - 1;
  T sum = bias + weight[back] * x;
  for (int64_t j = 0; j < back; ++j) {
    past[j] = continues ? past[j] : T{};
    sum += weight[j] * past[j];
  }
  for (int64_t j = 0; j < back; ++j) {
    past[j] = j + 1 < back ? past[j + 1] : x;
  }
  return sum / (1 + std::exp(-sum));
}

}  // namespace cambium
