// The naive definition, in the precision of its element type, forward and backward.
#pragma once

#include <vector>

#include "ops/attention/attention_ref.h"
#include "ops/latent_attention/latent_attention_kernels.h"

namespace cambium {
namespace reference {

/// Number d of a row.
template <class T>
T key_number(const KeyRows<T>& keys, int64_t row, int64_t d) {
  const int64_t size = keys.scaled.defined()   ? keys.scaled.rows.channels
                       : keys.narrow.defined() ? keys.narrow.channels
                                               : keys.wide.channels;
  return attention_value(keys.wide, keys.narrow, keys.scaled, row, d / size, d % size);
}

/// The rows that token t of segment s looks at, and their probabilities for its head h.
template <class T>
void latent_probabilities(const LatentAttention<T>& a, int64_t s, int64_t t, int64_t h,
                          std::vector<int64_t>& rows, std::vector<T>& probability) {
  const AttentionShape& shape = a.shape;
  const int64_t own = shape.first_position(s) + t - shape.start[s];
  const int64_t rank = shape.value_dim;
  rows.clear();
  probability.clear();
  for (int64_t i = 0; i < a.chosen.count(own); ++i) {
    rows.push_back(shape.key_row(s, a.chosen.position(t, i)));
    T dot = 0;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      dot += a.q.row(t, h)[d] * (d < rank ? key_number(a.latent, rows.back(), d)
                                          : key_number(a.rope_key, rows.back(), d - rank));
    }
    probability.push_back(dot * static_cast<T>(shape.scale));
  }
  softmax_beside(probability);
}

}  // namespace reference

template <class T>
void latent_attention_forward::reference(const LatentAttention<T>& a) {
  std::vector<int64_t> rows;
  std::vector<T> probability;
  reference::each_query(a.shape, [&](int64_t s, int64_t t, int64_t h) {
    reference::latent_probabilities(a, s, t, h, rows, probability);
    for (int64_t d = 0; d < a.shape.value_dim; ++d) {
      T sum = 0;
      for (size_t j = 0; j < rows.size(); ++j) {
        sum += probability[j] * reference::key_number(a.latent, rows[j], d);
      }
      a.y.row(t, h)[d] = sum;
    }
  });
}

/// As attention's, where a key's first R numbers are its value too: ds_j = p_j (dp_j - sum p dp),
/// dq += scale sum_j ds_j k_j,  dk_j += scale ds_j q,  dlatent_j += p_j dy.
template <class T>
void latent_attention_backward::reference(const LatentAttention<T>& a) {
  const int64_t rank = a.shape.value_dim;
  std::vector<int64_t> rows;
  std::vector<T> probability;
  std::vector<T> dp;
  reference::each_query(a.shape, [&](int64_t s, int64_t t, int64_t h) {
    reference::latent_probabilities(a, s, t, h, rows, probability);
    const T* q = a.q.row(t, h);
    const T* dy = a.y.grad_row(t, h);
    T mean = 0;
    dp.assign(rows.size(), T{0});
    for (size_t j = 0; j < rows.size(); ++j) {
      for (int64_t d = 0; d < rank; ++d) {
        dp[j] += dy[d] * a.latent.wide.row(rows[j])[d];
      }
      mean += probability[j] * dp[j];
    }
    for (size_t j = 0; j < rows.size(); ++j) {
      const T ds = probability[j] * (dp[j] - mean) * static_cast<T>(a.shape.scale);
      for (int64_t d = 0; d < a.shape.head_dim; ++d) {
        const bool is_latent = d < rank;
        const View<T>& key = is_latent ? a.latent.wide : a.rope_key.wide;
        const int64_t at = is_latent ? d : d - rank;
        if (a.q.grad != nullptr) {
          a.q.grad_row(t, h)[d] += ds * key.row(rows[j])[at];
        }
        if (key.grad != nullptr) {
          key.grad_row(rows[j])[at] += ds * q[d] + (is_latent ? probability[j] * dy[d] : T{0});
        }
      }
    }
  });
}

}  // namespace cambium
