// How the convolution is prepared on the CPU.
#include "ops/conv/conv_ref.h"
#include "ops/conv/conv_rows.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

const float* transposed_weight(const ShortConv<float>& a, Arena& arena) {
  float* t = arena.empty(Dtype::kF32, {a.taps(), a.channels()}).ptr<float>();
  for (int64_t c = 0; c < a.channels(); ++c) {
    for (int64_t j = 0; j < a.taps(); ++j) {
      t[j * a.channels() + c] = a.weight.row(c)[j];
    }
  }
  return t;
}

}  // namespace

int64_t short_conv_forward::cpu_keeps(const ShortConv<float>& a) {
  return reference_keeps(a);
}

void short_conv_forward::cpu(const ShortConv<float>& a, Arena& arena) {
  if (a.kept != nullptr) {
    keep_initial_state(a.segments, a.state_size(), a.state, static_cast<float*>(a.kept));
  }
  if (a.x.count() <= kConvFewTokens && a.taps() <= kConvFewTaps) {
    conv_few_rows_forward({a, nullptr, a.state, a.segments, nullptr});
    return;
  }
  conv_rows_forward({a, transposed_weight(a, arena), a.state, a.segments, nullptr});
  leave_conv_state(a);
}

void short_conv_backward::cpu(const ShortConv<float>& a, Arena& arena) {
  SegmentWalk walk = a.segments;
  walk.slot = nullptr;  // the states kept are one for each segment
  float* dpre = arena.empty(Dtype::kF32, {a.x.count(), a.channels()}).ptr<float>();
  conv_rows_backward({a, transposed_weight(a, arena), static_cast<float*>(a.kept), walk, dpre});
}

}  // namespace cambium
