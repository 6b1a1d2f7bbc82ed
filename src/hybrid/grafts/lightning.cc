// q, k, v, o -> q, k, v, out, as HypeNet does (arXiv 2601.22156): the norms and the rotation of q
// and k stay, key-value heads are shared as before, and heads forget at fixed rates. No convolution
// and no SiLU stand between.
#include <algorithm>

#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

UnitSpec spec(const UnitSpec& attention, const AttentionSizes& h, const GraftOptions& options) {
  check_gate(attention, "lightning", GatePlace::kWeight);
  const Options& o = attention.options;
  const double eps = o.real("attention", "qk_norm_eps", 0.0);
  UnitSpec unit{"lightning",
                {{"heads", h.heads},
                 {"kv_heads", h.kv_heads},
                 {"head_dim", h.dim},
                 {"silu", false},
                 {"rope", options.rope && h.dim % 2 == 0 && o.flag("attention", "rope", true)},
                 {"norm_group", h.value_dim},
                 // Without softmax nothing bounds the scores: attention without norms gets some.
                 {"qk_norm_eps", eps > 0.0 ? eps : 1e-6}}};
  if (h.value_dim != h.dim) {
    unit.options.set("value_dim", h.value_dim);
  }
  if (eps > 0.0 && o.has("qk_norm")) {
    unit.options.set("qk_norm", o.text("attention", "qk_norm"));
  }
  ask_for_biases(unit, attention, "qkv_bias");
  return unit;
}

void start(const NewMixer& mixer, const AttentionWeights& from, const GraftOptions& /*options*/) {
  AttentionWeights a = from;
  if (std::ssize(a.q_norm) > a.shape.dim) {  // of all heads together, and its norms are a head's
    put_norms_on_rows(a, mixer.spec().options);
  }
  put_output(mixer, a);
  mixer.put("qkv_proj.weight", "q", a.q);
  mixer.put("qkv_proj.weight", "k", a.k);
  mixer.put("qkv_proj.weight", "v", a.v);
  if (!a.q_bias.empty()) {
    mixer.put("qkv_proj.bias", "q", a.q_bias);
    mixer.put("qkv_proj.bias", "k", a.k_bias);
    mixer.put("qkv_proj.bias", "v", a.v_bias);
  }
  if (!a.gate.empty()) {
    std::copy(a.gate.begin(), a.gate.end(), mixer.values("gate_proj.weight"));
  }
  std::copy(a.q_norm.begin(), a.q_norm.end(), mixer.values("q_norm.weight"));
  std::copy(a.k_norm.begin(), a.k_norm.end(), mixer.values("k_norm.weight"));
}

// Its rates are fixed and nothing bends q, k and v: out_proj alone is fitted.
void calibrate(const NewMixer& /*mixer*/, const AttentionWeights& /*from*/,
               const AttentionStatistics& /*statistics*/) {}

}  // namespace

Graft lightning_graft() {
  return {.mixer = "lightning",
          .options = {"rope"},
          .released_as = "",
          .spec = spec,
          .start = start,
          .keeps_qk_norms = true,
          .calibrate = calibrate};
}

}  // namespace cambium
