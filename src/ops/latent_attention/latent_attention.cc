#include "ops/latent_attention/latent_attention.h"

#include "ops/attention/attention_pages.h"
#include "ops/checks.h"
#include "ops/latent_attention/latent_attention_kernels.h"
#include "ops/latent_attention/latent_attention_ref.h"
#include "ops/run.h"

namespace cambium {
namespace {

constexpr const char* kName = "latent_attention";
/// Most numbers of a piece of a latent in f8, which have one scale.
constexpr int64_t kMostInPiece = 128;

void check(const Tensor& q, const Tensor& latent, const Tensor& rope_key,
           const Segments& segments) {
  expect_rows(kName, "q (T, H, R + P)", q, 3);
  expect(latent.rank == 2 && latent.dtype == q.dtype && latent.device == q.device &&
             latent.dim(0) == q.dim(0) && latent.row_contiguous(),
         "[{}] expected latent {} ({}, R) beside q {}, got {}", kName, dtype_name(q.dtype),
         q.dim(0), q, latent);
  expect(rope_key.rank == 2 && rope_key.dtype == q.dtype && rope_key.device == q.device &&
             rope_key.dim(0) == q.dim(0) && rope_key.row_contiguous() &&
             latent.dim(1) + rope_key.dim(1) == q.dim(2),
         "[{}] expected rope_key {} ({}, {}) beside latent {} and q {}, got {}", kName,
         dtype_name(q.dtype), q.dim(0), q.dim(2) - latent.dim(1), latent, q, rope_key);
  expect(q.dim(2) <= kMaxLatent, "[{}] expected at most {} numbers of a latent and its key, got {}",
         kName, kMaxLatent, q.dim(2));
  expect(segments.tokens() == q.dim(0), "[{}] expected segments over {} tokens, got {}", kName,
         q.dim(0), segments.tokens());
}

/// What the tokens of the call leave, as rows of the pages' pieces.
std::array<NewRows, 2> new_rows(const Tensor& latent, const Tensor& rope_key,
                                const LatentPages& pages) {
  const int64_t pieces = latent_pieces(latent.dim(1));
  return {
      NewRows{latent.split_last(pieces, latent.dim(1) / pieces),
              {pages.latents, pages.latent_scales}},
      NewRows{rope_key.split_last(1, rope_key.dim(1)), {pages.rope_keys, pages.rope_key_scales}}};
}

void check_pages(const Tensor& latent, const Tensor& rope_key, const Segments& segments,
                 const LatentPages& pages, AttentionShape& shape) {
  const auto rows = new_rows(latent, rope_key, pages);
  expect_paged(kName, "latents", rows[0].to, rows[0].rows);
  expect_paged(kName, "rope_keys", rows[1].to, rows[1].rows);
  expect(pages.latents.dim(0) == pages.rope_keys.dim(0) &&
             pages.latents.dim(1) == pages.rope_keys.dim(1) &&
             pages.latents.dtype == pages.rope_keys.dtype,
         "[{}] expected as many pages of latents as of rope_keys, got {} and {}", kName,
         pages.latents, pages.rope_keys);
  shape.window = pages.window;
  shape.sinks = pages.sinks;
  use_pages(kName, shape, segments, pages.table, pages.pages_per_segment, pages.latents);
  shape.window = shape.sinks = 0;
}

}  // namespace

int64_t latent_pieces(int64_t rank) {
  int64_t pieces = (rank + kMostInPiece - 1) / kMostInPiece;
  while (rank % pieces != 0) {
    ++pieces;
  }
  return pieces;
}

void write_latents(Context& ctx, const Tensor& latent, const Tensor& rope_key,
                   const Segments& segments, const LatentPages& pages) {
  AttentionShape shape =
      one_key_shape(segments, 1, latent.dim(1) + rope_key.dim(1), latent.dim(1), 1.0F);
  check_pages(latent, rope_key, segments, pages, shape);
  const auto rows = new_rows(latent, rope_key, pages);
  write_pages(ctx, shape, {rows[0], rows[1]});
}

Tensor latent_attention(Context& ctx, const Tensor& q, const Tensor& latent, const Tensor& rope_key,
                        const Segments& segments, float scale, const ChosenTokens& chosen,
                        const LatentPages* pages) {
  check(q, latent, rope_key, segments);
  AttentionShape shape = one_key_shape(segments, q.dim(1), q.dim(2), latent.dim(1), scale);
  const bool differentiate = ctx.differentiate(q, latent, rope_key);
  Tensor latents = latent;
  Tensor keys = rope_key;
  Tensor latent_scales, key_scales;
  if (pages != nullptr) {
    expect(!differentiate, "[{}] cached latents have no gradient; train without", kName);
    check_pages(latent, rope_key, segments, *pages, shape);
    latents = rows_of(pages->latents);
    keys = rows_of(pages->rope_keys);
    latent_scales = pages->latent_scales;
    key_scales = pages->rope_key_scales;
  }
  const Tensor y = ctx.result(q.dtype, {q.dim(0), q.dim(1), latent.dim(1)}, differentiate);
  float* kept = differentiate ? ctx.scratch<float>(2 * q.dim(0) * q.dim(1)) : nullptr;
  const auto args = [=]<class T>() {
    return LatentAttention<T>{
        .shape = shape,
        .q = view<T>(q),
        .latent = key_rows<T>(latents, latent_scales),
        .rope_key = key_rows<T>(keys, key_scales),
        .chosen = chosen,
        .y = view<T>(y),
        .largest = kept,
        .inverse_sum = kept == nullptr ? nullptr : kept + q.dim(0) * q.dim(1)};
  };
  run<latent_attention_forward>(ctx, q, args);
  if (differentiate) {
    ctx.record({q, latent, rope_key, y},
               [=](const Context& c) { run<latent_attention_backward>(c, q, args); });
  }
  return y;
}

}  // namespace cambium
