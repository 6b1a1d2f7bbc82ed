// A graft is a row of a table: which mixer can take the place of attention, what of GraftOptions it
// knows, how it follows from the attention, and how it starts from its weights. One file a mixer;
// registry.cc holds the table.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hybrid/attention_statistics.h"
#include "hybrid/graft.h"

namespace cambium {

using MixerParameters = std::map<std::string, Parameter*>;

/// The sizes of the attention that is replaced: K of a query or key, V of a value.
struct AttentionSizes {
  int64_t heads = 0, kv_heads = 0, dim = 0, value_dim = 0, width = 0;
  int64_t share() const { return heads / kv_heads; }  // query heads of a key-value head
};

/// What stands for the norms of latents: the mean over tokens of one over their root mean square.
struct LatentScale {
  double q = 0.0, kv = 0.0;
};

/// Its weights as dense fp32 rows of `width`. The norm of q and k per head (Qwen3) leaves its
/// weight on the rows and the biases, whose length the new mixer normalises or learns; or it stays
/// apart (Graft::keeps_qk_norms).
///
/// Latent attention has them by its expanded form: q = W_qb N(W_qa x) with the norm N(z) = g z /
/// rms(z), and k and v likewise from the latent that they share. One factor a token is all that
/// keeps the rows W_qb diag(g) W_qa from being exact, so a constant takes its place (LatentScale).
/// Where q is normed by head (gated_delta_net, kimi_delta, lightning), nothing of q is lost; of k
/// the constant weighs its rotated dims, which pass no norm, against the others; of v it is the
/// size. A head's rotated dims come first, where other mixers turn theirs; the rotated key that
/// heads share stands in each of them.
struct AttentionWeights {
  AttentionSizes shape;
  std::vector<float> q, k, v, o;                      // (H K, C), (Hkv K, C), (Hkv V, C), (C, H V)
  std::vector<float> q_bias, k_bias, v_bias, o_bias;  // empty = the projection has none
  /// (K), or (H K) and (Hkv K), as they are kept; empty = none, or on the rows.
  std::vector<float> q_norm, k_norm;
  std::vector<float> gate{}, gate_bias{};  // (H V, C), (H V): of the output; empty = none
  std::vector<float> sinks{};              // (H): scores without values; empty = none
};

/// What the attention does with the documents of a calibration.
struct AttentionStatistics {
  std::vector<HeadStatistics> heads;  // (H)
  /// (C) u: u.x is about 1 for every token's input x (constant_direction).
  std::vector<float> constant;
  /// Root mean square, a head, of what the rows of AttentionWeights with their biases give.
  std::vector<float> q_rms, k_rms, v_rms;  // (H), (Hkv), (Hkv)
};

/// Tokens after which half of a head's state is left, when it starts by what its attention did.
double half_life(const HeadStatistics& head);

/// logit(0.3 + 0.4 concentration), as Taylor-Calibrate's write gate: heads that choose sharply
/// write more.
float write_gate(const HeadStatistics& head);
/// z with SiLU(z) = 1, about.
inline constexpr float kOpenGate = 1.2785F;

AttentionSizes attention_shape(const UnitSpec& attention, int64_t width);
MixerParameters layer_parameters(Model& model, int64_t layer);

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
  /// Multiplies the block's rows, in equal parts, by one factor each.
  void scale(const std::string& name, std::string_view block,
             const std::vector<float>& factors) const;
  /// Row i of the block = values[i] times `direction`; one value serves all rows.
  void put_multiples(const std::string& name, std::string_view block,
                     const std::vector<float>& values, const std::vector<float>& direction) const;

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
  UnitSpec (*spec)(const UnitSpec& attention, const AttentionSizes& shape,
                   const GraftOptions& options);
  /// Every parameter has its initial rule already, or is the attention's (keeps_parameters).
  void (*start)(const NewMixer& mixer, const AttentionWeights& from, const GraftOptions& options);
  /// The mixer has the attention's own parameters, which are copied as they are; `start` may be
  /// null.
  bool keeps_parameters = false;
  /// Queries and keys are as wide as values: of a head's dims the last ones are taken, which are
  /// those without positions of latent attention.
  bool cuts_keys = false;
  /// The mixer has norms of q and k like the attention's.
  bool keeps_qk_norms = false;
  /// Changes what `start` made by what the attention does with texts: decay, gates, sizes; null =
  /// nothing of it is calibrated. Which scale the output has is not its business: the columns of
  /// out_proj are fitted afterwards (hybrid/calibrate.h).
  void (*calibrate)(const NewMixer& mixer, const AttentionWeights& from,
                    const AttentionStatistics& statistics) = nullptr;
  /// Which channel of the attention's heads, side by side, each column of out_proj stands for; null
  /// = the same.
  std::vector<int64_t> (*output_channels)(const UnitSpec& mixer,
                                          const AttentionSizes& shape) = nullptr;
};

/// The weights of the layer's attention; norms of q and k are on the rows unless the graft keeps
/// them apart. Of latent attention `measured` is what its norms do; without it, what they would do
/// with inputs whose channels vary independently of each other, each by its weight in the norm
/// before the mixer (white_latents).
AttentionWeights read_attention(Model& teacher, int64_t layer, const Graft& graft,
                                const std::optional<LatentScale>& measured = {});

/// latent_rows.cc: the expanded rows, and the scale for them.
AttentionWeights read_latent_attention(const UnitSpec& attention, const MixerParameters& parameters,
                                       int64_t width, const LatentScale& scale);
/// `channels` (C): root mean squares of the inputs' channels.
LatentScale white_latents(const UnitSpec& attention, const MixerParameters& parameters,
                          const std::vector<float>& channels);
/// Sums over inputs x (T, C), F32 on the CPU as the parameters.
class LatentScales {
 public:
  LatentScales(const UnitSpec& attention, const MixerParameters& parameters);
  void add(Context& ctx, const Tensor& x);
  LatentScale mean() const;

 private:
  double sum_of(Context& ctx, const Tensor& x, const char* projection, int64_t rank) const;

  const UnitSpec& attention_;
  const MixerParameters& parameters_;
  LatentScale sums_;
  double tokens_ = 0.0;
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

/// The window that is asked for, or 128; never wider than the attention's own.
int64_t window_of(const UnitSpec& attention, const GraftOptions& options);
/// The attention with that window and its sinks, as the unit `kind`; the index of latent attention
/// goes. Error where it has no place for sinks' scores that are asked for.
UnitSpec windowed(const UnitSpec& attention, const char* kind, const GraftOptions& options);
/// Whether the attention has a gate of its output.
bool has_gate(const UnitSpec& attention);
/// Whether a mixer has a place for the gate of an attention's output: none, for a gate without a
/// bias, for any.
enum class GatePlace : uint8_t { kNone, kWeight, kWeightAndBias };
/// Error for attention whose output has a gate that `mixer` has no place for.
void check_gate(const UnitSpec& attention, const char* mixer, GatePlace place);
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
/// Of a calibrated start: queries, keys and values small, so that the SiLU after the convolution
/// halves them and does little else. Their lengths do not matter there: q and k are normalised, and
/// so is what a head gives.
void shrink_delta_heads(const NewMixer& mixer, const AttentionWeights& from,
                        const AttentionStatistics& statistics);
/// A convolution that starts by passing the current token alone, times `last_tap`.
void pass_through(Parameter& conv, float last_tap);
float inverse_softplus(double y);
/// Heads remember over time scales spread evenly in logarithm from a few tokens to hundreds: with
/// rate 1 / scale a state fades by e over `scale` tokens.
double head_rate(int64_t head, int64_t heads);
/// log of the A with which a head whose steps are `step` forgets by its half_life.
std::vector<float> calibrated_log_rates(const AttentionStatistics& statistics, double step);
/// Puts them where the mixer has one A a head.
void put_calibrated_rates(const NewMixer& mixer, const AttentionStatistics& statistics,
                          double step);
/// Brings the heads of in_proj's block, which give numbers of the sizes `rms`, to the size `to`; so
/// its rows of `bias`, where the attention has biases.
void resize_heads(const NewMixer& mixer, const AttentionWeights& from, const std::string& bias,
                  std::string_view block, const std::vector<float>& rms, double to);

}  // namespace cambium
