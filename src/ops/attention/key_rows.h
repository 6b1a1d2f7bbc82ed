// Rows that queries look up, as kernels take them: of the type that is computed in, or as the pages
// of a cache keep them. Private to the operations that look up latents and keys of an index.
#pragma once

#include "ops/attention/attention_kernels.h"

namespace cambium {

/// (rows, N) numbers: those of a row lie together, in G pieces where they are in fp8.
template <class T>
struct KeyRows {
  View<T> wide;
  View<bf16> narrow;  // in place of wide: pages in bf16 where T is wider
  ScaledRows scaled;  // in place of it: pages in fp8, each of the G pieces with its scale

  /// N
  constexpr int64_t numbers() const {
    return scaled.defined() ? scaled.rows.rows.inner * scaled.rows.channels
                            : (narrow.defined() ? narrow.rows.inner * narrow.channels
                                                : wide.rows.inner * wide.channels);
  }
  /// Bytes of a row.
  constexpr int64_t bytes() const {
    return scaled.defined()
               ? numbers() + scaled.rows.rows.inner * static_cast<int64_t>(sizeof(bf16))
               : numbers() * static_cast<int64_t>(narrow.defined() ? sizeof(bf16) : sizeof(T));
  }
};

}  // namespace cambium
