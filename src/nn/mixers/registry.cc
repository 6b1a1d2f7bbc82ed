#include "base/text.h"
#include "nn/mixers/mixers.h"

namespace cambium {

const std::vector<MixerKind>& mixer_kinds() {
  static const std::vector<MixerKind> kinds = {
      {"attention", 'A', "full causal attention, grouped key-value heads", make_attention},
      {"sliding_window", 'W', "attention to the last `window` tokens", make_sliding_window},
      {"mamba", 'M', "Mamba-1 scan with grouped x and B, as in Apriel-H1", make_mamba},
      {"mamba2", '2', "Mamba-2 (SSD): matrix state, scalar decay per head", make_mamba2},
      {"gated_delta_net", 'G', "Gated DeltaNet: delta rule with scalar decay",
       make_gated_delta_net},
      {"identity", '-', "no mixer: adds nothing to the residual", make_identity},
  };
  return kinds;
}

const MixerKind& find_mixer_kind(const std::string& name) {
  std::vector<std::string> names;
  for (const MixerKind& kind : mixer_kinds()) {
    if (name == kind.name) {
      return kind;
    }
    names.emplace_back(kind.name);
  }
  fail("unknown mixer '{}'{}; known mixers: {}", name, did_you_mean(name, names),
       join(names, ", "));
}

std::unique_ptr<Mixer> make_mixer(const MixerSpec& spec, int64_t width) {
  return find_mixer_kind(spec.kind).make(spec.options, width);
}

}  // namespace cambium
