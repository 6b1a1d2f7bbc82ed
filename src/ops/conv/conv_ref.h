// The naive definition, in the precision of its argument type, forward and backward.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/segment_walk.h"

namespace cambium::reference {

/// Input of channel c, `back` tokens before token i of segment s; zero before the sequence.
template <class Real>
Real conv_input(const SegmentWalk& segments, int64_t s, int64_t i, int64_t back, int64_t channels,
                int64_t taps, const Real* x, int64_t x_stride, const Real* state, int64_t c) {
  if (back <= i) {
    return x[(segments.begin(s) + i - back) * x_stride + c];
  }
  if (!segments.continues(s)) {
    return 0;
  }
  const int64_t column = taps - 1 - (back - i);
  return state[(segments.row(s) * channels + c) * (taps - 1) + column];
}

template <class Real>
Real silu(Real x) {
  return x / (1 + std::exp(-x));
}

template <class Real>
void short_conv_forward(const SegmentWalk& segments, int64_t channels, int64_t taps, const Real* x,
                        int64_t x_stride, const Real* weight, const Real* bias, bool use_silu,
                        const Real* state, Real* y) {
  for (int64_t s = 0; s < segments.count; ++s) {
    for (int64_t i = 0; i < segments.length(s); ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        Real sum = bias != nullptr ? bias[c] : 0;
        for (int64_t j = 0; j < taps; ++j) {
          sum += weight[c * taps + j] *
                 conv_input(segments, s, i, taps - 1 - j, channels, taps, x, x_stride, state, c);
        }
        y[(segments.begin(s) + i) * channels + c] = use_silu ? silu(sum) : sum;
      }
    }
  }
}

/// Leaves in the state the last taps - 1 inputs of each sequence.
template <class Real>
void short_conv_state(const SegmentWalk& segments, int64_t channels, int64_t taps, const Real* x,
                      int64_t x_stride, Real* state) {
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t length = segments.length(s);
    for (int64_t c = 0; c < channels; ++c) {
      // Column j holds the input taps - 2 - j tokens before the last; it is read from a column that
      // is not yet overwritten, because those move to the left.
      for (int64_t j = 0; length > 0 && j < taps - 1; ++j) {
        state[(segments.row(s) * channels + c) * (taps - 1) + j] = conv_input(
            segments, s, length - 1, taps - 2 - j, channels, taps, x, x_stride, state, c);
      }
    }
  }
}

/// dx_s += sum_j w_j dpre_{s+K-1-j}, dw_j += sum_t dpre_t x_{t-K+1+j}, dbias += sum_t dpre_t.
template <class Real>
void short_conv_backward(const SegmentWalk& segments, int64_t channels, int64_t taps, const Real* x,
                         int64_t x_stride, const Real* weight, const Real* bias, bool use_silu,
                         const Real* state, const Real* dy, Real* dx, Real* dweight, Real* dbias) {
  for (int64_t s = 0; s < segments.count; ++s) {
    for (int64_t i = 0; i < segments.length(s); ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const auto input = [&](int64_t j) {
          return conv_input(segments, s, i, taps - 1 - j, channels, taps, x, x_stride, state, c);
        };
        Real dpre = dy[(segments.begin(s) + i) * channels + c];
        if (use_silu) {
          Real sum = bias != nullptr ? bias[c] : 0;
          for (int64_t j = 0; j < taps; ++j) {
            sum += weight[c * taps + j] * input(j);
          }
          const Real sigmoid = 1 / (1 + std::exp(-sum));
          dpre *= sigmoid * (1 + sum * (1 - sigmoid));
        }
        for (int64_t j = 0; j < taps; ++j) {
          const int64_t from = i - (taps - 1 - j);
          if (dx != nullptr && from >= 0) {
            dx[(segments.begin(s) + from) * x_stride + c] += weight[c * taps + j] * dpre;
          }
          if (dweight != nullptr) {
            dweight[c * taps + j] += dpre * input(j);
          }
        }
        if (dbias != nullptr) {
          dbias[c] += dpre;
        }
      }
    }
  }
}

}  // namespace cambium::reference
