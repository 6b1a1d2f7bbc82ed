// The naive definition, in the precision of its element type, forward and backward.
#pragma once

#include <vector>

#include "ops/attention/attention_ref.h"
#include "ops/chosen_attention/chosen_attention_kernels.h"

namespace cambium {
namespace reference {

/// Number d of a head of a row.
template <class T>
T chosen_number(const KeyRows<T>& keys, int64_t row, int64_t head, int64_t d) {
  return attention_value(keys.wide, keys.narrow, keys.scaled, row, head, d);
}

/// The rows that head h of token t of segment s looks at, and their probabilities.
template <class T>
void chosen_probabilities(const ChosenAttention<T>& a, int64_t s, int64_t t, int64_t h,
                          std::vector<int64_t>& rows, std::vector<T>& probability) {
  const AttentionShape& shape = a.shape;
  const int64_t own = shape.first_position(s) + t - shape.start[s];
  const int64_t kv_head = h / shape.group();
  rows.clear();
  probability.clear();
  for (int64_t p = 0; p <= own; ++p) {
    if (!a.chosen.has(a.list(t, kv_head), own, p)) {
      continue;
    }
    rows.push_back(shape.key_row(s, p));
    T dot = 0;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      dot += a.q.row(t, h)[d] * chosen_number(a.k, rows.back(), kv_head, d);
    }
    probability.push_back(dot * static_cast<T>(shape.scale));
  }
  softmax_beside(probability);
}

}  // namespace reference

template <class T>
void chosen_attention_forward::reference(const ChosenAttention<T>& a) {
  std::vector<int64_t> rows;
  std::vector<T> probability;
  reference::each_query(a.shape, [&](int64_t s, int64_t t, int64_t h) {
    reference::chosen_probabilities(a, s, t, h, rows, probability);
    for (int64_t d = 0; d < a.shape.value_dim; ++d) {
      T sum = 0;
      for (size_t j = 0; j < rows.size(); ++j) {
        sum += probability[j] * reference::chosen_number(a.v, rows[j], h / a.shape.group(), d);
      }
      a.y.row(t, h)[d] = sum;
    }
  });
}

/// As attention's: dv_j += p_j dy,  ds_j = p_j (dp_j - sum p dp) with dp_j = dy . v_j,
/// dq += scale sum_j ds_j k_j,  dk_j += scale ds_j q.
template <class T>
void chosen_attention_backward::reference(const ChosenAttention<T>& a) {
  std::vector<int64_t> rows;
  std::vector<T> probability;
  std::vector<T> dp;
  reference::each_query(a.shape, [&](int64_t s, int64_t t, int64_t h) {
    reference::chosen_probabilities(a, s, t, h, rows, probability);
    const int64_t kv_head = h / a.shape.group();
    const T* q = a.q.row(t, h);
    const T* dy = a.y.grad_row(t, h);
    T mean = 0;
    dp.assign(rows.size(), T{0});
    for (size_t j = 0; j < rows.size(); ++j) {
      for (int64_t d = 0; d < a.shape.value_dim; ++d) {
        dp[j] += dy[d] * a.v.wide.row(rows[j], kv_head)[d];
      }
      mean += probability[j] * dp[j];
    }
    for (size_t j = 0; j < rows.size(); ++j) {
      const T ds = probability[j] * (dp[j] - mean) * static_cast<T>(a.shape.scale);
      for (int64_t d = 0; a.q.grad != nullptr && d < a.shape.head_dim; ++d) {
        a.q.grad_row(t, h)[d] += ds * a.k.wide.row(rows[j], kv_head)[d];
      }
      for (int64_t d = 0; a.k.wide.grad != nullptr && d < a.shape.head_dim; ++d) {
        a.k.wide.grad_row(rows[j], kv_head)[d] += ds * q[d];
      }
      for (int64_t d = 0; a.v.wide.grad != nullptr && d < a.shape.value_dim; ++d) {
        a.v.wide.grad_row(rows[j], kv_head)[d] += probability[j] * dy[d];
      }
    }
  });
}

}  // namespace cambium
