// What the attention of a trained layer does with its texts, in numbers that the start of another
// mixer can be made from: how far its heads look back, how sharply they choose, and how large what
// they project is. Taylor-Calibrate measures the first two so (look-back distance and entropy of
// the rows); softmax rows are exact, of some queries of each text.
#pragma once

#include <vector>

#include "ops/attention/attention.h"

namespace cambium {

struct HeadStatistics {
  double look_back = 0.0;      // mean over the rows of sum_s p_s (t - s), tokens
  double half_distance = 0.0;  // half of the attention of all rows is at most so many tokens back
  /// Mean over the rows of 1 - entropy / log(tokens in reach): 0 = even, 1 = one token alone.
  double concentration = 0.0;
};

/// Sums over texts of one layer's rows.
class AttentionRows {
 public:
  explicit AttentionRows(int64_t heads) : heads_(static_cast<size_t>(heads)) {}

  /// Adds up to `rows` queries of each segment, spaced evenly and the last among them; those that
  /// see one token only say nothing and are left out, and so are sinks' scores: what is measured is
  /// how what is attended to lies. Keys come already rotated; query head h
  /// reads key head h / (H / Hkv).   q (T, H, D), k (T, Hkv, D), F32 on the CPU, contiguous.
  void add(const Tensor& q, const Tensor& k, const Segments& segments,
           const AttentionConfig& config, int64_t rows);
  /// Rows that were added, of each head.
  int64_t count() const { return count_; }
  std::vector<HeadStatistics> heads() const;

 private:
  struct Sums {
    double look_back = 0.0;
    double concentration = 0.0;
    std::vector<double> mass;  // by distance
  };
  std::vector<Sums> heads_;
  int64_t count_ = 0;
};

}  // namespace cambium
