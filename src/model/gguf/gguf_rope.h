// Rotations as GGUF says them: keys, and tensors of divisors of the frequencies.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "model/gguf/gguf_architecture.h"

namespace cambium {

/// Parameters of the llama3 stretch of rotary frequencies: those with a wavelength above
/// original_length / low_freq_factor are divided by `factor`, those below original_length /
/// high_freq_factor stay, between them the divisor changes smoothly.
struct Llama3Rope {
  double factor = 8;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_length = 8192;
};

/// What `parameters` divide frequency i of `count` by, with base `theta`.
double llama3_divisor(const Llama3Rope& parameters, double theta, int64_t i, int64_t count);

/// The parameters that give `divisors` (one for each frequency), or nothing when they are all 1.
/// Only the ratios of original_length and the two factors are in the divisors; they are reported
/// for an original_length of 8192, Llama 3's. Error when llama3 scaling cannot give them.
std::optional<Llama3Rope> recover_llama3_rope(std::span<const float> divisors, double theta);

/// Puts what the file says of rotations into config.json: rope_theta, rope_scaling, and the
/// channels that turn by the row's word. `config` has head_dim (or qk_rope_head_dim) already.
void read_gguf_rope(GgufArchitectureKeys& keys, const GgufRope& rope, GgufJson& config);
/// The reverse. Whether the file says all of it is for who reads it back.
void write_gguf_rope(const ModelSpec& spec, const GgufRope& row, GgufHead& head);
/// Whether both turn alike: parameters differ where only their ratios count, and by fp32's
/// rounding.
bool same_rotation(const RopeConfig& a, const RopeConfig& b);

}  // namespace cambium
