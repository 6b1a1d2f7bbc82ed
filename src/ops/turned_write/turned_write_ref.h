// The naive definition, in the precision of its element type.
#pragma once

#include <vector>

#include "ops/attention/attention_ref.h"
#include "ops/rope/rope_ref.h"
#include "ops/turned_write/turned_write_kernels.h"

namespace cambium {

template <class T>
void turned_write_forward::reference(const TurnedWrite<T>& a) {
  const int64_t tokens = a.k.x.rows.outer;
  const int64_t heads = a.k.x.rows.inner;
  const int64_t channels = a.k.x.channels;
  std::vector<T> turned(static_cast<size_t>(tokens * heads * channels));
  Rope<T> k = a.k;
  k.y = {turned.data(), nullptr, {tokens, heads, heads * channels, channels}, channels};
  rope_forward::reference(Ropes<T>{2, {a.q, k}});
  AttentionWrite<T> write = a.write;
  write.each[0].rows = k.y;
  attention_write::reference(write);
}

}  // namespace cambium
