// The naive definition, in the precision of its argument type. W is Real or bf16.
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>

#include "base/float16.h"

namespace cambium::reference {

template <class Real, class W>
void embedding_forward(std::span<const int32_t> tokens, int64_t channels, const W* table, Real* y) {
  for (const int32_t token : tokens) {
    for (int64_t c = 0; c < channels; ++c) {
      const W value = table[token * channels + c];
      if constexpr (std::is_floating_point_v<W>) {
        *y++ = value;
      } else {
        *y++ = bf16_to_f32(value);
      }
    }
  }
}

template <class Real>
void embedding_backward(std::span<const int32_t> tokens, int64_t channels, const Real* dy,
                        Real* dtable) {
  for (const int32_t token : tokens) {
    for (int64_t c = 0; c < channels; ++c) {
      dtable[token * channels + c] += *dy++;
    }
  }
}

}  // namespace cambium::reference
