// Sparse selection: a light index scores the tokens before each token, and attention looks only at
// the best of them (DeepSeek-V3.2's lightning indexer, DeepSeek-AI 2025, arXiv 2512.02556).
#pragma once

#include <span>

#include "ops/segments.h"
#include "ops/selection/chosen_tokens.h"
#include "tensor/context.h"

namespace cambium {

/// What the index keeps of earlier tokens; pages and table as KvPages has them.
struct IndexPages {
  Tensor keys;                     // (pages, page_size, 1, D), of the type of q, or bf16, or f8
  std::span<const int32_t> table;  // (S, pages_per_segment)
  int64_t pages_per_segment = 0;
  Tensor key_scales{};  // (pages, page_size, 1) bf16: of keys in f8
};

/// For each token the `budget` tokens of its sequence, itself among the candidates, with the
/// largest
///   I[t, s] = sum over heads of weight[t, h] relu(q[t, h] . k[s]),  s <= t
/// in fp32; of equal scores the earlier token. Factors above 0 that scores may have besides change
/// nothing.   q (T, H, D), k (T, D), weight (T, H) -> positions that live as long as the results.
/// With pages, k is first written there, and the tokens before the call are candidates too. The
/// choice has no gradient: neither has what it is made of.
ChosenTokens choose_tokens(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& weight,
                           const Segments& segments, int64_t budget,
                           const IndexPages* pages = nullptr);
/// The tokens of a window: each token's last `window`, itself among them, and the first `sinks` of
/// its sequence. Nothing where the calls' tokens all see everything before them. Positions live as
/// long as the results.
ChosenTokens choose_window(Context& ctx, const Segments& segments, int64_t window, int64_t sinks);
/// Writes the keys alone, for a call whose tokens all look at everything.
void write_index(Context& ctx, const Tensor& k, const Segments& segments, const IndexPages& pages);

}  // namespace cambium
