// Attention over latents of keys and values: multi-head latent attention in the form whose keys are
// never expanded (DeepSeek-AI 2024, arXiv 2405.04434, "absorbed"). All heads share one latent and
// one rotated key a token; a head's own matrices are in its query and behind its result
// (ops/head_matmul).
#pragma once

#include <span>

#include "ops/latent_attention/max_latent.h"
#include "ops/segments.h"
#include "ops/selection/selection.h"
#include "tensor/context.h"

namespace cambium {

/// Where latents of earlier tokens live; pages and table as KvPages has them. A latent lies in
/// `latent_pieces` pieces of R / G numbers.
struct LatentPages {
  Tensor latents;                  // (pages, page_size, G, R / G), of the type of q, or bf16, or f8
  Tensor rope_keys;                // (pages, page_size, 1, P), as latents
  std::span<const int32_t> table;  // (S, pages_per_segment)
  int64_t pages_per_segment = 0;
  Tensor latent_scales{};    // (pages, page_size, G) bf16: of those in f8
  Tensor rope_key_scales{};  // (pages, page_size, 1)
  /// Pages of tokens that no window has in sight, as AttentionConfig says of windows and sinks, may
  /// be missing; what a token looks at is for its choice to say.
  int64_t window = 0, sinks = 0;
};

/// The pieces that a latent of R numbers is kept in, so that those in f8 have a scale for every 128
/// numbers at most.
int64_t latent_pieces(int64_t rank);

/// Copies the latents (T, R) and rotated keys (T, P) of the call's tokens to their pages.
void write_latents(Context& ctx, const Tensor& latent, const Tensor& rope_key,
                   const Segments& segments, const LatentPages& pages);

/// y[t, h] = sum over s of softmax_s(scale q[t, h] . [latent, rope_key][s]) latent[s], causal, over
/// the chosen tokens where there is a choice; softmax in fp32.   q (T, H, R + P), latent (T, R),
/// rope_key (T, P) -> (T, H, R). Backward adds to the gradients of all three; the choice has none.
/// With pages, which must hold the call's tokens already, latents and keys are read from there,
/// those of the tokens before too, and there is no gradient.
Tensor latent_attention(Context& ctx, const Tensor& q, const Tensor& latent, const Tensor& rope_key,
                        const Segments& segments, float scale, const ChosenTokens& chosen = {},
                        const LatentPages* pages = nullptr);

}  // namespace cambium
