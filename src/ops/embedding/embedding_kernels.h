// Private to the operation: what its kernels are given.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace cambium {

struct EmbeddingForward {
  int64_t count, channels;
  const int32_t* tokens;  // (count)
  const void* table;      // (V, channels): float, or bf16
  bool table_is_bf16;
  float* y;  // (count, channels)
};

struct EmbeddingBackward {
  int64_t count, channels;
  const int32_t* tokens;
  const float* dy;  // (count, channels)
  float* dtable;    // (V, channels), added to
};

CAMBIUM_CPU_KERNEL(embedding_forward, EmbeddingForward)
CAMBIUM_CPU_KERNEL(embedding_backward, EmbeddingBackward)

}  // namespace cambium
