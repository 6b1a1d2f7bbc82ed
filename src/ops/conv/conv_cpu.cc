#include "base/parallel.h"
#include "base/simd.h"
#include "ops/conv/conv_columns.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kTokensPerPiece = 64;
constexpr int64_t kChannelsPerPiece = 4 * kLanes;
constexpr int64_t kChannelsPerFewRows = 1024;

// The inputs of channels [c, c + lanes) that stand `back` tokens before token i of segment s.
vf input(const ConvRows& r, int64_t s, int64_t i, int64_t back, int64_t c, int64_t lanes) {
  const ShortConv<float>& a = r.op;
  if (back <= i) {
    return vload_upto(a.x.at(a.segments.begin(s) + i - back, c), lanes);
  }
  if (!a.segments.continues(s)) {
    return vf{};
  }
  float values[kLanes] = {};
  for (int64_t l = 0; l < lanes; ++l) {
    values[l] = r.state[(r.walk.row(s) * a.channels() + c + l) * (a.taps() - 1) +
                        (a.taps() - 1 - (back - i))];
  }
  return vload(values);
}

// Before the activation.
vf convolve(const ConvRows& r, int64_t s, int64_t i, int64_t c, int64_t lanes) {
  const ShortConv<float>& a = r.op;
  const int64_t channels = a.channels();
  const int64_t taps = a.taps();
  vf sum = a.bias.defined() ? vload_upto(a.bias.data + c, lanes) : vf{};
  if (i >= taps - 1) {
    const float* x = a.x.at(a.segments.begin(s) + i - (taps - 1), c);
    const int64_t stride = a.x.rows.outer_stride;
    for (int64_t j = 0; j < taps; ++j) {
      sum += vload_upto(r.weight + j * channels + c, lanes) * vload_upto(x + j * stride, lanes);
    }
    return sum;
  }
  for (int64_t j = 0; j < taps; ++j) {
    sum += vload_upto(r.weight + j * channels + c, lanes) * input(r, s, i, taps - 1 - j, c, lanes);
  }
  return sum;
}

// Calls body(segment, token of the segment, token of all) for tokens [begin, end).
template <class Body>
void for_tokens(const SegmentWalk& segments, int64_t begin, int64_t end, Body body) {
  int64_t s = 0;
  for (int64_t t = begin; t < end; ++t) {
    while (segments.begin(s) + segments.length(s) <= t) {
      ++s;
    }
    body(s, t - segments.begin(s), t);
  }
}

template <class Body>
void for_channels(int64_t begin, int64_t end, Body body) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    body(c, static_cast<int64_t>(kLanes));
  }
  if (c < end) {
    body(c, end - c);
  }
}

}  // namespace

void conv_rows_forward(const ConvRows& r) {
  const ShortConv<float>& a = r.op;
  parallel_for(a.x.count(), kTokensPerPiece, [&](int64_t begin, int64_t end) {
    for_tokens(a.segments, begin, end, [&](int64_t s, int64_t i, int64_t t) {
      for_channels(0, a.channels(), [&](int64_t c, int64_t lanes) {
        const vf pre = convolve(r, s, i, c, lanes);
        vstore_upto(a.y.at(t, c), a.silu ? vsilu(pre) : pre, lanes);
      });
    });
  });
}

void conv_few_rows_forward(const ConvRows& r) {
  const ShortConv<float>& a = r.op;
  const int64_t back = a.taps() - 1;
  parallel_for(a.channels(), kChannelsPerFewRows, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t c, int64_t lanes) {
      vf weight[kConvFewTaps];
      load_columns(a.weight.row(c), a.taps(), lanes, weight);
      const vf bias = a.bias.defined() ? vload_upto(a.bias.data + c, lanes) : vf{};
      for (int64_t s = 0; s < a.segments.count; ++s) {
        const int64_t length = a.segments.length(s);
        float* state =
            r.state == nullptr ? nullptr : r.state + (r.walk.row(s) * a.channels() + c) * back;
        vf past[kConvFewTaps] = {};  // the inputs before the token, oldest first
        if (a.segments.continues(s)) {
          load_columns(state, back, lanes, past);
        }
        for (int64_t i = 0; i < length; ++i) {
          past[back] = vload_upto(a.x.at(a.segments.begin(s) + i, c), lanes);
          vf sum = bias;
          for (int64_t j = 0; j <= back; ++j) {
            sum += weight[j] * past[j];
          }
          vstore_upto(a.y.at(a.segments.begin(s) + i, c), a.silu ? vsilu(sum) : sum, lanes);
          for (int64_t j = 0; j < back; ++j) {
            past[j] = past[j + 1];
          }
        }
        if (state != nullptr && length > 0) {
          store_columns(past, back, lanes, state);
        }
      }
    });
  });
}

void conv_rows_backward(const ConvRows& r) {
  const ShortConv<float>& a = r.op;
  const int64_t tokens = a.x.count();
  const int64_t channels = a.channels();
  const int64_t taps = a.taps();
  parallel_for(tokens, kTokensPerPiece, [&](int64_t begin, int64_t end) {
    for_tokens(a.segments, begin, end, [&](int64_t s, int64_t i, int64_t t) {
      for_channels(0, channels, [&](int64_t c, int64_t lanes) {
        const vf dy = vload_upto(a.y.grad_at(t, c), lanes);
        const vf d = a.silu ? dy * vsilu_grad(convolve(r, s, i, c, lanes)) : dy;
        vstore_upto(r.dpre + t * channels + c, d, lanes);
      });
    });
  });
  if (a.x.grad != nullptr) {
    parallel_for(tokens, kTokensPerPiece, [&](int64_t begin, int64_t end) {
      for_tokens(a.segments, begin, end, [&](int64_t s, int64_t i, int64_t t) {
        const int64_t after = a.segments.length(s) - i;  // tokens from this one to the end
        const int64_t uses = after < taps ? after : taps;
        for_channels(0, channels, [&](int64_t c, int64_t lanes) {
          float* dx = a.x.grad_at(t, c);
          vf sum = vload_upto(dx, lanes);
          for (int64_t ahead = 0; ahead < uses; ++ahead) {
            sum += vload_upto(r.weight + (taps - 1 - ahead) * channels + c, lanes) *
                   vload_upto(r.dpre + (t + ahead) * channels + c, lanes);
          }
          vstore_upto(dx, sum, lanes);
        });
      });
    });
  }
  if (a.weight.grad == nullptr && a.bias.grad == nullptr) {
    return;
  }
  parallel_for(channels, kChannelsPerPiece, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t c, int64_t lanes) {
      for (int64_t j = 0; a.weight.grad != nullptr && j < taps; ++j) {
        vf sum = {};
        for_tokens(a.segments, 0, tokens, [&](int64_t s, int64_t i, int64_t t) {
          sum +=
              vload_upto(r.dpre + t * channels + c, lanes) * input(r, s, i, taps - 1 - j, c, lanes);
        });
        float values[kLanes];
        vstore(values, sum);
        for (int64_t l = 0; l < lanes; ++l) {
          a.weight.grad[(c + l) * taps + j] += values[l];
        }
      }
      if (a.bias.grad != nullptr) {
        vf sum = {};
        for (int64_t t = 0; t < tokens; ++t) {
          sum += vload_upto(r.dpre + t * channels + c, lanes);
        }
        vstore_upto(a.bias.grad + c, vload_upto(a.bias.grad + c, lanes) + sum, lanes);
      }
    });
  });
}

}  // namespace cambium::CAMBIUM_ISA
