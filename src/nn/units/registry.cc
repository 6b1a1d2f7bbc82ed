#include "base/text.h"
#include "nn/units/units.h"

namespace cambium {

const std::vector<UnitKind>& unit_kinds() {
  constexpr UnitRole kMixer = UnitRole::kMixer;
  constexpr UnitRole kFeedForward = UnitRole::kFeedForward;
  static const std::vector<UnitKind> kinds = {
      {"attention", kMixer, 'A', "full causal attention, grouped key-value heads", make_attention},
      {"sliding_window", kMixer, 'W',
       "attention to the last `window` tokens and `sinks` first ones", make_sliding_window},
      {"mamba", kMixer, 'M', "Mamba-1 scan with grouped x and B, as in Apriel-H1", make_mamba},
      {"mamba1", kMixer, '1', "Mamba-1 scan, its step, B and C from what is convolved",
       make_mamba1},
      {"mamba2", kMixer, '2', "Mamba-2 (SSD): matrix state, scalar decay per head", make_mamba2},
      {"gated_delta_net", kMixer, 'G', "Gated DeltaNet: delta rule with scalar decay",
       make_gated_delta_net},
      {"latent_attention", kMixer, 'L', "attention on a latent of keys and values (MLA, DSA)",
       make_latent_attention},
      {"lightning", kMixer, 'N', "lightning attention: linear, fixed decay per head",
       make_lightning},
      {"kimi_delta", kMixer, 'K', "Kimi Delta Attention: delta rule with decay per channel",
       make_kimi_delta},
      {"short_conv", kMixer, 'C', "gated convolution over a few tokens, as in LFM2",
       make_short_conv},
      {"parallel", kMixer, 'P', "a window beside a recurrence, mixed by a gate per head",
       make_parallel},
      {"swiglu", kFeedForward, 'F', "down(f(gate x) * up x), f = silu unless said", make_swiglu},
      {"feed_forward", kFeedForward, 'f', "down(activation(up x))", make_feed_forward},
      {"experts", kFeedForward, 'E', "mixture of experts", make_experts},
  };
  return kinds;
}

const UnitKind& find_unit_kind(const std::string& name) {
  std::vector<std::string> names;
  for (const UnitKind& kind : unit_kinds()) {
    if (name == kind.name) {
      return kind;
    }
    names.emplace_back(kind.name);
  }
  fail("unknown unit '{}'{}; known units: {}", name, did_you_mean(name, names), join(names, ", "));
}

GateActivation out_gate(const Options& options, const char* owner) {
  const std::string name = options.text(owner, "out_gate", "silu");
  expect(name == "silu" || name == "sigmoid",
         "{}: expected out_gate to be silu or sigmoid, got '{}'", owner, name);
  return name == "silu" ? GateActivation::kSilu : GateActivation::kSigmoid;
}

bool is_attention(const UnitSpec& unit) {
  return unit.kind == "attention" || unit.kind == "latent_attention";
}

std::unique_ptr<Unit> make_unit(const UnitSpec& spec, int64_t width) {
  return find_unit_kind(spec.kind).make(spec.options, width);
}

std::string unit_name(const UnitSpec& spec) {
  if (!spec.name.empty()) {
    return spec.name;
  }
  return find_unit_kind(spec.kind).role == UnitRole::kMixer ? "mixer" : "feed_forward";
}

}  // namespace cambium
