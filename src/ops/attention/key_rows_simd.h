// Rows of keys for the CPU kernels. Only *_cpu.cc files include it.
#pragma once

#include <cmath>

#include "base/simd.h"
#include "ops/attention/key_rows.h"
#include "ops/rows_simd.h"

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

/// Those of one head of a row, n of them.
static inline void load_head(const KeyRows<float>& keys, int64_t row, int64_t head, int64_t n,
                             float* to) {
  if (keys.scaled.defined()) {
    const f8e4m3* from = keys.scaled.rows.row(row, head);
    const bf16 scale = *keys.scaled.scale(row, head);
    for (int64_t d = 0; d < n; ++d) {
      to[d] = widen(from_scaled(from[d], scale));
    }
    return;
  }
  if (keys.narrow.defined()) {
    const bf16* from = keys.narrow.row(row, head);
    for (int64_t d = 0; d < n; d += kLanes) {
      vstore_upto(to + d, vload_upto(from + d, n - d), n - d);
    }
    return;
  }
  std::memcpy(to, keys.wide.row(row, head), static_cast<size_t>(n) * sizeof(float));
}

/// y *= factor
static inline void scale_row(float* y, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    vstore_upto(y + i, factor * vload_upto(y + i, n - i), n - i);
  }
}

/// A softmax over scores that come one after the other, with a running maximum (Milakov &
/// Gimelshein 2018, arXiv 1805.02867).
struct RunningSoftmax {
  float largest = -INFINITY;
  float sum = 0.0F;

  /// y, zeros at first, becomes the sum of exp(score - largest) value.
  void add(float score, const float* value, float* y, int64_t n) {
    float weight = 1.0F;
    if (score > largest) {
      const float keep = std::exp(largest - score);
      sum *= keep;
      scale_row(y, keep, n);
      largest = score;
    } else {
      weight = std::exp(score - largest);
    }
    sum += weight;
    add_row(y, weight, value, n);
  }
};

}  // namespace cambium::CAMBIUM_ISA
