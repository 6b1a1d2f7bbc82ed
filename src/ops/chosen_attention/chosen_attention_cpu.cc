#include "base/parallel.h"
#include "ops/attention/key_rows_simd.h"
#include "ops/chosen_attention/chosen_attention_kernels.h"
#include "ops/rows_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Heads of a token that share the keys they read.
constexpr int64_t kHeads = 16;

/// A key and its value.
struct KeyValue {
  float key[kMaxKernelHeadDim];
  float value[kMaxKernelHeadDim];

  void load(const ChosenAttention<float>& a, int64_t row, int64_t kv_head) {
    load_head(a.k, row, kv_head, a.shape.head_dim, key);
    load_head(a.v, row, kv_head, a.shape.value_dim, value);
  }
};

/// The queries of heads [first, last) of token t, which read one head of keys.
void attend(const ChosenAttention<float>& a, int64_t s, int64_t t, int64_t kv_head, int64_t first,
            int64_t last) {
  const AttentionShape& shape = a.shape;
  const int64_t own = shape.first_position(s) + t - shape.start[s];
  const int64_t list = a.list(t, kv_head);
  KeyValue at;
  RunningSoftmax softmax[kHeads];
  for (int64_t h = first; h < last; ++h) {
    std::memset(a.y.row(t, h), 0, static_cast<size_t>(shape.value_dim) * sizeof(float));
  }
  for (int64_t i = 0; i < a.chosen.count(own); ++i) {
    at.load(a, shape.key_row(s, a.chosen.position(list, i)), kv_head);
    for (int64_t h = first; h < last; ++h) {
      const float score = dot_rows(a.q.row(t, h), at.key, shape.head_dim) * shape.scale;
      softmax[h - first].add(score, at.value, a.y.row(t, h), shape.value_dim);
    }
  }
  for (int64_t h = first; h < last; ++h) {
    const float inverse = 1.0F / softmax[h - first].sum;
    scale_row(a.y.row(t, h), inverse, shape.value_dim);
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
inline Pair pair_of(const ChosenAttention<float>& a, int64_t t, int64_t h, const KeyValue& at,
                    float delta) {
  const int64_t row = t * a.shape.heads + h;
  const float score = dot_rows(a.q.row(t, h), at.key, a.shape.head_dim) * a.shape.scale;
  const float p = std::exp(score - a.largest[row]) * a.inverse_sum[row];
  const float dp = dot_rows(a.y.grad_row(t, h), at.value, a.shape.value_dim);
  return {p, p * (dp - delta) * a.shape.scale};
}

inline float delta_of(const ChosenAttention<float>& a, int64_t t, int64_t h) {
  return dot_rows(a.y.row(t, h), a.y.grad_row(t, h), a.shape.value_dim);
}

void query_gradient(const ChosenAttention<float>& a, int64_t s, int64_t t, int64_t kv_head,
                    int64_t first, int64_t last) {
  const AttentionShape& shape = a.shape;
  const int64_t own = t - shape.start[s];
  KeyValue at;
  for (int64_t i = 0; i < a.chosen.count(own); ++i) {
    at.load(a, shape.key_row(s, a.chosen.position(a.list(t, kv_head), i)), kv_head);
    for (int64_t h = first; h < last; ++h) {
      const Pair pair = pair_of(a, t, h, at, delta_of(a, t, h));
      add_row(a.q.grad_row(t, h), pair.ds, at.key, shape.head_dim);
    }
  }
}

/// Of the key and value that token k of the call has for a head of keys.
void key_gradient(const ChosenAttention<float>& a, int64_t s, int64_t k, int64_t kv_head) {
  const AttentionShape& shape = a.shape;
  KeyValue at;
  at.load(a, k, kv_head);
  for (int64_t t = k; t < shape.start[s + 1]; ++t) {
    if (!a.chosen.has(a.list(t, kv_head), t - shape.start[s], k - shape.start[s])) {
      continue;
    }
    for (int64_t h = kv_head * shape.group(); h < (kv_head + 1) * shape.group(); ++h) {
      const Pair pair = pair_of(a, t, h, at, delta_of(a, t, h));
      if (a.k.wide.grad != nullptr) {
        add_row(a.k.wide.grad_row(k, kv_head), pair.ds, a.q.row(t, h), shape.head_dim);
      }
      if (a.v.wide.grad != nullptr) {
        add_row(a.v.wide.grad_row(k, kv_head), pair.probability, a.y.grad_row(t, h),
                shape.value_dim);
      }
    }
  }
}

/// body(segment, token, head of keys, first and last of some of its heads) for every token.
template <class Body>
void each_group(const AttentionShape& shape, const Body& body) {
  const int64_t group = shape.group();
  const int64_t pieces = (group + kHeads - 1) / kHeads;
  const int64_t each = shape.kv_heads * pieces;
  for (int64_t s = 0; s < shape.segments; ++s) {
    parallel_for(shape.length(s) * each, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kv_head = i % each / pieces;
        const int64_t first = i % pieces * kHeads;
        const int64_t last = first + kHeads < group ? first + kHeads : group;
        body(s, shape.start[s] + i / each, kv_head, kv_head * group + first,
             kv_head * group + last);
      }
    });
  }
}

}  // namespace

void chosen_attention_forward(const ChosenAttention<float>& a) {
  each_group(a.shape, [&](int64_t s, int64_t t, int64_t kv_head, int64_t first, int64_t last) {
    attend(a, s, t, kv_head, first, last);
  });
}

void chosen_attention_backward(const ChosenAttention<float>& a) {
  const AttentionShape& shape = a.shape;
  if (a.q.grad != nullptr) {
    each_group(shape, [&](int64_t s, int64_t t, int64_t kv_head, int64_t first, int64_t last) {
      query_gradient(a, s, t, kv_head, first, last);
    });
  }
  if (a.k.wide.grad == nullptr && a.v.wide.grad == nullptr) {
    return;
  }
  for (int64_t s = 0; s < shape.segments; ++s) {
    parallel_for(shape.length(s) * shape.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        key_gradient(a, s, shape.start[s] + i / shape.kv_heads, i % shape.kv_heads);
      }
    });
  }
}

}  // namespace cambium::CAMBIUM_ISA
