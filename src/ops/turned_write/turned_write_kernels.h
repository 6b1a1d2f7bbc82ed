// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/attention/attention_kernels.h"
#include "ops/rope/rope_kernels.h"

namespace cambium {

template <class T>
struct TurnedWrite {
  AttentionWrite<T> write;  // of keys as they come, and values; not into fp8
  Rope<T> q;
  Rope<T> k;  // without y: its result goes to the pages
};
CAMBIUM_PLANNED_KERNEL(turned_write_forward, TurnedWrite)

}  // namespace cambium
