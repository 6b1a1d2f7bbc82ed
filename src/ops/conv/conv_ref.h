// The naive definition, in the precision of its element type, forward and backward.
#pragma once

#include <cmath>

#include "ops/conv/conv_kernels.h"

namespace cambium {

/// Input of channel c, `back` tokens before token i of segment s; zero before the sequence. `state`
/// has the inputs before the segment, those of segment s in row `row`.
template <class T>
T conv_input(const ShortConv<T>& a, const T* state, int64_t row, int64_t s, int64_t i, int64_t back,
             int64_t c) {
  if (back <= i) {
    return *a.x.at(a.segments.begin(s) + i - back, c);
  }
  if (!a.segments.continues(s)) {
    return 0;
  }
  const int64_t column = a.taps() - 1 - (back - i);
  return state[(row * a.channels() + c) * (a.taps() - 1) + column];
}

/// Before the activation.
template <class T>
T conv_sum(const ShortConv<T>& a, const T* state, int64_t row, int64_t s, int64_t i, int64_t c) {
  T sum = a.bias.defined() ? a.bias.data[c] : T{};
  for (int64_t j = 0; j < a.taps(); ++j) {
    sum += a.weight.row(c)[j] * conv_input(a, state, row, s, i, a.taps() - 1 - j, c);
  }
  return sum;
}

/// Leaves in the state the last K - 1 inputs of each sequence.
template <class T>
void leave_conv_state(const ShortConv<T>& a) {
  for (int64_t s = 0; a.state != nullptr && s < a.segments.count; ++s) {
    const int64_t length = a.segments.length(s);
    const int64_t row = a.segments.row(s);
    for (int64_t c = 0; c < a.channels(); ++c) {
      // Column j holds the input K - 2 - j tokens before the last; it is read from a column that is
      // not yet overwritten, because those move to the left.
      for (int64_t j = 0; length > 0 && j < a.taps() - 1; ++j) {
        a.state[(row * a.channels() + c) * (a.taps() - 1) + j] =
            conv_input<T>(a, a.state, row, s, length - 1, a.taps() - 2 - j, c);
      }
    }
  }
}

template <class T>
int64_t short_conv_forward::reference_keeps(const ShortConv<T>& a) {
  return initial_state_bytes<T>(a.segments, a.state_size());
}

template <class T>
void short_conv_forward::reference(const ShortConv<T>& a) {
  if (a.kept != nullptr) {
    keep_initial_state(a.segments, a.state_size(), a.state, static_cast<T*>(a.kept));
  }
  for (int64_t s = 0; s < a.segments.count; ++s) {
    for (int64_t i = 0; i < a.segments.length(s); ++i) {
      for (int64_t c = 0; c < a.channels(); ++c) {
        const T sum = conv_sum<T>(a, a.state, a.segments.row(s), s, i, c);
        *a.y.at(a.segments.begin(s) + i, c) = a.silu ? sum / (1 + std::exp(-sum)) : sum;
      }
    }
  }
  leave_conv_state(a);
}

/// dx_s += sum_j w_j dpre_{s+K-1-j}, dw_j += sum_t dpre_t x_{t-K+1+j}, dbias += sum_t dpre_t.
template <class T>
void short_conv_backward::reference(const ShortConv<T>& a) {
  const auto* initial = static_cast<const T*>(a.kept);
  for (int64_t s = 0; s < a.segments.count; ++s) {
    for (int64_t i = 0; i < a.segments.length(s); ++i) {
      for (int64_t c = 0; c < a.channels(); ++c) {
        T dpre = *a.y.grad_at(a.segments.begin(s) + i, c);
        if (a.silu) {
          const T sum = conv_sum(a, initial, s, s, i, c);
          const T sigmoid = 1 / (1 + std::exp(-sum));
          dpre *= sigmoid * (1 + sum * (1 - sigmoid));
        }
        for (int64_t j = 0; j < a.taps(); ++j) {
          const int64_t back = a.taps() - 1 - j;
          if (a.x.grad != nullptr && i >= back) {
            *a.x.grad_at(a.segments.begin(s) + i - back, c) += a.weight.row(c)[j] * dpre;
          }
          if (a.weight.grad != nullptr) {
            a.weight.grad_row(c)[j] += dpre * conv_input(a, initial, s, s, i, back, c);
          }
        }
        if (a.bias.grad != nullptr) {
          a.bias.grad[c] += dpre;
        }
      }
    }
  }
}

}  // namespace cambium
