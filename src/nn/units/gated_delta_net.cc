// Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a learned decay per
// head. Where how much is written may pass 1 (Grazzi et al. 2024, arXiv 2411.12537), a state can
// turn its sign.
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

constexpr const char* kName = "gated_delta_net";

class GatedDeltaNetUnit : public HeadMixer {
 public:
  GatedDeltaNetUnit(const Options& options, int64_t width)
      : heads_(options, kName, options.size(kName, "key_dim", kMaxHeadDim),
               options.size(kName, "value_dim", kMaxHeadDim)),
        norm_eps_(static_cast<float>(options.real(kName, "norm_eps", 1e-6))),
        gate_(out_gate(options, kName)) {
    options.expect_only(
        kName, DeltaHeads::known({"key_dim", "value_dim", "norm_eps", "out_bias", "out_gate"}));
    const int64_t heads = heads_.heads();
    std::vector<RowBlock> rows = heads_.blocks();
    rows.push_back({"z", heads_.inner()});
    in_ = Linear(width, rows, ParameterGroup::kMixer);
    ba_ = Linear(width, {{"beta", heads}, {"decay", heads}}, ParameterGroup::kMixer);
    reads_ = {&in_, &ba_};
    out_ = Linear(heads_.inner(), width, ParameterGroup::kMixer,
                  options.flag(kName, "out_bias", false));
    a_log_ = {.shape = {heads},
              .group = ParameterGroup::kNorm,
              .init = {InitKind::kLogUniform},
              .keep_fp32 = true};
    dt_bias_ = {.shape = {heads},
                .group = ParameterGroup::kNorm,
                .init = {InitKind::kStepBias},
                .keep_fp32 = true};
    norm_ = norm_weight(heads_.value_dim());
  }

  Tensor heads(Context& ctx, const Tensor& /*x*/, std::span<const Tensor> read,
               const UnitInputs& inputs) override {
    const Tensor& rows = read[0];
    const Tensor& ba = read[1];
    const Tensor z = part(rows, in_.weight, "z");
    const Tensor qkv = part(rows, in_.weight, "q", "v");
    const Tensor raw_beta = part(ba, ba_.weight, "beta");
    const Tensor raw_step = part(ba, ba_.weight, "decay");
    const GatedNormConfig norm{norm_eps_, heads_.value_dim(), GateOrder::kNormFirst, gate_};
    RecurrentStepInputs token = heads_.step_inputs(qkv, inputs);
    token.decay = raw_step;
    token.weight = raw_beta;
    token.a_log = a_log_.tensor;
    token.dt_bias = dt_bias_.tensor;
    token.z = z;
    token.norm = norm_.tensor;
    token.norm_config = norm;
    if (recurrent_step_serves(ctx, token, inputs.segments())) {
      return recurrent_step(ctx, token, inputs.segments(), inputs.slot(kConv), inputs.slot(kState));
    }
    const auto [q, k, v] = heads_.forward(ctx, qkv, inputs, inputs.slot(kConv));
    const Tensor beta = heads_.write_strength(ctx, raw_beta);
    const Tensor step = step_size(ctx, raw_step, dt_bias_.tensor, 0.0F, INFINITY);
    const Tensor decay = log_decay(ctx, step, a_log_.tensor);
    const Tensor y =
        recurrence(ctx, {q, k, v, decay, beta, true, {}}, inputs.segments(), inputs.slot(kState));
    return gated_rms_norm(ctx, y.merge_last(), z, norm_.tensor, norm);
  }

  int64_t head_count() const override { return heads_.heads(); }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {heads_.conv_part(), heads_.state_part()};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    in_.visit("in_proj", visitor);
    ba_.visit("ba_proj", visitor);
    heads_.visit(visitor);
    visitor("A_log", a_log_);
    visitor("dt_bias", dt_bias_);
    visitor("norm.weight", norm_);
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kConv, kState };

  DeltaHeads heads_;
  float norm_eps_;
  GateActivation gate_;
  Linear in_, ba_;
  Parameter a_log_, dt_bias_, norm_;
};

}  // namespace

std::unique_ptr<Unit> make_gated_delta_net(const Options& options, int64_t width) {
  return std::make_unique<GatedDeltaNetUnit>(options, width);
}

}  // namespace cambium
