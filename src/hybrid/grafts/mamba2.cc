// q, k, v, o -> C, B, x, out; heads keep their width and grouping. The gate of an attention's
// output becomes z, by a sigmoid and behind the norm of the heads; without one Mamba-2's own comes
// before it.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

constexpr double kStep = 0.1;
constexpr double kSmall = 0.25;

UnitSpec spec(const UnitSpec& attention, const AttentionSizes& h, const GraftOptions& /*options*/) {
  check_gate(attention, "mamba2", GatePlace::kWeight);
  UnitSpec unit{"mamba2",
                {{"heads", h.heads},
                 {"head_dim", h.value_dim},
                 {"state", h.dim},
                 {"x_heads", h.kv_heads},
                 {"b_heads", h.kv_heads},
                 {"c_heads", h.heads},
                 {"conv", int64_t{4}},
                 {"norm_group", h.value_dim}}};
  if (has_gate(attention)) {
    unit.options.set("out_gate", std::string("sigmoid"));
    unit.options.set("norm_first", true);
  }
  ask_for_biases(unit, attention, nullptr);
  return unit;
}

void start(const NewMixer& mixer, const AttentionWeights& a, const GraftOptions& /*options*/) {
  mixer.put("in_proj.weight", "x", a.v);
  mixer.put("in_proj.weight", "B", a.k);
  mixer.put("in_proj.weight", "C", a.q);
  if (!a.gate.empty()) {
    mixer.put("in_proj.weight", "z", a.gate);
  }
  put_output(mixer, a);
  pass_through(mixer.at("conv1d.weight"), 1.0F);
  if (!a.q_bias.empty()) {
    // The convolution passes the token on and adds the bias that the projection would have added.
    mixer.put("conv1d.bias", "x", a.v_bias);
    mixer.put("conv1d.bias", "B", a.k_bias);
    mixer.put("conv1d.bias", "C", a.q_bias);
  }
  // Step kStep everywhere, decay per token e^(-kStep A) = e^-rate.
  mixer.fill("in_proj.weight", "dt", 0.0F);
  const int64_t heads = a.shape.heads;
  for (int64_t i = 0; i < heads; ++i) {
    mixer.values("dt_bias")[i] = inverse_softplus(kStep);
    mixer.values("A_log")[i] = static_cast<float>(std::log(head_rate(i, heads) / kStep));
  }
}

// Values small, so that the SiLU after the convolution halves them and does little else; the norm
// of a head takes their length away, and that of B and C. A gate that the attention has not is
// open, and nothing passes the state by.
void calibrate(const NewMixer& mixer, const AttentionWeights& a, const AttentionStatistics& s) {
  for (const auto& [block, rms, size] :
       {std::tuple{"C", &s.q_rms, 1.0}, std::tuple{"B", &s.k_rms, 1.0},
        std::tuple{"x", &s.v_rms, kSmall}}) {
    resize_heads(mixer, a, "conv1d.bias", block, *rms, size);
  }
  if (a.gate.empty()) {
    mixer.put_multiples("in_proj.weight", "z", {kOpenGate}, s.constant);
  }
  put_calibrated_rates(mixer, s, kStep);
  std::fill_n(mixer.values("D"), s.heads.size(), 0.0F);
}

}  // namespace

Graft mamba2_graft() {
  return {.mixer = "mamba2",
          .options = {},
          .released_as = "",
          .spec = spec,
          .start = start,
          .calibrate = calibrate};
}

}  // namespace cambium
