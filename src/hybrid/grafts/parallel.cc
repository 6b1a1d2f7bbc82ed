// The attention with a window, all its parameters kept, beside a recurrence that starts from it as
// that mixer's own graft does.
#include <algorithm>

#include "base/text.h"
#include "hybrid/grafts/graft_table.h"
#include "nn/units/units.h"

namespace cambium {
namespace {

UnitSpec spec(const UnitSpec& attention, const AttentionShape& h, const GraftOptions& options) {
  const std::vector<std::string> known = {"gated_delta_net", "kimi_delta", "mamba2", "lightning"};
  const std::string mixer = options.recurrent.empty() ? known[0] : options.recurrent;
  expect(std::find(known.begin(), known.end(), mixer) != known.end(),
         "parallel: expected recurrent to be one of {}, got '{}'{}", join(known, ", "), mixer,
         did_you_mean(mixer, known));
  UnitSpec unit = attention;
  unit.kind = "parallel";
  unit.options.set("window", window_of(attention, options));
  if (options.sinks > 0) {
    unit.options.set("sinks", options.sinks);
  }
  if (options.sink_logits) {
    unit.options.set("sink_logits", true);
  }
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

/// The rows of q_proj: of each head its query's, then its gate's.
std::vector<float> with_gates(const std::vector<float>& queries, const std::vector<float>& gates,
                              int64_t heads) {
  if (gates.empty()) {
    return queries;
  }
  std::vector<float> rows;
  const auto head = static_cast<int64_t>(queries.size()) / heads;
  for (int64_t h = 0; h < heads; ++h) {
    for (const std::vector<float>* from : {&queries, &gates}) {
      rows.insert(rows.end(), from->begin() + h * head, from->begin() + (h + 1) * head);
    }
  }
  return rows;
}

// The gate starts half open, whatever the token.
void start(const NewMixer& mixer, const AttentionWeights& a, const GraftOptions& options) {
  const auto keep = [&](const char* name, const std::vector<float>& values) {
    if (!values.empty()) {
      std::copy(values.begin(), values.end(), mixer.values(name));
    }
  };
  keep("q_proj.weight", with_gates(a.q, a.gate, a.shape.heads));
  keep("k_proj.weight", a.k);
  keep("v_proj.weight", a.v);
  keep("o_proj.weight", a.o);
  keep("q_proj.bias", with_gates(a.q_bias, a.gate_bias, a.shape.heads));
  keep("k_proj.bias", a.k_bias);
  keep("v_proj.bias", a.v_bias);
  keep("o_proj.bias", a.o_bias);
  keep("q_norm.weight", a.q_norm);
  keep("k_norm.weight", a.k_norm);
  keep("sinks", a.sinks);
  Parameter& gate = mixer.at("gate_proj.weight");
  std::fill_n(gate.tensor.ptr<float>(), gate.numel(), 0.0F);

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
  return {.mixer = "parallel",
          .options = {"window", "sinks", "sink_logits", "recurrent", "window_dropout"},
          .released_as = "",
          .spec = spec,
          .start = start,
          .keeps_qk_norms = true};
}

}  // namespace cambium
