// Rotary position embedding, half-split pairing: dims i and i + D/2 turn by position * inv_freq[i].
// Su et al. 2021, arXiv 2104.09864.
#pragma once

#include "ops/segments.h"
#include "tensor/context.h"

namespace cambium {

struct RopeConfig {
  double theta = 10000.0;
  int64_t dim = 0;  // rotated dims of a head; the rest of the head passes unchanged
  /// Llama 3.1's change of the low frequencies; off when factor is 0. Lengths in tokens.
  double factor = 0.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_length = 8192;
  friend bool operator==(const RopeConfig&, const RopeConfig&) = default;
};

/// Cosines and sines for positions [0, positions), grown as longer sequences come. The frequencies
/// are rounded to fp32, as models were trained with; what follows is as precise as the dtype.
class RopeTable {
 public:
  /// An odd or missing number of dims, or scaling that makes no sense, is an Error.
  explicit RopeTable(const RopeConfig& config);
  /// Makes rows for positions [0, positions) exist. Not thread-safe.
  void ensure(int64_t positions);
  const RopeConfig& config() const { return config_; }
  int64_t positions() const { return cos64_.view.defined() ? cos64_.view.dim(0) : 0; }
  /// (positions, dim / 2)
  const Tensor& cos(Dtype dtype) const { return dtype == Dtype::kF64 ? cos64_.view : cos32_.view; }
  const Tensor& sin(Dtype dtype) const { return dtype == Dtype::kF64 ? sin64_.view : sin32_.view; }

 private:
  RopeConfig config_;
  OwnedTensor cos32_, sin32_, cos64_, sin64_;
};

/// Rotates x (T, H, D), heads contiguous, by the tokens' absolute positions -> (T, H, D). `table`
/// covers them and outlives the tape.
Tensor rope(Context& ctx, const Tensor& x, const Segments& segments, const RopeTable& table);

}  // namespace cambium
