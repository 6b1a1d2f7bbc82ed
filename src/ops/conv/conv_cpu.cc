#include "base/parallel.h"
#include "base/simd.h"
#include "ops/conv/conv_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kTokensPerPiece = 64;
constexpr int64_t kChannelsPerPiece = 4 * kLanes;

// The inputs of channels [c, c + lanes) that stand `back` tokens before token i of segment s.
vf input(const ShortConvForward& a, int64_t s, int64_t i, int64_t back, int64_t c, int64_t lanes) {
  if (back <= i) {
    return vload_upto(a.x + (a.segments.begin(s) + i - back) * a.x_stride + c, lanes);
  }
  if (!a.segments.continues(s)) {
    return vf{};
  }
  float values[kLanes] = {};
  for (int64_t l = 0; l < lanes; ++l) {
    values[l] = a.state[(a.segments.row(s) * a.channels + c + l) * (a.taps - 1) +
                        (a.taps - 1 - (back - i))];
  }
  return vload(values);
}

// Before the activation.
vf convolve(const ShortConvForward& a, int64_t s, int64_t i, int64_t c, int64_t lanes) {
  vf sum = a.bias != nullptr ? vload_upto(a.bias + c, lanes) : vf{};
  if (i >= a.taps - 1) {
    const float* x = a.x + (a.segments.begin(s) + i - (a.taps - 1)) * a.x_stride + c;
    for (int64_t j = 0; j < a.taps; ++j) {
      sum +=
          vload_upto(a.weight + j * a.channels + c, lanes) * vload_upto(x + j * a.x_stride, lanes);
    }
    return sum;
  }
  for (int64_t j = 0; j < a.taps; ++j) {
    sum +=
        vload_upto(a.weight + j * a.channels + c, lanes) * input(a, s, i, a.taps - 1 - j, c, lanes);
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

int64_t token_count(const SegmentWalk& segments) {
  return segments.count == 0 ? 0 : segments.start[segments.count];
}

}  // namespace

void short_conv_forward(const ShortConvForward& a) {
  parallel_for(token_count(a.segments), kTokensPerPiece, [&](int64_t begin, int64_t end) {
    for_tokens(a.segments, begin, end, [&](int64_t s, int64_t i, int64_t t) {
      for_channels(0, a.channels, [&](int64_t c, int64_t lanes) {
        const vf pre = convolve(a, s, i, c, lanes);
        vstore_upto(a.y + t * a.channels + c, a.silu ? vsilu(pre) : pre, lanes);
      });
    });
  });
}

void short_conv_backward(const ShortConvBackward& b) {
  const ShortConvForward& a = b.forward;
  const int64_t tokens = token_count(a.segments);
  float* dpre = a.y;
  parallel_for(tokens, kTokensPerPiece, [&](int64_t begin, int64_t end) {
    for_tokens(a.segments, begin, end, [&](int64_t s, int64_t i, int64_t t) {
      for_channels(0, a.channels, [&](int64_t c, int64_t lanes) {
        const vf dy = vload_upto(b.dy + t * a.channels + c, lanes);
        const vf d = a.silu ? dy * vsilu_grad(convolve(a, s, i, c, lanes)) : dy;
        vstore_upto(dpre + t * a.channels + c, d, lanes);
      });
    });
  });
  if (b.dx != nullptr) {
    parallel_for(tokens, kTokensPerPiece, [&](int64_t begin, int64_t end) {
      for_tokens(a.segments, begin, end, [&](int64_t s, int64_t i, int64_t t) {
        const int64_t after = a.segments.length(s) - i;  // tokens from this one to the end
        const int64_t uses = after < a.taps ? after : a.taps;
        for_channels(0, a.channels, [&](int64_t c, int64_t lanes) {
          float* dx = b.dx + t * a.x_stride + c;
          vf sum = vload_upto(dx, lanes);
          for (int64_t ahead = 0; ahead < uses; ++ahead) {
            sum += vload_upto(a.weight + (a.taps - 1 - ahead) * a.channels + c, lanes) *
                   vload_upto(dpre + (t + ahead) * a.channels + c, lanes);
          }
          vstore_upto(dx, sum, lanes);
        });
      });
    });
  }
  if (b.dweight == nullptr && b.dbias == nullptr) {
    return;
  }
  parallel_for(a.channels, kChannelsPerPiece, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t c, int64_t lanes) {
      for (int64_t j = 0; b.dweight != nullptr && j < a.taps; ++j) {
        vf sum = {};
        for_tokens(a.segments, 0, tokens, [&](int64_t s, int64_t i, int64_t t) {
          sum += vload_upto(dpre + t * a.channels + c, lanes) *
                 input(a, s, i, a.taps - 1 - j, c, lanes);
        });
        float values[kLanes];
        vstore(values, sum);
        for (int64_t l = 0; l < lanes; ++l) {
          b.dweight[(c + l) * a.taps + j] += values[l];
        }
      }
      if (b.dbias != nullptr) {
        vf sum = {};
        for (int64_t t = 0; t < tokens; ++t) {
          sum += vload_upto(dpre + t * a.channels + c, lanes);
        }
        vstore_upto(b.dbias + c, vload_upto(b.dbias + c, lanes) + sum, lanes);
      }
    });
  });
}

}  // namespace cambium::CAMBIUM_ISA
