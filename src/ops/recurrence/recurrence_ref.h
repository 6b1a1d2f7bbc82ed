// The naive definition, token by token, in the precision of its element type, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/recurrence/recurrence_kernels.h"

namespace cambium {

/// The numbers of one token and value head.
template <class Real>
struct RecurrenceToken {
  const Recurrence<Real>& a;
  int64_t t, h;

  const Real* q() const { return a.q.at(t, a.key_head(h) * a.key_dim); }
  const Real* k() const { return a.k.at(t, a.key_head(h) * a.key_dim); }
  const Real* v() const { return a.v.at(t, h * a.dim); }
  Real weight() const { return a.weight.defined() ? *a.weight.at(t, h) : Real{1}; }
  Real decay(int64_t i) const {
    const int64_t offset = a.decay_per_channel ? h * a.key_dim + i : h;
    return std::exp(*a.log_decay.at(t, offset));
  }
};

/// S <- D S, then d = w v, or w (v - S' k) with the delta rule, then S <- S + k d'. `decayed` is S
/// between the two steps; `error` is v or v - S' k.
template <class Real>
void recurrence_step(const RecurrenceToken<Real>& token, std::vector<Real>& s,
                     std::vector<Real>& decayed, std::vector<Real>& error) {
  const auto& a = token.a;
  for (int64_t i = 0; i < a.key_dim; ++i) {
    const Real decay = token.decay(i);
    for (int64_t j = 0; j < a.dim; ++j) {
      const auto at = static_cast<size_t>(i * a.dim + j);
      decayed[at] = decay * s[at];
    }
  }
  for (int64_t j = 0; j < a.dim; ++j) {
    Real read = 0;
    for (int64_t i = 0; a.delta && i < a.key_dim; ++i) {
      read += decayed[static_cast<size_t>(i * a.dim + j)] * token.k()[i];
    }
    error[static_cast<size_t>(j)] = token.v()[j] - read;
  }
  for (int64_t i = 0; i < a.key_dim; ++i) {
    for (int64_t j = 0; j < a.dim; ++j) {
      const auto at = static_cast<size_t>(i * a.dim + j);
      s[at] = decayed[at] + token.k()[i] * token.weight() * error[static_cast<size_t>(j)];
    }
  }
}

/// The state of a head before a segment: `from` where the segment continues a sequence, else zero.
template <class Real>
std::vector<Real> initial_state(const Recurrence<Real>& a, int64_t segment, const Real* from) {
  std::vector<Real> s(static_cast<size_t>(a.key_dim * a.dim));
  if (a.segments.continues(segment)) {
    std::copy_n(from, s.size(), s.data());
  }
  return s;
}

template <class Real>
int64_t recurrence_forward::reference_keeps(const Recurrence<Real>& a) {
  return initial_state_bytes<Real>(a.segments, a.state_size());
}

template <class Real>
void recurrence_forward::reference(const Recurrence<Real>& a) {
  if (a.kept != nullptr) {
    keep_initial_state(a.segments, a.state_size(), a.state, static_cast<Real*>(a.kept));
  }
  std::vector<Real> decayed(static_cast<size_t>(a.key_dim * a.dim));
  std::vector<Real> error(static_cast<size_t>(a.dim));
  for (int64_t segment = 0; segment < a.segments.count; ++segment) {
    for (int64_t h = 0; h < a.heads; ++h) {
      std::vector<Real> s = initial_state(a, segment, a.state_of(segment, h));
      for (int64_t n = 0; n < a.segments.length(segment); ++n) {
        const RecurrenceToken<Real> token{a, a.segments.begin(segment) + n, h};
        recurrence_step(token, s, decayed, error);
        for (int64_t j = 0; j < a.dim; ++j) {
          Real y = a.skip.defined() ? a.skip.data[h] * token.v()[j] : 0;
          for (int64_t i = 0; i < a.key_dim; ++i) {
            y += token.q()[i] * s[static_cast<size_t>(i * a.dim + j)];
          }
          *a.y.at(token.t, h * a.dim + j) = y;
        }
      }
      if (a.state != nullptr) {
        std::copy(s.begin(), s.end(), a.state_of(segment, h));
      }
    }
  }
}

template <class Real>
void add_where_wanted(Real* to, Real x) {
  if (to != nullptr) {
    *to += x;
  }
}

/// The gradients of one token, given ds = dL/dS_t of later tokens (K, V), which becomes that of
/// S_{t-1}. `before` is S_{t-1}.
template <class Real>
void recurrence_step_backward(const RecurrenceToken<Real>& token, const std::vector<Real>& before,
                              std::vector<Real>& ds) {
  const auto& a = token.a;
  const int64_t t = token.t;
  const int64_t h = token.h;
  const Real* dy = a.y.grad_at(t, h * a.dim);
  const Real* k = token.k();
  const Real w = token.weight();
  std::vector<Real> s = before;
  std::vector<Real> decayed(s.size());
  std::vector<Real> error(static_cast<size_t>(a.dim));
  recurrence_step(token, s, decayed, error);
  for (int64_t i = 0; i < a.key_dim; ++i) {
    Real dq = 0;
    Real dk = 0;
    for (int64_t j = 0; j < a.dim; ++j) {
      const auto at = static_cast<size_t>(i * a.dim + j);
      dq += s[at] * dy[j];
      ds[at] += token.q()[i] * dy[j];
      dk += ds[at] * w * error[static_cast<size_t>(j)];
    }
    add_where_wanted(a.q.grad_at(t, a.key_head(h) * a.key_dim + i), dq);
    add_where_wanted(a.k.grad_at(t, a.key_head(h) * a.key_dim + i), dk);
  }
  std::vector<Real> derror(static_cast<size_t>(a.dim));
  for (int64_t j = 0; j < a.dim; ++j) {
    Real dwritten = 0;
    for (int64_t i = 0; i < a.key_dim; ++i) {
      dwritten += ds[static_cast<size_t>(i * a.dim + j)] * k[i];
    }
    add_where_wanted(a.weight.grad_at(t, h), dwritten * error[static_cast<size_t>(j)]);
    derror[static_cast<size_t>(j)] = w * dwritten;
    const Real skip = a.skip.defined() ? a.skip.data[h] : 0;
    add_where_wanted(a.v.grad_at(t, h * a.dim + j), w * dwritten + skip * dy[j]);
    if (a.skip.grad != nullptr) {
      a.skip.grad[h] += dy[j] * token.v()[j];
    }
  }
  for (int64_t i = 0; i < a.key_dim; ++i) {
    Real dk = 0;
    Real ddecay = 0;
    for (int64_t j = 0; j < a.dim; ++j) {
      const auto at = static_cast<size_t>(i * a.dim + j);
      if (a.delta) {
        dk -= decayed[at] * derror[static_cast<size_t>(j)];
        ds[at] -= k[i] * derror[static_cast<size_t>(j)];
      }
      ddecay += ds[at] * decayed[at];
      ds[at] *= token.decay(i);
    }
    add_where_wanted(a.k.grad_at(t, a.key_head(h) * a.key_dim + i), dk);
    add_where_wanted(a.log_decay.grad_at(t, a.decay_per_channel ? h * a.key_dim + i : h), ddecay);
  }
}

template <class Real>
void recurrence_backward::reference(const Recurrence<Real>& a) {
  const auto* initial = static_cast<const Real*>(a.kept);
  for (int64_t segment = 0; segment < a.segments.count; ++segment) {
    const int64_t length = a.segments.length(segment);
    for (int64_t h = 0; h < a.heads; ++h) {
      std::vector<Real> decayed(static_cast<size_t>(a.key_dim * a.dim));
      std::vector<Real> error(static_cast<size_t>(a.dim));
      std::vector<std::vector<Real>> before;  // states S_{t-1}
      std::vector<Real> s =
          initial_state(a, segment, initial + (segment * a.heads + h) * a.key_dim * a.dim);
      for (int64_t n = 0; n < length; ++n) {
        before.push_back(s);
        recurrence_step({a, a.segments.begin(segment) + n, h}, s, decayed, error);
      }
      std::vector<Real> ds(s.size());
      for (int64_t n = length; n-- > 0;) {
        recurrence_step_backward({a, a.segments.begin(segment) + n, h},
                                 before[static_cast<size_t>(n)], ds);
      }
    }
  }
}

}  // namespace cambium
