// Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692): the delta rule in which every key
// channel decays by itself. The decay of a token and its output gate come through `gate_rank`
// channels, or from x directly where that is 0:
//
//   g = -exp(A_log[head]) softplus(decay(x) + dt_bias), or
//   g = lower_bound sigmoid(exp(A_log[head]) (decay(x) + dt_bias))      beta = sigmoid(beta_proj x)
//   y = out_proj(rms_norm(recurrence(q, k, v, g, beta)) * sigmoid(gate(x)))    or silu, by out_gate
#include <cmath>

#include "base/checked.h"
#include "nn/norm.h"
#include "nn/units/delta_heads.h"
#include "nn/units/head_mixer.h"
#include "nn/units/units.h"
#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"
#include "ops/recurrence/recurrence.h"

namespace cambium {
namespace {

constexpr const char* kName = "kimi_delta";

/// y = b (a x), or one matrix for rank 0.
struct LowRank {
  LowRank() = default;
  LowRank(int64_t in, int64_t rank, int64_t out)
      : first(in, rank > 0 ? rank : out, ParameterGroup::kMixer) {
    if (rank > 0) {
      second = Linear(rank, out, ParameterGroup::kMixer);
    }
  }
  bool one_matrix() const { return second.weight.shape.empty(); }
  /// What `first` gave -> y.
  Tensor rest(Context& ctx, const Tensor& y) const {
    return one_matrix() ? y : second.forward(ctx, y);
  }
  /// Visits name + "_a_proj" and name + "_b_proj", or name + "_proj".
  void visit(const std::string& name, const ParameterVisitor& visitor) {
    first.visit(name + (one_matrix() ? "_proj" : "_a_proj"), visitor);
    if (!one_matrix()) {
      second.visit(name + "_b_proj", visitor);
    }
  }

  Linear first, second;
};

class KimiDeltaUnit : public HeadMixer {
 public:
  KimiDeltaUnit(const Options& options, int64_t width)
      : KimiDeltaUnit(
            options, width, options.size(kName, "head_dim", kMaxHeadDim),
            options.size_or(kName, "value_dim", options.size(kName, "head_dim", kMaxHeadDim),
                            kMaxHeadDim, 1)) {}

  Tensor heads(Context& ctx, const Tensor& /*x*/, std::span<const Tensor> read,
               const UnitInputs& inputs) override {
    const Tensor& rows = read[0];
    const Tensor& write = read[1];
    const Tensor raw_decay = decay_.rest(ctx, read[2]);
    const Tensor gate = gate_.rest(ctx, read[3]);
    const GatedNormConfig norm{norm_eps_, heads_.value_dim(), GateOrder::kNormFirst, out_gate_};
    RecurrentStepInputs token = heads_.step_inputs(rows, inputs);
    token.decay = raw_decay;
    token.weight = write;
    token.a_log = a_log_.tensor;
    token.dt_bias = dt_bias_.tensor;
    token.bound = lower_bound_;
    token.z = gate;
    token.norm = norm_.tensor;
    token.norm_config = norm;
    if (recurrent_step_serves(ctx, token, inputs.segments())) {
      return recurrent_step(ctx, token, inputs.segments(), inputs.slot(kConv), inputs.slot(kState));
    }
    const auto [q, k, v] = heads_.forward(ctx, rows, inputs, inputs.slot(kConv));
    const Tensor decay = decay_of(ctx, raw_decay);
    const Tensor y = recurrence(ctx,
                                {.q = q,
                                 .k = k,
                                 .v = v,
                                 .log_decay = decay.split_last(heads_.heads(), heads_.key_dim()),
                                 .weight = heads_.write_strength(ctx, write),
                                 .delta = true},
                                inputs.segments(), inputs.slot(kState));
    return gated_rms_norm(ctx, y.merge_last(), gate, norm_.tensor, norm);
  }

  int64_t head_count() const override { return heads_.heads(); }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {heads_.conv_part(), heads_.state_part()};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    in_.visit("in_proj", visitor);
    heads_.visit(visitor);
    decay_.visit("decay", visitor);
    visitor("A_log", a_log_);
    visitor("dt_bias", dt_bias_);
    beta_.visit("beta_proj", visitor);
    gate_.visit("gate", visitor);
    visitor("norm.weight", norm_);
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kConv, kState };

  int64_t key_channels() const { return heads_.heads() * heads_.key_dim(); }

  /// raw (T, channels of keys) -> log decay, the same. A channel's rate is that of its head.
  Tensor decay_of(Context& ctx, const Tensor& raw) const {
    const Tensor rate =
        repeat_heads(ctx, a_log_.tensor.reshape({1, heads_.heads(), 1}), heads_.key_dim())
            .reshape({key_channels()});
    if (lower_bound_ < 0.0F) {
      return bounded_decay(ctx, raw, dt_bias_.tensor, rate, lower_bound_);
    }
    return log_decay(ctx, step_size(ctx, raw, dt_bias_.tensor, 0.0F, INFINITY), rate);
  }

  KimiDeltaUnit(const Options& options, int64_t width, int64_t dim, int64_t value_dim)
      : heads_(options, kName, dim, value_dim),
        norm_eps_(static_cast<float>(options.real(kName, "norm_eps", 1e-5))),
        in_(width, heads_.blocks(), ParameterGroup::kMixer),
        beta_(width, heads_.heads(), ParameterGroup::kMixer) {
    out_ = Linear(heads_.inner(), width, ParameterGroup::kMixer,
                  options.flag(kName, "out_bias", false));
    options.expect_only(kName, DeltaHeads::known({"head_dim", "value_dim", "gate_rank", "norm_eps",
                                                  "out_bias", "decay", "lower_bound", "out_gate"}));
    const std::string gate = options.text(kName, "out_gate", "sigmoid");
    expect(gate == "silu" || gate == "sigmoid",
           "kimi_delta: expected out_gate silu or sigmoid, got '{}'", gate);
    out_gate_ = gate == "silu" ? GateActivation::kSilu : GateActivation::kSigmoid;
    const std::string decay = options.text(kName, "decay", "softplus");
    expect(decay == "softplus" || decay == "sigmoid",
           "kimi_delta: expected decay softplus or sigmoid, got '{}'", decay);
    if (decay == "sigmoid") {
      lower_bound_ = static_cast<float>(
          in_range(kName, "lower_bound", options.real(kName, "lower_bound", -5.0), -1e6, -1e-6));
    }
    const int64_t rank = options.size_or(kName, "gate_rank", dim, kMaxWidth);
    decay_ = LowRank(width, rank, key_channels());
    gate_ = LowRank(width, rank, heads_.inner());
    reads_ = {&in_, &beta_, &decay_.first, &gate_.first};
    a_log_ = {.shape = {heads_.heads()},
              .group = ParameterGroup::kNorm,
              .init = {InitKind::kLogUniform},
              .keep_fp32 = true};
    dt_bias_ = {.shape = {key_channels()},
                .group = ParameterGroup::kNorm,
                .init = {InitKind::kStepBias},
                .keep_fp32 = true};
    norm_ = norm_weight(value_dim);
  }

  DeltaHeads heads_;
  float norm_eps_;
  GateActivation out_gate_ = GateActivation::kSigmoid;
  float lower_bound_ = 0.0F;  // of the log decay; 0 = none, it is that of a softplus
  Linear in_, beta_;
  LowRank decay_, gate_;
  Parameter a_log_, dt_bias_, norm_;
};

}  // namespace

std::unique_ptr<Unit> make_kimi_delta(const Options& options, int64_t width) {
  return std::make_unique<KimiDeltaUnit>(options, width);
}

}  // namespace cambium
