// Rotary position embedding: dims i and i + D/2, or 2i and 2i + 1 where pairs are interleaved, turn
// by position * frequency[i]. Su et al. 2021, arXiv 2104.09864. The scaled kinds have the formulas
// of transformers' modeling_rope_utils; f_i = theta^(-2i/dim).
#pragma once

#include <array>
#include <span>
#include <vector>

#include "ops/segments.h"
#include "tensor/context.h"

namespace cambium {

enum class RopeScaling : uint8_t {
  kNone,
  kLinear,    // f / factor
  kDynamic,   // f of a larger theta for sequences longer than original_length, by their length
  kLlama3,    // f / factor for long waves, f for short ones, a mixture between
  kYarn,      // f / factor for few turns in original_length, f for many, a ramp between
  kLongRope,  // f_i / short_factors[i], or long_factors[i] in sequences longer than original_length
};

struct RopeConfig {
  double theta = 10000.0;
  int64_t dim = 0;  // rotated dims of a head; the rest of the head passes unchanged
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;
  int64_t original_length = 8192;  // tokens
  double low_freq_factor = 1.0;    // llama3
  double high_freq_factor = 4.0;
  double beta_fast = 32.0;  // yarn: turns in original_length
  double beta_slow = 1.0;
  bool truncate = true;           // yarn: the ramp begins and ends at whole dims
  double attention_factor = 1.0;  // yarn, longrope: of the cosines and sines
  std::vector<double> short_factors{}, long_factors{};  // longrope: (dim / 2)
  bool interleaved = false;  // pairs are (2i, 2i + 1), as in DeepSeek's models
  /// Queries are also times 1 + query_beta ln(1 + floor(position / original_length)) (Llama 4,
  /// Ministral 3).
  double query_beta = 0.0;
  friend bool operator==(const RopeConfig&, const RopeConfig&) = default;
};

/// Radians a position for each pair (dim / 2), for a sequence of `length` tokens: the same for all
/// lengths except in the kinds dynamic and longrope. Rounded to fp32, as models were trained with.
std::vector<float> rope_frequencies(const RopeConfig& config, int64_t length = 0);

/// How the tokens of one forward call turn: views that live as long as the call's arena.
struct Turns {
  const float* cos = nullptr;  // (T, dim / 2), times the attention factor
  const float* sin = nullptr;
  const int32_t* position = nullptr;        // (T)
  const float* const* frequency = nullptr;  // (T): each token's (dim / 2)
  int64_t tokens = 0;
  int64_t dim = 0;
  float amplitude = 1.0F;
  bool interleaved = false;
  const float* query_scale = nullptr;  // (T): factors of the queries, or null
  double query_beta = 0.0;
  int64_t query_length = 1;
};

/// Cosines and sines by position in fp32, from angles in double precision. Rows come in chunks that
/// are filled when a position in them is first asked for and never move.
///
/// Dynamic and longrope rotations depend on the length of the sequence. A cached key cannot be
/// turned again, so that length is fixed when the sequence starts: its prompt's in serving, its own
/// in training and scoring. (transformers takes the length so far, and with a cache mixes rotations
/// once a sequence grows over original_length.)
class RopeTable {
 public:
  /// An odd or missing number of dims, or scaling that makes no sense, is an Error.
  explicit RopeTable(const RopeConfig& config);
  /// Makes rows for positions [0, positions) exist. Not thread-safe.
  void ensure(int64_t positions);
  const RopeConfig& config() const { return config_; }
  int64_t positions() const { return positions_; }
  /// (dim / 2) each.
  const float* cos(int64_t position) const { return row(short_, position); }
  const float* sin(int64_t position) const { return row(short_, position) + config_.dim / 2; }

  /// The turns of the segments' tokens, in the arena of `ctx`. lengths[s] is the length of the
  /// sequence that segment s belongs to; without lengths a sequence ends with its segment. The
  /// table must cover the positions and outlive the turns.
  Turns turns(const Context& ctx, const Segments& segments,
              std::span<const int32_t> lengths = {}) const;

 private:
  struct Rows {
    std::vector<float> frequency;
    std::vector<std::vector<float>> chunks;  // (kChunk, {cos, sin}, dim / 2)
  };
  void fill(Rows& rows) const;
  void write_row(const float* frequency, int64_t position, float* cos, float* sin) const;
  const float* row(const Rows& rows, int64_t position) const;

  RopeConfig config_;
  int64_t positions_ = 0;
  Rows short_, long_;  // long_ of longrope only
};

/// Rotates x (T, H, D), heads contiguous, D >= turns.dim -> (T, H, D).
Tensor rope(Context& ctx, const Tensor& x, const Turns& turns);
/// The same for queries and keys of the same tokens, as one piece of work; the queries are scaled
/// by their positions where the turns say so.
std::array<Tensor, 2> rope(Context& ctx, const Tensor& q, const Tensor& k, const Turns& turns);

}  // namespace cambium
