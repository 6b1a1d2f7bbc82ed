#include "base/parallel.h"
#include "ops/attention/key_rows_simd.h"
#include "ops/latent_attention/latent_attention_kernels.h"
#include "ops/rows_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Heads of a token that share the keys they read.
constexpr int64_t kHeads = 8;

/// The latent and the rotated key of a row, one after the other.
inline void load_key(const LatentAttention<float>& a, int64_t row, float* key) {
  load_numbers(a.latent, row, key);
  load_numbers(a.rope_key, row, key + a.shape.value_dim);
}

/// The queries of heads [first, last) of token t.
void attend(const LatentAttention<float>& a, int64_t s, int64_t t, int64_t first, int64_t last) {
  const AttentionShape& shape = a.shape;
  const int64_t own = shape.first_position(s) + t - shape.start[s];
  const int64_t rank = shape.value_dim;
  float key[kMaxLatent];
  RunningSoftmax softmax[kHeads];
  for (int64_t h = first; h < last; ++h) {
    std::memset(a.y.row(t, h), 0, static_cast<size_t>(rank) * sizeof(float));
  }
  for (int64_t i = 0; i < a.chosen.count(own); ++i) {
    load_key(a, shape.key_row(s, a.chosen.position(t, i)), key);
    for (int64_t h = first; h < last; ++h) {
      const float score = dot_rows(a.q.row(t, h), key, shape.head_dim) * shape.scale;
      softmax[h - first].add(score, key, a.y.row(t, h), rank);
    }
  }
  for (int64_t h = first; h < last; ++h) {
    const float inverse = 1.0F / softmax[h - first].sum;
    scale_row(a.y.row(t, h), inverse, rank);
    if (a.largest != nullptr) {
      a.largest[t * shape.heads + h] = softmax[h - first].largest;
      a.inverse_sum[t * shape.heads + h] = inverse;
    }
  }
}

struct Pair {
  float probability, ds;  // ds with the scale
};

/// Of query (t, h), of which delta is y . dy, and a key.
inline Pair pair_of(const LatentAttention<float>& a, int64_t t, int64_t h, const float* key,
                    float delta) {
  const int64_t at = t * a.shape.heads + h;
  const float score = dot_rows(a.q.row(t, h), key, a.shape.head_dim) * a.shape.scale;
  const float p = std::exp(score - a.largest[at]) * a.inverse_sum[at];
  const float dp = dot_rows(a.y.grad_row(t, h), key, a.shape.value_dim);
  return {p, p * (dp - delta) * a.shape.scale};
}

inline float delta_of(const LatentAttention<float>& a, int64_t t, int64_t h) {
  return dot_rows(a.y.row(t, h), a.y.grad_row(t, h), a.shape.value_dim);
}

void query_gradient(const LatentAttention<float>& a, int64_t s, int64_t t) {
  const AttentionShape& shape = a.shape;
  const int64_t own = t - shape.start[s];
  float key[kMaxLatent];
  for (int64_t h = 0; h < shape.heads; ++h) {
    const float delta = delta_of(a, t, h);
    for (int64_t i = 0; i < a.chosen.count(own); ++i) {
      load_key(a, shape.key_row(s, a.chosen.position(t, i)), key);
      add_row(a.q.grad_row(t, h), pair_of(a, t, h, key, delta).ds, key, shape.head_dim);
    }
  }
}

/// Of the key that token k of the call has.
void key_gradient(const LatentAttention<float>& a, int64_t s, int64_t k) {
  const AttentionShape& shape = a.shape;
  const int64_t rank = shape.value_dim;
  float key[kMaxLatent];
  load_key(a, k, key);
  for (int64_t t = k; t < shape.start[s + 1]; ++t) {
    if (!a.chosen.has(t, t - shape.start[s], k - shape.start[s])) {
      continue;
    }
    for (int64_t h = 0; h < shape.heads; ++h) {
      const Pair pair = pair_of(a, t, h, key, delta_of(a, t, h));
      if (a.latent.wide.grad != nullptr) {
        add_row(a.latent.wide.grad_row(k), pair.ds, a.q.row(t, h), rank);
        add_row(a.latent.wide.grad_row(k), pair.probability, a.y.grad_row(t, h), rank);
      }
      if (a.rope_key.wide.grad != nullptr) {
        add_row(a.rope_key.wide.grad_row(k), pair.ds, a.q.row(t, h) + rank, shape.head_dim - rank);
      }
    }
  }
}

/// body(segment, token, piece of `pieces`) for every token.
template <class Body>
void each_token(const AttentionShape& shape, int64_t pieces, const Body& body) {
  for (int64_t s = 0; s < shape.segments; ++s) {
    parallel_for(shape.length(s) * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        body(s, shape.start[s] + i / pieces, i % pieces);
      }
    });
  }
}

}  // namespace

void latent_attention_forward(const LatentAttention<float>& a) {
  const int64_t heads = a.shape.heads;
  each_token(a.shape, (heads + kHeads - 1) / kHeads, [&](int64_t s, int64_t t, int64_t piece) {
    const int64_t first = piece * kHeads;
    attend(a, s, t, first, first + kHeads < heads ? first + kHeads : heads);
  });
}

void latent_attention_backward(const LatentAttention<float>& a) {
  if (a.q.grad != nullptr) {
    each_token(a.shape, 1, [&](int64_t s, int64_t t, int64_t) { query_gradient(a, s, t); });
  }
  if (a.latent.wide.grad != nullptr || a.rope_key.wide.grad != nullptr) {
    each_token(a.shape, 1, [&](int64_t s, int64_t k, int64_t) { key_gradient(a, s, k); });
  }
}

}  // namespace cambium::CAMBIUM_ISA
