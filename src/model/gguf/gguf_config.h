// The sizes of a GGUF file of a llama-like architecture (llama, qwen2, qwen3, mistral3) and the
// config.json that says the same.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "files/gguf.h"

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

struct GgufLlamaConfig {
  std::string architecture;         ///< of the file: the prefix of its keys
  std::string model_type;           ///< of config.json
  bool neighbouring_pairs = false;  ///< rotary pairs are stored at 2i and 2i + 1
  bool qkv_bias = false, output_bias = false, mlp_bias = false;
  bool qk_norm = false;
  int64_t layers = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocabulary = 0;
  int64_t context = 0;
  double rms_eps = 1e-5;
  double rope_theta = 10000;
  /// rope_scaling of config.json, as JSON; empty = none
  std::string rope_scaling;
  int64_t sliding_window = 0;  ///< 0 = none
  bool tied = false;           ///< no output.weight: the embedding is the head
  std::optional<int64_t> bos;
  std::optional<int64_t> eos;
};

/// Whether the architecture holds rotary pairs as neighbours.
bool neighbouring_pairs(const std::string& architecture);

/// Error naming file and key when something is missing, inconsistent or not supported.
GgufLlamaConfig read_llama_config(const Gguf& gguf);

/// The text of config.json. `dtype`: "bfloat16" or "float32".
std::string llama_config_json(const GgufLlamaConfig& config, const std::string& dtype);

}  // namespace cambium
