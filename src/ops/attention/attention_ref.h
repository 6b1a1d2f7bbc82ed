// The naive definition, in the precision of its element type, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/attention/attention_kernels.h"

namespace cambium {
namespace reference {

/// Number d of row (row, head): of the narrow or the scaled tensor where it is there.
template <class T>
T attention_value(const View<T>& x, const View<bf16>& narrow, const ScaledRows& scaled, int64_t row,
                  int64_t head, int64_t d) {
  if (scaled.defined()) {
    return static_cast<T>(
        widen(from_scaled(scaled.rows.row(row, head)[d], *scaled.scale(row, head))));
  }
  return narrow.defined() ? static_cast<T>(widen(narrow.row(row, head)[d])) : x.row(row, head)[d];
}

/// Row (to, head) from `from`, with its scale.
template <class T>
void attention_write_scaled(const T* from, const ScaledRows& scaled, int64_t to, int64_t head) {
  const int64_t dim = scaled.rows.channels;
  uint32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    largest = std::max(largest, magnitude_bits(static_cast<float>(from[d])));
  }
  const bf16 scale = e4m3_scale(largest);
  *scaled.scale(to, head) = scale;
  for (int64_t d = 0; d < dim; ++d) {
    scaled.rows.row(to, head)[d] = to_scaled(static_cast<float>(from[d]), 1.0F / widen(scale));
  }
}

/// Scores become their softmax, beside one more score `sink`, whose probability is given back.
template <class T>
T softmax_beside(std::vector<T>& scores, T sink = -INFINITY) {
  T largest = sink;
  for (const T x : scores) {
    largest = std::max(largest, x);
  }
  T sum = std::exp(sink - largest);
  const T beside = sum;
  for (T& x : scores) {
    x = std::exp(x - largest);
    sum += x;
  }
  for (T& x : scores) {
    x /= sum;
  }
  return beside / sum;
}

/// body(s, t, h) for every head h of every token t of every segment s.
template <class Body>
void each_query(const AttentionShape& shape, const Body& body) {
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t t = shape.start[s]; t < shape.start[s + 1]; ++t) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        body(s, t, h);
      }
    }
  }
}

/// What a query sees: rows of keys, their probabilities, the slopes of their scores by what the
/// soft cap was given, and the probability of the sink.
template <class T>
struct AttentionRow {
  std::vector<int64_t> rows;
  std::vector<T> probability;
  std::vector<T> slope;
  T sink = 0;
};

/// That of token t of segment s for its query head h.
template <class T>
void attention_row(const Attention<T>& a, int64_t s, int64_t t, int64_t h, AttentionRow<T>& row) {
  const AttentionShape& shape = a.shape;
  const int64_t p = shape.first_position(s) + t - shape.start[s];
  row.rows.clear();
  row.probability.clear();
  row.slope.clear();
  for (int64_t j = 0; j <= p; ++j) {
    if (shape.window > 0 && j <= p - shape.window && j >= shape.sinks) {
      continue;
    }
    row.rows.push_back(shape.key_row(s, j));
    T dot = 0;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      dot += a.q.row(t, h)[d] *
             attention_value(a.k, a.narrow_k, a.scaled_k, row.rows.back(), h / shape.group(), d);
    }
    T score = dot * static_cast<T>(shape.scale);
    T slope = 1;
    if (shape.softcap > 0) {
      const T bend = std::tanh(score / static_cast<T>(shape.softcap));
      score = static_cast<T>(shape.softcap) * bend;
      slope = 1 - bend * bend;
    }
    row.probability.push_back(score);
    row.slope.push_back(slope);
  }
  row.sink = softmax_beside(row.probability,
                            a.sink_logits.defined() ? T{a.sink_logits.data[h]} : T{-INFINITY});
}

}  // namespace reference

template <class T>
void attention_write::reference(const AttentionWrite<T>& a) {
  for (int64_t s = 0; s < a.shape.segments; ++s) {
    for (int64_t i = 0; i < a.shape.length(s); ++i) {
      const int64_t to = a.shape.key_row(s, a.shape.first_position(s) + i);
      for (const auto& part : a.each) {
        for (int64_t h = 0; h < part.rows.rows.inner; ++h) {
          const T* row = part.rows.row(a.shape.start[s] + i, h);
          if (part.scaled.defined()) {
            reference::attention_write_scaled(row, part.scaled, to, h);
            continue;
          }
          for (int64_t d = 0; d < part.rows.channels; ++d) {
            if (part.narrow.defined()) {
              part.narrow.row(to, h)[d] = round_to_bf16(static_cast<float>(row[d]));
            } else {
              part.pages.row(to, h)[d] = row[d];
            }
          }
        }
      }
    }
  }
}

template <class T>
void attention_forward::reference(const Attention<T>& a) {
  const AttentionShape& shape = a.shape;
  reference::AttentionRow<T> seen;
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t t = shape.start[s]; t < shape.start[s + 1]; ++t) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        reference::attention_row(a, s, t, h, seen);
        T* out = a.y.row(t, h);
        std::fill(out, out + shape.value_dim, T{0});
        for (size_t j = 0; j < seen.probability.size(); ++j) {
          for (int64_t d = 0; d < shape.value_dim; ++d) {
            out[d] += seen.probability[j] * reference::attention_value(a.v, a.narrow_v, a.scaled_v,
                                                                       seen.rows[j],
                                                                       h / shape.group(), d);
          }
        }
      }
    }
  }
}

/// With p the probabilities, dp_j = dy . v_j and c_j the slope of the soft cap (1 without):
/// dv_j += p_j dy,  ds_j = p_j (dp_j - sum p dp),  dq += scale sum_j c_j ds_j k_j,
/// dk_j += scale c_j ds_j q. The sink is a key whose dp is 0.
template <class T>
void attention_backward::reference(const Attention<T>& a) {
  const AttentionShape& shape = a.shape;
  reference::AttentionRow<T> seen;
  std::vector<T> dp;
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t t = shape.start[s]; t < shape.start[s + 1]; ++t) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        const int64_t kv_head = h / shape.group();
        reference::attention_row(a, s, t, h, seen);
        const T* q = a.q.row(t, h);
        const T* dy = a.y.grad_row(t, h);
        T mean = 0;
        dp.assign(seen.probability.size(), T{0});
        for (size_t j = 0; j < dp.size(); ++j) {
          const T* v = a.v.row(seen.rows[j], kv_head);
          for (int64_t d = 0; d < shape.value_dim; ++d) {
            dp[j] += dy[d] * v[d];
          }
          mean += seen.probability[j] * dp[j];
        }
        if (a.sink_logits.grad != nullptr) {
          a.sink_logits.grad[h] -= seen.sink * mean;
        }
        for (size_t j = 0; j < dp.size(); ++j) {
          const int64_t row = seen.rows[j];
          const T ds =
              seen.probability[j] * (dp[j] - mean) * seen.slope[j] * static_cast<T>(shape.scale);
          for (int64_t d = 0; a.q.grad != nullptr && d < shape.head_dim; ++d) {
            a.q.grad_row(t, h)[d] += ds * a.k.row(row, kv_head)[d];
          }
          for (int64_t d = 0; a.k.grad != nullptr && d < shape.head_dim; ++d) {
            a.k.grad_row(row, kv_head)[d] += ds * q[d];
          }
          for (int64_t d = 0; a.v.grad != nullptr && d < shape.value_dim; ++d) {
            a.v.grad_row(row, kv_head)[d] += seen.probability[j] * dy[d];
          }
        }
      }
    }
  }
}

}  // namespace cambium
