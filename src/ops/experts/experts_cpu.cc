#include "ops/elements_simd.h"
#include "ops/experts/experts_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

/// The softmax of a token's logits; gives the log of their sum.
float softmax_of(const float* logits, int64_t experts, float* score) {
  float largest = logits[0];
  for (int64_t e = 1; e < experts; ++e) {
    largest = logits[e] > largest ? logits[e] : largest;
  }
  float sum = 0.0F;
  for (int64_t e = 0; e < experts; e += kLanes) {
    vstore_upto(score + e, vexp(vload_upto(logits + e, experts - e) - largest), experts - e);
  }
  for (int64_t e = 0; e < experts; ++e) {
    sum += score[e];
  }
  const float inverse = 1.0F / sum;
  for (int64_t e = 0; e < experts; ++e) {
    score[e] *= inverse;
  }
  return largest + __builtin_logf(sum);
}

void sigmoid_of(const float* logits, int64_t experts, float* score) {
  for (int64_t e = 0; e < experts; e += kLanes) {
    vstore_upto(score + e, vsigmoid(vload_upto(logits + e, experts - e)), experts - e);
  }
}

/// The scores of a token's experts.
void scores_of(const Route<float>& a, int64_t t, float* score) {
  if (a.config.score == RouterScore::kSigmoid) {
    sigmoid_of(a.logits.row(t), a.lists.experts, score);
  } else {
    softmax_of(a.logits.row(t), a.lists.experts, score);
  }
}

/// What both of a token's losses are made of.
struct TokenLoss {
  float score[kMaxRoutedExperts];
  float softmax[kMaxRoutedExperts];
  float sum = 0.0F;       // of the scores
  float weighted = 0.0F;  // of score * count
  float log_sum = 0.0F;

  TokenLoss(const RouterLosses<float>& a, int64_t t) {
    const int64_t experts = a.lists.experts;
    log_sum = softmax_of(a.logits.row(t), experts, softmax);
    const bool sigmoid = a.score == RouterScore::kSigmoid;
    if (sigmoid) {
      sigmoid_of(a.logits.row(t), experts, score);
    }
    for (int64_t e = 0; e < experts; ++e) {
      score[e] = sigmoid ? score[e] : softmax[e];
      sum += score[e];
      weighted += score[e] * a.count(e);
    }
  }
};

/// The highest two of a group, added: of one, itself.
float best_two(const float* choice, int64_t size) {
  float first = -__builtin_inff();
  float second = -__builtin_inff();
  for (int64_t i = 0; i < size; ++i) {
    if (choice[i] > first) {
      second = first;
      first = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return size > 1 ? first + second : first;
}

/// Makes the choices of groups that do not stay NaN, which is never chosen.
void leave_groups(const RouterConfig& config, int64_t experts, float* choice) {
  const int64_t size = experts / config.groups;
  float best[kMaxRoutedExperts];
  for (int64_t g = 0; g < config.groups; ++g) {
    best[g] = best_two(choice + g * size, size);
  }
  for (int64_t g = 0; g < config.groups; ++g) {
    int64_t above = 0;
    for (int64_t h = 0; h < config.groups; ++h) {
      above += best[h] > best[g] || (best[h] == best[g] && h < g) ? 1 : 0;
    }
    if (above >= config.group_top) {
      for (int64_t i = 0; i < size; ++i) {
        choice[g * size + i] = __builtin_nanf("");
      }
    }
  }
}

void choose(const Route<float>& a, int64_t t) {
  const int64_t experts = a.lists.experts;
  float score[kMaxRoutedExperts];
  float choice[kMaxRoutedExperts];
  scores_of(a, t, score);
  for (int64_t e = 0; e < experts; ++e) {
    const float value = score[e] + (a.choice_bias.defined() ? a.choice_bias.data[e] : 0.0F);
    choice[e] = value == value ? value : -__builtin_inff();
  }
  if (a.config.groups > 1) {
    leave_groups(a.config, experts, choice);
  }
  float sum = 0.0F;
  float* weight = a.weight.row(t);
  for (int64_t k = 0; k < a.lists.top; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (choice[e] == choice[e] && (best < 0 || choice[e] > choice[best])) {
        best = e;
      }
    }
    choice[best] = __builtin_nanf("");
    a.lists.expert[t * a.lists.top + k] = static_cast<int32_t>(best);
    weight[k] = score[best];
    sum += score[best];
  }
  const float factor =
      a.config.renormalise ? a.config.scale / (sum + a.config.eps) : a.config.scale;
  for (int64_t k = 0; k < a.lists.top; ++k) {
    weight[k] *= factor;
  }
}

/// Orders the slots by their experts, by counting.
void order(const ExpertLists& lists) {
  for (int64_t e = 0; e <= lists.experts; ++e) {
    lists.start[e] = 0;
  }
  for (int64_t s = 0; s < lists.rows(); ++s) {
    ++lists.start[lists.expert[s] + 1];
  }
  for (int64_t e = 0; e < lists.experts; ++e) {
    lists.start[e + 1] += lists.start[e];
  }
  // start[e] counts up to where the next expert begins, and then all move up by one.
  for (int64_t s = 0; s < lists.rows(); ++s) {
    const int32_t row = lists.start[lists.expert[s]]++;
    lists.row[s] = row;
    lists.slot[row] = static_cast<int32_t>(s);
  }
  for (int64_t e = lists.experts; e > 0; --e) {
    lists.start[e] = lists.start[e - 1];
  }
  lists.start[0] = 0;
}

}  // namespace

void route_forward(const Route<float>& a) {
  const ExpertLists& lists = a.lists;
  parallel_for(lists.tokens, rows_per_piece(lists.experts * (lists.top + 4)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   choose(a, t);
                 }
               });
  order(lists);
}

void route_backward(const Route<float>& a) {
  const ExpertLists& lists = a.lists;
  const int64_t experts = lists.experts;
  parallel_for(lists.tokens, rows_per_piece(experts * 8), [&](int64_t begin, int64_t end) {
    float score[kMaxRoutedExperts];
    float dscore[kMaxRoutedExperts];
    for (int64_t t = begin; t < end; ++t) {
      scores_of(a, t, score);
      const int32_t* expert = lists.expert + t * lists.top;
      const float* dw = a.weight.grad_row(t);
      float sum = 0.0F;
      float weighted = 0.0F;
      for (int64_t k = 0; k < lists.top; ++k) {
        sum += score[expert[k]];
        weighted += dw[k] * score[expert[k]];
      }
      sum += a.config.eps;
      for (int64_t e = 0; e < experts; ++e) {
        dscore[e] = 0.0F;
      }
      float mean = 0.0F;
      for (int64_t k = 0; k < lists.top; ++k) {
        const float own = a.config.renormalise ? (dw[k] - weighted / sum) / sum : dw[k];
        dscore[expert[k]] = a.config.scale * own;
        mean += a.config.scale * own * score[expert[k]];
      }
      float* dlogits = a.logits.grad_row(t);
      const bool sigmoid = a.config.score == RouterScore::kSigmoid;
      for (int64_t e = 0; e < experts; ++e) {
        dlogits[e] += score[e] * (sigmoid ? dscore[e] * (1.0F - score[e]) : dscore[e] - mean);
      }
    }
  });
}

void router_losses_forward(const RouterLosses<float>& a) {
  parallel_for(a.lists.tokens, rows_per_piece(a.lists.experts * 8),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const TokenLoss loss(a, t);
                   a.losses.row(0)[t] = a.share() * loss.weighted / loss.sum;
                   a.losses.row(1)[t] = loss.log_sum * loss.log_sum;
                 }
               });
}

void router_losses_backward(const RouterLosses<float>& a) {
  const bool sigmoid = a.score == RouterScore::kSigmoid;
  parallel_for(a.lists.tokens, rows_per_piece(a.lists.experts * 12),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const TokenLoss loss(a, t);
                   const float mean = loss.weighted / loss.sum;
                   const float balance = a.losses.grad_row(0)[t] * a.share() / loss.sum;
                   const float z = a.losses.grad_row(1)[t] * 2.0F * loss.log_sum;
                   float* dlogits = a.logits.grad_row(t);
                   for (int64_t e = 0; e < a.lists.experts; ++e) {
                     const float s = loss.score[e];
                     const float slope = sigmoid ? s * (1.0F - s) : s;
                     dlogits[e] += balance * slope * (a.count(e) - mean) + z * loss.softmax[e];
                   }
                 }
               });
}

void dispatch_forward(const Dispatch<float>& a) {
  const auto bytes = static_cast<size_t>(a.x.channels) * sizeof(float);
  parallel_for(a.lists.rows(), rows_per_piece(a.x.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(a.y.row(r), a.x.row(a.lists.slot[r] / a.lists.top), bytes);
    }
  });
}

void dispatch_backward(const Dispatch<float>& a) {
  const int64_t top = a.lists.top;
  parallel_for(a.lists.tokens, rows_per_piece(a.x.channels * top), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* dx = a.x.grad_row(t);
      for (int64_t c = 0; c < a.x.channels; c += kLanes) {
        const int64_t left = a.x.channels - c;
        vf sum = vload_upto(dx + c, left);
        for (int64_t k = 0; k < top; ++k) {
          sum += vload_upto(a.y.grad_row(a.lists.row[t * top + k]) + c, left);
        }
        vstore_upto(dx + c, sum, left);
      }
    }
  });
}

void combine_forward(const Combine<float>& a) {
  const int64_t top = a.lists.top;
  parallel_for(a.lists.tokens, rows_per_piece(a.y.channels * top), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float share =
          a.gate.defined() ? 1.0F / (1.0F + __builtin_expf(-a.gate.row(t)[0])) : 1.0F;
      for (int64_t c = 0; c < a.y.channels; c += kLanes) {
        const int64_t left = a.y.channels - c;
        vf sum = {};
        if (a.added.defined()) {
          sum = share * vload_upto(a.added.row(t) + c, left);
        }
        for (int64_t k = 0; k < top; ++k) {
          const int64_t s = t * top + k;
          sum += a.weight.data[s] * vload_upto(a.x.row(a.lists.row[s]) + c, left);
        }
        vstore_upto(a.y.row(t) + c, sum, left);
      }
    }
  });
}

void combine_backward(const Combine<float>& a) {
  parallel_for(a.lists.rows(), rows_per_piece(a.y.channels * 2), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const float* dy = a.y.grad_row(s / a.lists.top);
      const int64_t row = a.lists.row[s];
      vf dot = {};
      for (int64_t c = 0; c < a.y.channels; c += kLanes) {
        const int64_t left = a.y.channels - c;
        const vf d = vload_upto(dy + c, left);
        dot += d * vload_upto(a.x.row(row) + c, left);
        if (a.x.grad != nullptr) {
          float* dx = a.x.grad_row(row) + c;
          vstore_upto(dx, vload_upto(dx, left) + a.weight.data[s] * d, left);
        }
      }
      if (a.weight.grad != nullptr) {
        a.weight.grad[s] += vsum(dot);
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
