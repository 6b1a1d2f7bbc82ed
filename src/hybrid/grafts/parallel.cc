// The attention with a window, all its parameters kept, beside a recurrence that starts from it as
// that mixer's own graft does.
#include <algorithm>
#include <cmath>

#include "base/text.h"
#include "hybrid/grafts/graft_table.h"
#include "nn/units/units.h"

namespace cambium {
namespace {

UnitSpec spec(const UnitSpec& attention, const AttentionSizes& h, const GraftOptions& options) {
  const std::vector<std::string> known = {"gated_delta_net", "kimi_delta", "mamba2", "lightning"};
  const std::string mixer = options.recurrent.empty() ? known[0] : options.recurrent;
  expect(std::find(known.begin(), known.end(), mixer) != known.end(),
         "parallel: expected recurrent to be one of {}, got '{}'{}", join(known, ", "), mixer,
         did_you_mean(mixer, known));
  UnitSpec unit = windowed(attention, "parallel", options);
  unit.options.set("window_dropout", options.window_dropout);
  unit.options.set("recurrent", mixer);
  const UnitSpec recurrent = find_graft(mixer).spec(attention, h, {.mixer = mixer});
  for (const auto& [key, value] : recurrent.options.values()) {
    if (key != "out_bias") {  // of the projection that both share
      unit.options.set("recurrent." + key, value);
    }
  }
  return unit;
}

// The gate starts as far open as window_share says, whatever the token.
void start(const NewMixer& mixer, const AttentionWeights& a, const GraftOptions& options) {
  const std::string gate = parallel_gate(mixer.spec().options);
  Parameter& weight = mixer.at(gate + ".weight");
  std::fill_n(weight.tensor.ptr<float>(), weight.numel(), 0.0F);
  Parameter& bias = mixer.at(gate + ".bias");
  const double share = options.window_share;
  std::fill_n(bias.tensor.ptr<float>(), bias.numel(),
              static_cast<float>(std::log(share / (1.0 - share))));

  const UnitSpec recurrent = recurrent_part(mixer.spec().options);
  const std::string prefix = "recurrent.";
  MixerParameters parameters;
  for (const auto& [name, parameter] : mixer.parameters()) {
    if (name.starts_with(prefix)) {
      parameters[name.substr(prefix.size())] = parameter;
    }
  }
  const Graft& graft = find_graft(recurrent.kind);
  AttentionWeights from = a;
  if (!graft.keeps_qk_norms) {
    put_norms_on_rows(from, mixer.spec().options);
  }
  graft.start(NewMixer(recurrent, std::move(parameters)), from, options);
}

}  // namespace

Graft parallel_graft() {
  return {
      .mixer = "parallel",
      .options = {"window", "sinks", "sink_logits", "recurrent", "window_dropout", "window_share"},
      .released_as = "",
      .spec = spec,
      .start = start,
      .keeps_parameters = true,
      .keeps_qk_norms = true};
}

}  // namespace cambium
