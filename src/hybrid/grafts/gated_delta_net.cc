// The "DIL" of Apriel-H1's successors: q, k, v, o -> q, k, v, out.
#include <algorithm>
#include <cmath>

#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

constexpr double kStep = 0.1;

UnitSpec spec(const UnitSpec& attention, const AttentionSizes& h, const GraftOptions& options) {
  check_gate(attention, "gated_delta_net",
             options.faithful ? GatePlace::kNone : GatePlace::kWeight);
  const int64_t q_heads = options.faithful ? h.kv_heads : h.heads;
  const int64_t v_heads = options.faithful ? h.heads : h.kv_heads;
  UnitSpec unit{"gated_delta_net",
                {{"heads", h.heads},
                 {"q_heads", q_heads},
                 {"k_heads", h.kv_heads},
                 {"v_heads", v_heads},
                 {"key_dim", h.dim},
                 {"value_dim", h.value_dim},
                 {"conv", int64_t{4}},
                 {"rope", options.rope && !options.faithful && h.dim % 2 == 0 &&
                              attention.options.flag("attention", "rope", true)}}};
  if (has_gate(attention)) {
    unit.options.set("out_gate", std::string("sigmoid"));
  }
  ask_for_biases(unit, attention, "conv_bias");
  return unit;
}

// The released converter: the first kv_heads query heads, values tiled by modulo, no output gate,
// one decay for every head.
void start_faithful(const NewMixer& mixer, const AttentionWeights& a) {
  const AttentionSizes& h = a.shape;
  constexpr float kTap = 0.5F;
  const int64_t kv = h.kv_heads * h.dim;  // rows of k
  const bool biased = !a.q_bias.empty();
  std::copy_n(a.q.begin(), kv * h.width, mixer.row("in_proj.weight", "q", 0));
  mixer.put("in_proj.weight", "k", a.k);
  for (int64_t row = 0; row < h.heads * h.value_dim; ++row) {
    const int64_t from = row / h.value_dim % h.kv_heads * h.value_dim + row % h.value_dim;
    std::copy_n(a.v.begin() + from * h.width, h.width, mixer.row("in_proj.weight", "v", row));
    if (biased) {
      *mixer.row("conv1d.bias", "v", row) = kTap * a.v_bias[static_cast<size_t>(from)];
    }
  }
  for (int64_t row = 0; biased && row < kv; ++row) {
    *mixer.row("conv1d.bias", "q", row) = kTap * a.q_bias[static_cast<size_t>(row)];
    *mixer.row("conv1d.bias", "k", row) = kTap * a.k_bias[static_cast<size_t>(row)];
  }
  mixer.fill("in_proj.weight", "z", 0.0F);
  pass_through(mixer.at("conv1d.weight"), kTap);
  for (int64_t i = 0; i < h.heads; ++i) {
    mixer.values("A_log")[i] = std::log(0.1F);
    mixer.values("dt_bias")[i] = 0.0F;
  }
}

void start(const NewMixer& mixer, const AttentionWeights& a, const GraftOptions& options) {
  put_output(mixer, a);
  mixer.fill("ba_proj.weight", "beta", 0.0F);
  mixer.fill("ba_proj.weight", "decay", 0.0F);
  if (options.faithful) {
    start_faithful(mixer, a);
    return;
  }
  put_delta_heads(mixer, a);
  if (!a.gate.empty()) {
    mixer.put("in_proj.weight", "z", a.gate);
  }
  const int64_t heads = a.shape.heads;
  for (int64_t i = 0; i < heads; ++i) {
    // decay e^(-A softplus(dt_bias)) with softplus(dt_bias) = kStep
    mixer.values("A_log")[i] = static_cast<float>(std::log(head_rate(i, heads) / kStep));
    mixer.values("dt_bias")[i] = inverse_softplus(kStep);
  }
}

// The gate of the output is the attention's own, or open, SiLU(z) = 1.
void calibrate(const NewMixer& mixer, const AttentionWeights& a, const AttentionStatistics& s) {
  shrink_delta_heads(mixer, a, s);
  if (a.gate.empty()) {
    mixer.put_multiples("in_proj.weight", "z", {kOpenGate}, s.constant);
  }
  std::vector<float> beta;
  for (const HeadStatistics& head : s.heads) {
    beta.push_back(write_gate(head));
  }
  mixer.put_multiples("ba_proj.weight", "beta", beta, s.constant);
  put_calibrated_rates(mixer, s, kStep);
}

}  // namespace

Graft gated_delta_net_graft() {
  return {.mixer = "gated_delta_net",
          .options = {"faithful", "rope"},
          .released_as = "",
          .spec = spec,
          .start = start,
          .calibrate = calibrate};
}

}  // namespace cambium
