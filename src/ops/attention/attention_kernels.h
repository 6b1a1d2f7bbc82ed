// Private to the operation: what its definition and its kernels are given.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/kernel.h"
#include "tensor/view.h"

namespace cambium {

class SegmentPlans;

/// Positions [0, sinks) and [first, end), with at least one between them where there are sinks.
struct SeenKeys {
  int64_t sinks;
  int64_t first;
  int64_t end;

  int64_t count() const { return sinks + end - first; }
  bool has(int64_t p) const { return p < sinks || (p >= first && p < end); }
  /// The first of the tiles of `size` positions, which begin at multiples of it.
  int64_t first_tile(int64_t size) const { return sinks > 0 ? 0 : first / size * size; }
  /// The tile after the one at p: those between the sinks and the window are left out.
  int64_t next_tile(int64_t p, int64_t size) const {
    p += size;
    const int64_t window = first / size * size;
    return p >= sinks && p < window ? window : p;
  }
};

/// Positions [first, end).
struct KeyRange {
  int64_t first;
  int64_t end;
};

/// Which tokens see which. The keys of segment s stand at positions 0 .. last; without pages
/// position 0 is the segment's own first token, and its key rows are the segment's rows.
struct AttentionShape {
  int64_t segments;
  const int32_t* start;     // (S + 1)
  const int32_t* position;  // (S), or null without pages: all zero
  const int32_t* table;     // (S, pages_per_segment), or null without pages
  int64_t pages_per_segment;
  int64_t page_size;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;   // of q and k
  int64_t value_dim;  // of v
  float scale;
  int64_t window;                 // 0 = unbounded
  int64_t sinks;                  // positions that all see, where there is a window
  float softcap = 0.0F;           // above 0: scores become softcap tanh(score / softcap)
  SegmentPlans* plans = nullptr;  // of these segments (ops/segment_plans.h), or null

  int64_t group() const { return heads / kv_heads; }
  int64_t length(int64_t s) const { return start[s + 1] - start[s]; }
  int64_t first_position(int64_t s) const { return position == nullptr ? 0 : position[s]; }
  /// The first position of the window of a token at position p.
  int64_t reach(int64_t p) const { return window > 0 && p >= window ? p - window + 1 : 0; }
  /// Whether that token sees keys as sinks only.
  bool uses_sinks(int64_t p) const { return sinks > 0 && reach(p) > 0; }
  /// What tokens at positions [p, last] see.
  SeenKeys seen_keys(int64_t p, int64_t last) const {
    const int64_t first = reach(p);
    return sinks < first ? SeenKeys{sinks, first, last + 1} : SeenKeys{0, 0, last + 1};
  }
  SeenKeys seen_keys(int64_t s) const {
    return seen_keys(first_position(s), first_position(s) + length(s) - 1);
  }
  /// The same in ranges for kernels of few rows. Of a range that ends within the sinks a token sees
  /// all up to itself; of any other, what is in its window.
  std::vector<KeyRange> key_ranges(int64_t p, int64_t last) const {
    if (!uses_sinks(last)) {
      return {{reach(p), last + 1}};
    }
    const int64_t middle = std::max(sinks, reach(p));
    if (middle > last) {
      return {{0, last + 1}};
    }
    return {{0, sinks}, {middle, last + 1}};
  }
  /// Row of the key (or value) tensor that holds position p.
  int64_t key_row(int64_t s, int64_t p) const {
    return table == nullptr
               ? start[s] + p
               : table[s * pages_per_segment + p / page_size] * page_size + p % page_size;
  }
};

/// The kernels keep a head in buffers of this many numbers.
inline constexpr int64_t kMaxKernelHeadDim = 256;

/// Pages in fp8: each row of a token and head with a scale of its own (base/float8.h).
struct ScaledRows {
  View<f8e4m3> rows;       // (pages * page_size, Hkv, D)
  bf16* scales = nullptr;  // (pages * page_size, Hkv)

  constexpr bool defined() const { return rows.defined(); }
  constexpr bf16* scale(int64_t row, int64_t head) const {
    return scales + row * rows.rows.inner + head;
  }
};

template <class T>
struct Attention {
  AttentionShape shape;
  View<T> q;            // (T, H, D)
  View<T> k;            // (T, Hkv, D), or the pages as (pages * page_size, Hkv, D)
  View<T> v;            // the same of Dv
  View<bf16> narrow_k;  // in place of k and v: pages in bf16 where T is wider
  View<bf16> narrow_v;
  ScaledRows scaled_k;  // in place of them: pages in fp8
  ScaledRows scaled_v;
  View<T> new_k;  // (T, Hkv, D), (T, Hkv, Dv): of this call's tokens, where pages hold the same
  View<T> new_v;  // numbers; else undefined
  View<T> y;      // (T, H, Dv) contiguous
  View<Sum<T>> sink_logits;  // (H): scores without values, or undefined
  float* largest;            // (T, H) kept for backward: the largest score, times log2(e);
                             // null if unwanted; of a sink too
  float* inverse_sum;        // (T, H): 1 / sum of exp(score - largest), the sink's too
  // On CUDA, backward: that gradient lies together, holds nothing yet and is set, before any that
  // is added to.
  bool set_q = false;
  bool set_k = false;
  bool set_v = false;
};
CAMBIUM_PLANNED_KERNEL(attention_forward, Attention)
/// Reads y and y.grad; adds to q.grad, k.grad and v.grad, or sets them, and adds to
/// sink_logits.grad. Without pages.
CAMBIUM_PLANNED_KERNEL(attention_backward, Attention)

/// Copies the rows of new tokens, keys and values, to their places in the pages. Each part has as
/// many rows a token as its view says; one that is undefined has none.
template <class T>
struct AttentionWrite {
  AttentionShape shape;
  struct {
    View<T> rows{};       // (T, Hkv, D)
    View<T> pages{};      // (pages * page_size, Hkv, D)
    View<bf16> narrow{};  // in place of pages: rounded to bf16
    ScaledRows scaled{};  // in place of pages: in fp8
  } each[2];
};
CAMBIUM_KERNEL(attention_write, AttentionWrite)

}  // namespace cambium
