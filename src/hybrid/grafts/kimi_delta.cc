// q, k, v, o -> q, k, v, out, as for Gated DeltaNet: heads keep their width and grouping. The gate
// of an attention's output is the mixer's own, which then comes from x directly, and so does the
// decay.
#include <algorithm>
#include <cmath>

#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

constexpr double kStep = 0.1;

UnitSpec spec(const UnitSpec& attention, const AttentionSizes& h, const GraftOptions& options) {
  check_gate(attention, "kimi_delta", GatePlace::kWeight);
  UnitSpec unit{"kimi_delta",
                {{"heads", h.heads},
                 {"q_heads", h.heads},
                 {"k_heads", h.kv_heads},
                 {"v_heads", h.kv_heads},
                 {"head_dim", h.dim},
                 {"conv", int64_t{4}},
                 {"rope", options.rope && h.dim % 2 == 0 &&
                              attention.options.flag("attention", "rope", true)}}};
  if (h.value_dim != h.dim) {
    unit.options.set("value_dim", h.value_dim);
  }
  if (has_gate(attention)) {
    unit.options.set("gate_rank", int64_t{0});
  }
  ask_for_biases(unit, attention, "conv_bias");
  return unit;
}

// All channels of a head fade alike at first, whatever the token; half of what is new is written.
// An output gate that the attention has not keeps its initial rule: about a half.
void start(const NewMixer& mixer, const AttentionWeights& a, const GraftOptions& /*options*/) {
  put_output(mixer, a);
  put_delta_heads(mixer, a);
  const auto zero = [&](const char* name) {
    Parameter& p = mixer.at(name);
    std::fill_n(p.tensor.ptr<float>(), p.numel(), 0.0F);
  };
  zero("beta_proj.weight");
  zero(a.gate.empty() ? "decay_b_proj.weight" : "decay_proj.weight");
  if (!a.gate.empty()) {
    std::copy(a.gate.begin(), a.gate.end(), mixer.values("gate_proj.weight"));
  }
  // decay e^(-A softplus(dt_bias)) with softplus(dt_bias) = kStep
  const AttentionSizes& h = a.shape;
  for (int64_t i = 0; i < h.heads; ++i) {
    mixer.values("A_log")[i] = static_cast<float>(std::log(head_rate(i, h.heads) / kStep));
  }
  std::fill_n(mixer.values("dt_bias"), h.heads * h.dim, inverse_softplus(kStep));
}

// As for Gated DeltaNet; the output gate stays about half open, which out_proj makes good.
void calibrate(const NewMixer& mixer, const AttentionWeights& a, const AttentionStatistics& s) {
  shrink_delta_heads(mixer, a, s);
  float* beta = mixer.values("beta_proj.weight");
  for (const HeadStatistics& head : s.heads) {
    const float gate = write_gate(head);
    beta = std::transform(s.constant.begin(), s.constant.end(), beta,
                          [=](float x) { return gate * x; });
  }
  put_calibrated_rates(mixer, s, kStep);
}

}  // namespace

Graft kimi_delta_graft() {
  return {.mixer = "kimi_delta",
          .options = {"rope"},
          .released_as = "",
          .spec = spec,
          .start = start,
          .calibrate = calibrate};
}

}  // namespace cambium
