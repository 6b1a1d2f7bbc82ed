// The naive definition, token by token, in the precision of its element type, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/norm/norm_ref.h"
#include "ops/pointwise/pointwise_ref.h"
#include "ops/selective_scan/selective_scan_kernels.h"

namespace cambium {
namespace definition {

/// One step of channel ch: h (N) becomes the state after token t. Returns sum_n C h + D u.
template <class Real>
Real scan_step(const SelectiveScan<Real>& a, int64_t t, int64_t ch, Real* h) {
  const Real u = *a.u.at(t, ch);
  const Real step = softplus(*a.dt.at(t, ch) + a.dt_bias.data[ch]);
  Real y = a.d.data[ch] * u;
  for (int64_t n = 0; n < a.states; ++n) {
    const Real rate = -std::exp(a.a_log.data[ch * a.states + n]);
    h[n] = std::exp(step * rate) * h[n] + step * *a.b.at(t, a.b_offset(ch) + n) * u;
    y += *a.c.at(t, a.c_offset(ch) + n) * h[n];
  }
  return y;
}

/// The state of a channel before a segment: its row of `from` (d, N) where the segment continues a
/// sequence, else zero.
template <class Real>
std::vector<Real> scan_initial(const SelectiveScan<Real>& a, int64_t segment, int64_t ch,
                               const Real* from) {
  std::vector<Real> h(static_cast<size_t>(a.states));
  if (a.segments.continues(segment)) {
    std::copy_n(from + ch * a.states, h.size(), h.data());
  }
  return h;
}

/// The gradients of channel ch at token t; dh (N) is dL/dh_t of later tokens and becomes that of
/// h_{t-1}, which is `before`.
template <class Real>
void scan_step_backward(const SelectiveScan<Real>& a, int64_t t, int64_t ch,
                        const std::vector<Real>& before, std::vector<Real>& dh) {
  const auto add = [](Real* to, Real x) {
    if (to != nullptr) {
      *to += x;
    }
  };
  const auto at = [](Real* row, int64_t i) { return row == nullptr ? nullptr : row + i; };
  std::vector<Real> h = before;
  const Real y = scan_step(a, t, ch, h.data());
  const Real z = *a.z.at(t, ch);
  const Real dout = *a.y.grad_at(t, ch);
  add(a.z.grad_at(t, ch), dout * y * gate_slope(a.sigmoid, z));
  const Real dy = dout * gate_value(a.sigmoid, z);
  const Real u = *a.u.at(t, ch);
  const Real raw = *a.dt.at(t, ch) + a.dt_bias.data[ch];
  const Real step = softplus(raw);
  Real du = a.d.data[ch] * dy;
  Real dstep = 0;
  for (int64_t n = 0; n < a.states; ++n) {
    const auto i = static_cast<size_t>(n);
    const Real b = *a.b.at(t, a.b_offset(ch) + n);
    const Real rate = -std::exp(a.a_log.data[ch * a.states + n]);
    const Real decay = std::exp(step * rate);
    add(a.c.grad_at(t, a.c_offset(ch) + n), dy * h[i]);
    dh[i] += dy * *a.c.at(t, a.c_offset(ch) + n);
    add(a.b.grad_at(t, a.b_offset(ch) + n), dh[i] * step * u);
    du += dh[i] * step * b;
    const Real ddecay = dh[i] * decay * before[i];
    dstep += dh[i] * b * u + ddecay * rate;
    add(at(a.a_log.grad, ch * a.states + n), ddecay * step * rate);
    dh[i] *= decay;
  }
  add(a.u.grad_at(t, ch), du);
  const Real draw = dstep * (raw > 20 ? 1 : sigmoid(raw));
  add(a.dt.grad_at(t, ch), draw);
  add(at(a.dt_bias.grad, ch), draw);
  add(at(a.d.grad, ch), dy * u);
}

}  // namespace definition

template <class Real>
int64_t selective_scan_forward::reference_keeps(const SelectiveScan<Real>& a) {
  return initial_state_bytes<Real>(a.segments, a.channels * a.states);
}

template <class Real>
void selective_scan_forward::reference(const SelectiveScan<Real>& a) {
  if (a.kept != nullptr) {
    keep_initial_state(a.segments, a.channels * a.states, a.state, static_cast<Real*>(a.kept));
  }
  for (int64_t s = 0; s < a.segments.count; ++s) {
    for (int64_t ch = 0; ch < a.channels; ++ch) {
      std::vector<Real> h = definition::scan_initial(a, s, ch, a.state_of(s));
      for (int64_t i = 0; i < a.segments.length(s); ++i) {
        const int64_t t = a.segments.begin(s) + i;
        *a.y.at(t, ch) =
            definition::scan_step(a, t, ch, h.data()) * gate_value(a.sigmoid, *a.z.at(t, ch));
      }
      if (a.state != nullptr) {
        std::copy(h.begin(), h.end(), a.state_of(s) + ch * a.states);
      }
    }
  }
}

template <class Real>
void selective_scan_backward::reference(const SelectiveScan<Real>& a) {
  const auto* initial = static_cast<const Real*>(a.kept);
  for (int64_t s = 0; s < a.segments.count; ++s) {
    for (int64_t ch = 0; ch < a.channels; ++ch) {
      std::vector<std::vector<Real>> before;  // states h_{t-1}
      std::vector<Real> h = definition::scan_initial(a, s, ch, initial + s * a.channels * a.states);
      for (int64_t i = 0; i < a.segments.length(s); ++i) {
        before.push_back(h);
        definition::scan_step(a, a.segments.begin(s) + i, ch, h.data());
      }
      std::vector<Real> dh(h.size());
      for (int64_t i = a.segments.length(s); i-- > 0;) {
        definition::scan_step_backward(a, a.segments.begin(s) + i, ch,
                                       before[static_cast<size_t>(i)], dh);
      }
    }
  }
}

}  // namespace cambium
