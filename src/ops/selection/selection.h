// Sparse selection: a light index scores what is before each token, and attention looks only at the
// best of it. Chosen are single tokens (DeepSeek-V3.2's lightning indexer, DeepSeek-AI 2025, arXiv
// 2512.02556), blocks of neighbouring tokens (MiniMax-M3, as transformers' class has it), or pools
// of them, for which the mean of their keys stands.
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

enum class Granularity : uint8_t { kToken, kBlock, kPool };
/// What configurations and people call the pieces, in the order of the kinds.
inline constexpr const char* kPieceNames[] = {"tokens", "blocks", "pools"};

/// How much of what is chosen.
struct Selection {
  Granularity granularity = Granularity::kToken;
  int64_t top = 1;    // pieces: tokens, blocks or pools
  int64_t size = 1;   // tokens of a block or pool, which begin at multiples of it
  int64_t local = 1;  // of the top blocks: a token's own and those before it, always chosen

  /// A token that has so many up to itself looks at all of them.
  constexpr int64_t all() const {
    return granularity == Granularity::kPool ? (top + 1) * size - 1 : top * size;
  }
  friend bool operator==(const Selection&, const Selection&) = default;
};

/// For each token t the `top` best pieces of its sequence, of equal ones the earlier, by
///   I[t, i] = sum over heads of weight[t, h] relu(r[t, h, i])
/// in fp32, where r is of the products q[t, h] . k[s] of piece i's tokens s <= t
///   of a token, its own;   of a block, the largest;   of a pool, the mean,
/// or, without weights, for each head by r[t, h, .], a list of its own. A token is among its
/// candidates; of blocks, its own and `local` - 1 before it come first; of pools, only whole ones
/// are candidates, and the tokens after the last of them are looked at besides. Factors above 0
/// that scores may have besides change nothing. q (T, H, D), k (T, D), weight (T, H) or undefined
/// -> lists that live as long as the results. With pages, k is first written there, and the tokens
/// before the call are candidates too. The choice has no gradient: neither has what it is made of.
ChosenTokens choose_tokens(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& weight,
                           const Segments& segments, const Selection& selection,
                           const IndexPages* pages = nullptr);
/// The tokens of a window: each token's last `window`, itself among them, and the first `sinks` of
/// its sequence. Nothing where the calls' tokens all see everything before them. Positions live as
/// long as the results.
ChosenTokens choose_window(Context& ctx, const Segments& segments, int64_t window, int64_t sinks);
/// Writes the keys alone, for a call whose tokens all look at everything.
void write_index(Context& ctx, const Tensor& k, const Segments& segments, const IndexPages& pages);

}  // namespace cambium
