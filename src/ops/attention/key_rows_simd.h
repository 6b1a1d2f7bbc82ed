// Rows of keys for the CPU kernels. Only *_cpu.cc files include it.
#pragma once

#include "base/simd.h"
#include "ops/attention/key_rows.h"

namespace cambium::CAMBIUM_ISA {

/// The numbers of a row.
static inline void load_numbers(const KeyRows<float>& keys, int64_t row, float* to) {
  if (keys.scaled.defined()) {
    const int64_t size = keys.scaled.rows.channels;
    for (int64_t g = 0; g < keys.scaled.rows.rows.inner; ++g) {
      const f8e4m3* from = keys.scaled.rows.row(row, g);
      const bf16 scale = *keys.scaled.scale(row, g);
      for (int64_t d = 0; d < size; ++d) {
        to[g * size + d] = widen(from_scaled(from[d], scale));
      }
    }
    return;
  }
  const int64_t n = keys.numbers();
  if (keys.narrow.defined()) {
    const bf16* from = keys.narrow.at(row, 0);
    for (int64_t d = 0; d < n; d += kLanes) {
      vstore_upto(to + d, vload_upto(from + d, n - d), n - d);
    }
    return;
  }
  std::memcpy(to, keys.wide.at(row, 0), static_cast<size_t>(n) * sizeof(float));
}

}  // namespace cambium::CAMBIUM_ISA
