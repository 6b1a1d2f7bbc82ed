// The naive definition, in the precision of its element type.
#pragma once

#include <vector>

#include "ops/conv/conv_token_ref.h"
#include "ops/scan_step/scan_step_kernels.h"
#include "ops/selective_scan/selective_scan_ref.h"

namespace cambium {

template <class T>
void scan_step_forward::reference(const ScanStep<T>& a) {
  const int64_t channels = a.scan.channels;
  const int64_t count = a.scan.segments.count;
  std::vector<T> u(static_cast<size_t>(count * channels));
  for (int64_t s = 0; s < count; ++s) {
    const int64_t t = a.scan.segments.begin(s);
    for (int64_t c = 0; c < channels; ++c) {
      u[static_cast<size_t>(t * channels + c)] = convolve_token(
          a.conv_weight.row(c), a.taps(), a.conv_bias.defined() ? a.conv_bias.data[c] : T{},
          a.conv_of(s) + c * (a.taps() - 1), a.scan.segments.continues(s), *a.x.at(t, a.source(c)));
    }
  }
  SelectiveScan<T> scan = a.scan;
  scan.u = {u.data(), nullptr, {count, 1, channels, channels}, channels};
  selective_scan_forward::reference(scan);
}

}  // namespace cambium
