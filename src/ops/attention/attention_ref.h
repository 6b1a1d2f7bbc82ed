// The naive definition, in the precision of its argument type, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/attention/attention_kernels.h"

namespace cambium::reference {

template <class Real>
Real dot(int64_t n, const Real* a, const Real* b) {
  Real sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

/// Where row `row` of head h begins.
inline int64_t head_offset(const Rows& rows, int64_t row, int64_t h) {
  return row * rows.outer_stride + h * rows.inner_stride;
}

/// The probabilities of positions first .. first + size - 1 for the query q at position p.
template <class Real>
int64_t attention_probabilities(const AttentionShape& a, int64_t s, int64_t p, int64_t kv_head,
                                const Real* q, const Rows& k_rows, const Real* k,
                                std::vector<Real>& probability) {
  const int64_t first = a.reach(p);
  probability.clear();
  Real largest = -INFINITY;
  for (int64_t j = first; j <= p; ++j) {
    const Real* key = k + head_offset(k_rows, a.key_row(s, j), kv_head);
    probability.push_back(dot(a.head_dim, q, key) * static_cast<Real>(a.scale));
    largest = std::max(largest, probability.back());
  }
  Real sum = 0;
  for (Real& x : probability) {
    x = std::exp(x - largest);
    sum += x;
  }
  for (Real& x : probability) {
    x /= sum;
  }
  return first;
}

/// y (T, H, Dv) contiguous.
template <class Real>
void attention_forward(const AttentionShape& a, const Rows& q_rows, const Real* q,
                       const Rows& k_rows, const Real* k, const Rows& v_rows, const Real* v,
                       Real* y) {
  std::vector<Real> probability;
  for (int64_t s = 0; s < a.segments; ++s) {
    for (int64_t t = a.start[s]; t < a.start[s + 1]; ++t) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t kv_head = h / (a.heads / a.kv_heads);
        const int64_t p = a.first_position(s) + t - a.start[s];
        const int64_t first = attention_probabilities(
            a, s, p, kv_head, q + head_offset(q_rows, t, h), k_rows, k, probability);
        Real* out = y + (t * a.heads + h) * a.value_dim;
        std::fill(out, out + a.value_dim, Real{0});
        for (int64_t j = first; j <= p; ++j) {
          const Real* value = v + head_offset(v_rows, a.key_row(s, j), kv_head);
          for (int64_t d = 0; d < a.value_dim; ++d) {
            out[d] += probability[static_cast<size_t>(j - first)] * value[d];
          }
        }
      }
    }
  }
}

/// With p the probabilities and dp_j = dy . v_j:  dv_j += p_j dy,  ds_j = p_j (dp_j - sum p dp),
/// dq += scale sum_j ds_j k_j,  dk_j += scale ds_j q. Gradients are strided as their tensors; null
/// where not wanted.
template <class Real>
void attention_backward(const AttentionShape& a, const Rows& q_rows, const Real* q,
                        const Rows& k_rows, const Real* k, const Rows& v_rows, const Real* v,
                        const Real* dy, Real* dq, Real* dk, Real* dv) {
  std::vector<Real> probability;
  std::vector<Real> dp;
  for (int64_t s = 0; s < a.segments; ++s) {
    for (int64_t t = a.start[s]; t < a.start[s + 1]; ++t) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t kv_head = h / (a.heads / a.kv_heads);
        const int64_t p = a.first_position(s) + t - a.start[s];
        const int64_t q_at = head_offset(q_rows, t, h);
        const int64_t first =
            attention_probabilities(a, s, p, kv_head, q + q_at, k_rows, k, probability);
        const Real* grad = dy + (t * a.heads + h) * a.value_dim;
        dp.clear();
        for (int64_t j = first; j <= p; ++j) {
          dp.push_back(dot(a.value_dim, grad, v + head_offset(v_rows, a.key_row(s, j), kv_head)));
        }
        const Real mean = dot(p - first + 1, probability.data(), dp.data());
        for (int64_t j = first; j <= p; ++j) {
          const auto i = static_cast<size_t>(j - first);
          const int64_t k_at = head_offset(k_rows, a.key_row(s, j), kv_head);
          const int64_t v_at = head_offset(v_rows, a.key_row(s, j), kv_head);
          const Real ds = probability[i] * (dp[i] - mean) * static_cast<Real>(a.scale);
          for (int64_t d = 0; d < a.head_dim; ++d) {
            if (dq != nullptr) {
              dq[q_at + d] += ds * k[k_at + d];
            }
            if (dk != nullptr) {
              dk[k_at + d] += ds * q[q_at + d];
            }
          }
          for (int64_t d = 0; dv != nullptr && d < a.value_dim; ++d) {
            dv[v_at + d] += probability[i] * grad[d];
          }
        }
      }
    }
  }
}

}  // namespace cambium::reference
