// The naive definition, in the precision of its element type.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ops/attention/attention_ref.h"
#include "ops/selection/selection_kernels.h"

namespace cambium {
namespace reference {

/// r[t, h, piece] of token t, which stands at `own` in segment s.
template <class T>
T piece_score(const ChooseTokens<T>& a, int64_t s, int64_t t, int64_t own, int64_t h,
              int64_t piece) {
  const int64_t size = a.chosen.size;
  T largest = -INFINITY;
  T sum = 0;
  for (int64_t p = piece * size; p < std::min(own + 1, (piece + 1) * size); ++p) {
    T dot = 0;
    for (int64_t d = 0; d < a.shape.head_dim; ++d) {
      dot += a.q.row(t, h)[d] * attention_value(a.keys.wide, a.keys.narrow, a.keys.scaled,
                                                a.shape.key_row(s, p), 0, d);
    }
    largest = std::max(largest, dot);
    sum += dot;
  }
  return a.chosen.tail ? sum / static_cast<T>(size) : largest;
}

/// The best of the scored pieces in ascending order, and the tail.
template <class T>
void choose_best(const ChooseTokens<T>& a, int64_t own, const std::vector<T>& scores, int32_t* to) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
    return scores[static_cast<size_t>(x)] > scores[static_cast<size_t>(y)];
  });
  order.resize(static_cast<size_t>(std::min(std::ssize(scores), a.top())));
  std::sort(order.begin(), order.end());
  to = std::copy(order.begin(), order.end(), to);
  if (a.has_tail(own)) {
    *to = static_cast<int32_t>(std::ssize(scores));
  }
}

}  // namespace reference

template <class T>
void choose_tokens_of::reference(const ChooseTokens<T>& a) {
  const AttentionShape& shape = a.shape;
  std::vector<T> scores;
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t t = shape.start[s]; t < shape.start[s + 1]; ++t) {
      const int64_t own = shape.first_position(s) + t - shape.start[s];
      for (int64_t list = 0; list < a.chosen.lists; ++list) {
        scores.assign(static_cast<size_t>(a.candidates(own)), T{0});
        for (int64_t i = 0; i < a.candidates(own); ++i) {
          T& score = scores[static_cast<size_t>(i)];
          if (i >= a.first_local(own)) {
            score = INFINITY;
          } else if (!a.weight.defined()) {
            score = reference::piece_score(a, s, t, own, list, i);
          } else {
            for (int64_t h = 0; h < shape.heads; ++h) {
              score +=
                  a.weight.row(t)[h] * std::max(reference::piece_score(a, s, t, own, h, i), T{0});
            }
          }
        }
        reference::choose_best(a, own, scores,
                               a.pieces + (t * a.chosen.lists + list) * a.chosen.budget);
      }
    }
  }
}

}  // namespace cambium
