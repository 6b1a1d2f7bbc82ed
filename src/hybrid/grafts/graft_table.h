// A graft is a row of a table: which mixer can take the place of attention, what of GraftOptions it
// knows, how it follows from the attention, and how it starts from its weights. One file a mixer;
// registry.cc holds the table.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hybrid/graft.h"

namespace cambium {

/// The sizes of the attention that is replaced.
struct AttentionShape {
  int64_t heads = 0, kv_heads = 0, dim = 0, width = 0;
  int64_t share() const { return heads / kv_heads; }  // query heads of a key-value head
};

/// Its weights as dense fp32 rows of `width`. The norm of q and k per head (Qwen3) leaves its
/// weight on the rows and the biases, whose length the new mixer normalises or learns; or it stays
/// apart (Graft::keeps_qk_norms).
struct AttentionWeights {
  AttentionShape shape;
  std::vector<float> q, k, v, o;                      // (H D, C), (Hkv D, C), (Hkv D, C), (C, H D)
  std::vector<float> q_bias, k_bias, v_bias, o_bias;  // empty = the projection has none
  std::vector<float> q_norm, k_norm;  // (D) as they are kept; empty = none, or on the rows
};

using MixerParameters = std::map<std::string, Parameter*>;

/// The new mixer while it is filled: parameters by name, rows by the name of their block.
class NewMixer {
 public:
  NewMixer(const UnitSpec& spec, MixerParameters parameters)
      : spec_(spec), parameters_(std::move(parameters)) {}

  const UnitSpec& spec() const { return spec_; }
  const MixerParameters& parameters() const { return parameters_; }
  Parameter& at(const std::string& name) const;
  bool has(const std::string& name) const { return parameters_.contains(name); }
  float* values(const std::string& name) const { return at(name).tensor.ptr<float>(); }
  /// Fills the block's rows with `rows`, all of them; those of a bias are single numbers.
  void put(const std::string& name, std::string_view block, const std::vector<float>& rows) const;
  /// Row `row` of the block.
  float* row(const std::string& name, std::string_view block, int64_t row) const;
  void fill(const std::string& name, std::string_view block, float value) const;

 private:
  const UnitSpec& spec_;
  MixerParameters parameters_;
};

struct Graft {
  const char* mixer;
  /// The fields of GraftOptions that change this graft; others are an error.
  std::vector<std::string> options;
  /// The family in which checkpoints of the faithful layout were released; empty = none.
  const char* released_as;
  UnitSpec (*spec)(const UnitSpec& attention, const AttentionShape& shape,
                   const GraftOptions& options);
  /// Every parameter has its initial rule already.
  void (*start)(const NewMixer& mixer, const AttentionWeights& from, const GraftOptions& options);
  /// Instead, where the mixer has the attention's own parameters: they are copied as they are.
  bool keeps_parameters = false;
  /// The mixer has norms of q and k like the attention's.
  bool keeps_qk_norms = false;
};

const std::vector<Graft>& grafts();
/// Error that suggests or lists the mixers that can take the place of attention.
const Graft& find_graft(const std::string& mixer);

/// The rows, one file each.
Graft mamba_graft();
Graft mamba2_graft();
Graft gated_delta_net_graft();
Graft kimi_delta_graft();
Graft lightning_graft();
Graft sliding_window_graft();
Graft parallel_graft();

/// Sets the option `qkv` (null = the mixer has a bias in any case) and out_bias of `mixer` where
/// the attention has such biases, and neither where it has none.
void ask_for_biases(UnitSpec& mixer, const UnitSpec& attention, const char* qkv);
/// Multiplies the rows and biases of q and k by the norms' weights, which are then none.
void put_norms_on_rows(AttentionWeights& a, const Options& attention);
/// out_proj as the attention's o, with its bias; nothing where the mixer shares another's.
void put_output(const NewMixer& mixer, const AttentionWeights& from);
/// The q, k and v rows of in_proj as the attention's, behind a convolution that passes the token on
/// and adds the biases that the projections would have added (nn/units/delta_heads.h).
void put_delta_heads(const NewMixer& mixer, const AttentionWeights& from);
/// A convolution that starts by passing the current token alone, times `last_tap`.
void pass_through(Parameter& conv, float last_tap);
float inverse_softplus(double y);
/// Heads remember over time scales spread evenly in logarithm from a few tokens to hundreds: with
/// rate 1 / scale a state fades by e over `scale` tokens.
double head_rate(int64_t head, int64_t heads);

}  // namespace cambium
