// Causal softmax attention with grouped key-value heads, over packed sequences and paged caches.
#pragma once

#include <span>

#include "ops/segments.h"
#include "tensor/context.h"

namespace cambium {

struct AttentionConfig {
  /// Scores are q.k * scale.
  float scale = 1.0F;
  /// A token sees itself and the window - 1 tokens before it; 0 = all before it.
  int64_t window = 0;
  /// With a window: the first tokens of the sequence that every later token sees too (Xiao et al.
  /// 2023, arXiv 2309.17453).
  int64_t sinks = 0;
  /// Above 0: scores become softcap tanh(score / softcap) before the mask (Gemma 2, arXiv
  /// 2408.00118).
  float softcap = 0.0F;
  /// (H) of the type of q's sums, or undefined: a score of each head that joins the softmax and has
  /// no value, so that a token may attend to nothing (gpt-oss). It has a gradient.
  Tensor sink_logits{};
};

/// Where keys and values of earlier tokens live. Token at position p of segment s is row p %
/// page_size of page table[s * pages_per_segment + p / page_size]; entries of pages that no token
/// of the call sees may be -1.
struct KvPages {
  Tensor keys;                     // (pages, page_size, Hkv, D), of the type of k, or bf16, or f8
  Tensor values;                   // (pages, page_size, Hkv, Dv), as keys
  std::span<const int32_t> table;  // (S, pages_per_segment)
  int64_t pages_per_segment = 0;
  Tensor key_scales{};  // (pages, page_size, Hkv) bf16: of keys and values in f8, whose rows (of a
  Tensor value_scales{};  // token and head) are each times their own; written with them
  bool written = false;   // the call's rows are there already (ops/turned_write)
};

/// softmax(q k^T scale, causal) v per head; query head h reads key-value head h / (H / Hkv). With
/// sink logits b the sum below the softmax has exp(b_h) besides.
/// Softmax in fp32.   q (T, H, D), k (T, Hkv, D), v (T, Hkv, Dv), heads and head dims contiguous
/// together, rows evenly spaced -> (T, H, Dv). With pages, k and v are first written to the cache,
/// and a segment also attends to the tokens of its sequence before it; no gradient then. All keys
/// and values are then read from the pages, those of this call too: with bf16 or f8 pages every
/// token sees the same rounded numbers however its sequence is cut into calls. Keys come already
/// rotated.
Tensor attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Segments& segments, const AttentionConfig& config,
                 const KvPages* pages = nullptr);

/// Writes the rows of the call's keys k (T, Hkv, D) and values v (T, Hkv, Dv) to their pages, for
/// calls that then find them written.
void write_keys(Context& ctx, const Tensor& k, const Tensor& v, const Segments& segments,
                const KvPages& pages);

}  // namespace cambium
