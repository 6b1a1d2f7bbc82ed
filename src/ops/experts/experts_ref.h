// The naive definitions, in the precision of their element type.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/activation/activation_kernels.h"
#include "ops/experts/experts_kernels.h"
#include "ops/matmul/matmul_ref.h"

namespace cambium {
namespace reference {

/// The scores of a token with these logits.
template <class T>
std::vector<T> router_scores(const T* logits, int64_t experts, RouterScore kind) {
  std::vector<T> score(logits, logits + experts);
  if (kind == RouterScore::kSigmoid) {
    for (T& s : score) {
      s = 1 / (1 + std::exp(-s));
    }
    return score;
  }
  const T largest = *std::max_element(score.begin(), score.end());
  T sum = 0;
  for (T& s : score) {
    s = std::exp(s - largest);
    sum += s;
  }
  for (T& s : score) {
    s /= sum;
  }
  return score;
}

template <class T>
std::vector<T> router_scores(const Route<T>& a, int64_t t) {
  return router_scores(a.logits.row(t), a.lists.experts, a.config.score);
}

/// log of the sum of exp(logit).
template <class T>
T log_sum_exp(const T* logits, int64_t experts) {
  const T largest = *std::max_element(logits, logits + experts);
  T sum = 0;
  for (int64_t e = 0; e < experts; ++e) {
    sum += std::exp(logits[e] - largest);
  }
  return largest + std::log(sum);
}

/// What a token chooses by: score + bias, in groups that do not stay minus infinity. NaN is as
/// little.
template <class T>
std::vector<T> router_choices(const Route<T>& a, const std::vector<T>& score) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  std::vector<T> choice = score;
  for (size_t e = 0; e < choice.size(); ++e) {
    const T value =
        score[e] + (a.choice_bias.defined() ? static_cast<T>(a.choice_bias.data[e]) : T{0});
    choice[e] = value == value ? value : kNever;
  }
  if (a.config.groups == 1) {
    return choice;
  }
  const auto size = static_cast<int64_t>(choice.size()) / a.config.groups;
  std::vector<T> best;
  for (int64_t g = 0; g < a.config.groups; ++g) {
    std::vector<T> of(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(of.rbegin(), of.rend());
    best.push_back(size > 1 ? of[0] + of[1] : of[0]);
  }
  for (int64_t g = 0; g < a.config.groups; ++g) {
    const auto above = std::count_if(best.begin(), best.end(), [&](const T& other) {
      return other > best[static_cast<size_t>(g)] ||
             (other == best[static_cast<size_t>(g)] && &other < &best[static_cast<size_t>(g)]);
    });
    if (above >= a.config.group_top) {
      std::fill_n(choice.begin() + g * size, size, std::numeric_limits<T>::quiet_NaN());
    }
  }
  return choice;
}

}  // namespace reference

template <class T>
void route_forward::reference(const Route<T>& a) {
  const ExpertLists& lists = a.lists;
  for (int64_t t = 0; t < lists.tokens; ++t) {
    const std::vector<T> score = ::cambium::reference::router_scores(a, t);
    // NaN: not to be chosen.
    std::vector<T> choice = ::cambium::reference::router_choices(a, score);
    T sum = 0;
    for (int64_t k = 0; k < lists.top; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < lists.experts; ++e) {
        const T value = choice[static_cast<size_t>(e)];
        if (value == value && (best < 0 || value > choice[static_cast<size_t>(best)])) {
          best = e;
        }
      }
      choice[static_cast<size_t>(best)] = std::numeric_limits<T>::quiet_NaN();
      lists.expert[t * lists.top + k] = static_cast<int32_t>(best);
      a.weight.row(t)[k] = score[static_cast<size_t>(best)];
      sum += score[static_cast<size_t>(best)];
    }
    for (int64_t k = 0; k < lists.top; ++k) {
      Sum<T>& w = a.weight.row(t)[k];
      w = a.config.scale * (a.config.renormalise ? w / (sum + a.config.eps) : w);
    }
  }
  int32_t row = 0;
  for (int64_t e = 0; e < lists.experts; ++e) {
    lists.start[e] = row;
    for (int64_t slot = 0; slot < lists.rows(); ++slot) {
      if (lists.expert[slot] == e) {
        lists.row[slot] = row;
        lists.slot[row++] = static_cast<int32_t>(slot);
      }
    }
  }
  lists.start[lists.experts] = row;
}

template <class T>
void route_backward::reference(const Route<T>& a) {
  const ExpertLists& lists = a.lists;
  for (int64_t t = 0; t < lists.tokens; ++t) {
    const std::vector<T> score = ::cambium::reference::router_scores(a, t);
    const int32_t* expert = lists.expert + t * lists.top;
    const Sum<T>* dw = a.weight.grad_row(t);
    T sum = 0;
    T weighted = 0;
    for (int64_t k = 0; k < lists.top; ++k) {
      sum += score[static_cast<size_t>(expert[k])];
      weighted += dw[k] * score[static_cast<size_t>(expert[k])];
    }
    sum += a.config.eps;
    std::vector<T> dscore(score.size(), T{0});
    for (int64_t k = 0; k < lists.top; ++k) {
      dscore[static_cast<size_t>(expert[k])] =
          a.config.scale *
          (a.config.renormalise ? dw[k] / sum - weighted / (sum * sum) : static_cast<T>(dw[k]));
    }
    T mean = 0;
    for (size_t e = 0; e < score.size(); ++e) {
      mean += score[e] * dscore[e];
    }
    for (size_t e = 0; e < score.size(); ++e) {
      a.logits.grad_row(t)[e] += a.config.score == RouterScore::kSigmoid
                                     ? dscore[e] * score[e] * (1 - score[e])
                                     : score[e] * (dscore[e] - mean);
    }
  }
}

template <class T>
void router_losses_forward::reference(const RouterLosses<T>& a) {
  const int64_t experts = a.lists.experts;
  for (int64_t t = 0; t < a.lists.tokens; ++t) {
    const std::vector<T> score =
        ::cambium::reference::router_scores(a.logits.row(t), experts, a.score);
    T sum = 0;
    T weighted = 0;
    for (int64_t e = 0; e < experts; ++e) {
      sum += score[static_cast<size_t>(e)];
      weighted += score[static_cast<size_t>(e)] * a.count(e);
    }
    const T log_sum = ::cambium::reference::log_sum_exp(a.logits.row(t), experts);
    a.losses.row(0)[t] = a.share() * weighted / sum;
    a.losses.row(1)[t] = log_sum * log_sum;
  }
}

template <class T>
void router_losses_backward::reference(const RouterLosses<T>& a) {
  const int64_t experts = a.lists.experts;
  for (int64_t t = 0; t < a.lists.tokens; ++t) {
    const T* logits = a.logits.row(t);
    const std::vector<T> score = ::cambium::reference::router_scores(logits, experts, a.score);
    const std::vector<T> softmax =
        ::cambium::reference::router_scores(logits, experts, RouterScore::kSoftmax);
    T sum = 0;
    T weighted = 0;
    for (int64_t e = 0; e < experts; ++e) {
      sum += score[static_cast<size_t>(e)];
      weighted += score[static_cast<size_t>(e)] * a.count(e);
    }
    const T balance = a.losses.grad_row(0)[t] * a.share();
    const T z = a.losses.grad_row(1)[t] * 2 * ::cambium::reference::log_sum_exp(logits, experts);
    for (int64_t e = 0; e < experts; ++e) {
      const T s = score[static_cast<size_t>(e)];
      const T slope = a.score == RouterScore::kSigmoid ? s * (1 - s) : s;
      a.logits.grad_row(t)[e] += balance * slope / sum * (a.count(e) - weighted / sum) +
                                 z * softmax[static_cast<size_t>(e)];
    }
  }
}

template <class T>
void dispatch_forward::reference(const Dispatch<T>& a) {
  for (int64_t r = 0; r < a.lists.rows(); ++r) {
    std::copy_n(a.x.row(a.lists.slot[r] / a.lists.top), a.x.channels, a.y.row(r));
  }
}

template <class T>
void dispatch_backward::reference(const Dispatch<T>& a) {
  for (int64_t s = 0; s < a.lists.rows(); ++s) {
    for (int64_t c = 0; c < a.x.channels; ++c) {
      a.x.grad_row(s / a.lists.top)[c] += a.y.grad_row(a.lists.row[s])[c];
    }
  }
}

template <class T>
void combine_forward::reference(const Combine<T>& a) {
  const int64_t top = a.lists.top;
  for (int64_t t = 0; t < a.lists.tokens; ++t) {
    const T share = a.gate.defined() ? 1 / (1 + std::exp(-a.gate.row(t)[0])) : T{1};
    for (int64_t c = 0; c < a.y.channels; ++c) {
      T sum = a.added.defined() ? share * a.added.row(t)[c] : T{0};
      for (int64_t k = 0; k < top; ++k) {
        sum += a.weight.data[t * top + k] * a.x.row(a.lists.row[t * top + k])[c];
      }
      a.y.row(t)[c] = sum;
    }
  }
}

template <class T>
void combine_backward::reference(const Combine<T>& a) {
  for (int64_t s = 0; s < a.lists.rows(); ++s) {
    const T* dy = a.y.grad_row(s / a.lists.top);
    const int64_t row = a.lists.row[s];
    T dot = 0;
    for (int64_t c = 0; c < a.y.channels; ++c) {
      dot += dy[c] * a.x.row(row)[c];
      if (a.x.grad != nullptr) {
        a.x.grad_row(row)[c] += a.weight.data[s] * dy[c];
      }
    }
    if (a.weight.grad != nullptr) {
      a.weight.grad[s] += dot;
    }
  }
}

template <class T>
void experts_matmul_forward::reference(const ExpertsMatmul<T>& a) {
  const int64_t outputs = a.y.channels;
  for (int64_t e = 0; e < a.lists.experts; ++e) {
    for (int64_t r = a.lists.start[e]; r < a.lists.start[e + 1]; ++r) {
      for (int64_t n = 0; n < outputs; ++n) {
        T sum = a.bias.defined() ? static_cast<T>(a.bias.row(e)[n]) : T{0};
        for (int64_t k = 0; k < a.x.channels; ++k) {
          sum += a.x.row(r)[k] * ::cambium::reference::weight_value(a.weight, e * outputs + n, k);
        }
        a.y.row(r)[n] = sum;
      }
    }
  }
}

template <class T>
void experts_hidden_forward::reference(const ExpertsHidden<T>& a) {
  const int64_t outputs = a.y.channels;
  const T limit = static_cast<T>(a.limit);
  for (int64_t r = 0; r < a.lists.rows(); ++r) {
    const int64_t slot = a.lists.slot[r];
    const int64_t e = a.lists.expert[slot];
    const T* x = a.x.row(slot / a.lists.top);
    const auto product = [&](const MatmulWeight<T>& weight, const View<Sum<T>>& bias, int64_t n) {
      T sum = bias.defined() ? static_cast<T>(bias.row(e)[n]) : T{0};
      for (int64_t k = 0; k < a.x.channels; ++k) {
        sum += x[k] * ::cambium::reference::weight_value(weight, e * outputs + n, k);
      }
      return sum;
    };
    for (int64_t n = 0; n < outputs; ++n) {
      T gate = product(a.gate, a.gate_bias, n);
      T up = product(a.up, a.up_bias, n);
      T slope = 1;
      if (a.limit > 0) {
        gate = std::min(gate, limit);
        up = std::clamp(up, -limit, limit) + 1;
        slope = static_cast<T>(kClampedSlope);
      }
      a.y.row(r)[n] = up * gate / (1 + std::exp(-slope * gate));
    }
  }
}

template <class T>
void experts_grad_input::reference(const ExpertsGradInput<T>& a) {
  const int64_t outputs = a.dy.channels;
  for (int64_t e = 0; e < a.lists.experts; ++e) {
    for (int64_t r = a.lists.start[e]; r < a.lists.start[e + 1]; ++r) {
      for (int64_t k = 0; k < a.out.channels; ++k) {
        T sum = 0;
        for (int64_t n = 0; n < outputs; ++n) {
          sum += a.dy.row(r)[n] * ::cambium::reference::weight_value(a.weight, e * outputs + n, k);
        }
        a.out.row(r)[k] = a.accumulate ? a.out.row(r)[k] + sum : sum;
      }
    }
  }
}

template <class T>
void experts_grad_weight::reference(const ExpertsGradWeight<T>& a) {
  const int64_t outputs = a.dy.channels;
  for (int64_t e = 0; e < a.lists.experts; ++e) {
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t k = 0; k < a.x.channels; ++k) {
        T sum = 0;
        for (int64_t r = a.lists.start[e]; r < a.lists.start[e + 1]; ++r) {
          sum += a.dy.row(r)[n] * a.x.row(r)[k];
        }
        Sum<T>& out = a.out.row(e * outputs + n)[k];
        out = a.accumulate ? out + sum : sum;
      }
    }
  }
}

template <class T>
void experts_grad_bias::reference(const ExpertsGradBias<T>& a) {
  for (int64_t e = 0; e < a.lists.experts; ++e) {
    for (int64_t r = a.lists.start[e]; r < a.lists.start[e + 1]; ++r) {
      for (int64_t n = 0; n < a.dy.channels; ++n) {
        a.out[e * a.dy.channels + n] += a.dy.row(r)[n];
      }
    }
  }
}

}  // namespace cambium
