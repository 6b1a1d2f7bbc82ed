// The naive definition, in the precision of its element type.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "ops/attention/attention_ref.h"
#include "ops/selection/selection_kernels.h"

namespace cambium {

template <class T>
void choose_tokens_of::reference(const ChooseTokens<T>& a) {
  const AttentionShape& shape = a.shape;
  std::vector<T> scores;
  std::vector<int32_t> order;
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t t = shape.start[s]; t < shape.start[s + 1]; ++t) {
      const int64_t own = shape.first_position(s) + t - shape.start[s];
      scores.assign(static_cast<size_t>(own + 1), T{0});
      for (int64_t p = 0; p <= own; ++p) {
        for (int64_t h = 0; h < shape.heads; ++h) {
          T dot = 0;
          for (int64_t d = 0; d < shape.head_dim; ++d) {
            dot += a.q.row(t, h)[d] * reference::attention_value(a.keys.wide, a.keys.narrow,
                                                                 a.keys.scaled, shape.key_row(s, p),
                                                                 0, d);
          }
          scores[static_cast<size_t>(p)] += a.weight.row(t)[h] * std::max(dot, T{0});
        }
      }
      order.resize(scores.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
        return scores[static_cast<size_t>(x)] > scores[static_cast<size_t>(y)];
      });
      order.resize(static_cast<size_t>(a.chosen().count(own)));
      std::sort(order.begin(), order.end());
      std::copy(order.begin(), order.end(), a.positions + t * a.budget);
    }
  }
}

}  // namespace cambium
