// The naive definition, in the precision of its argument type.
#pragma once

#include <cstdint>

#include "tensor/rows.h"

namespace cambium::reference {

/// The rotation of rope_kernels.h.
template <class Real>
void rotate(const Rows& x_rows, const Rows& y_rows, int64_t channels, int64_t half,
            const int32_t* position, const Real* cos, const Real* sin, bool inverse,
            bool accumulate, const Real* x, Real* y) {
  for (int64_t r = 0; r < x_rows.count(); ++r) {
    const int64_t row = position[r / x_rows.inner] * half;
    const Real* in = x + x_rows.offset(r);
    Real* out = y + y_rows.offset(r);
    for (int64_t c = 0; c < channels; ++c) {
      Real value = in[c];
      if (c < 2 * half) {
        const int64_t i = c % half;
        const Real s = inverse ? -sin[row + i] : sin[row + i];
        value = c < half ? in[i] * cos[row + i] - in[i + half] * s
                         : in[i + half] * cos[row + i] + in[i] * s;
      }
      out[c] = accumulate ? out[c] + value : value;
    }
  }
}

}  // namespace cambium::reference
