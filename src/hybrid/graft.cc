#include "hybrid/graft.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/text.h"
#include "hybrid/calibrate.h"
#include "hybrid/grafts/graft_table.h"
#include "nn/units/units.h"
#include "tensor/copy.h"

namespace cambium {

AttentionSizes attention_shape(const UnitSpec& attention, int64_t width) {
  const Options& o = attention.options;
  const auto size = [&](const char* key) { return o.integer(attention.kind, key); };
  const int64_t heads = size("heads");
  if (attention.kind == "latent_attention") {
    return {heads, heads, size("nope_dim") + size("rope_dim"), size("value_dim"), width};
  }
  const int64_t dim = size("head_dim");
  return {heads, o.integer(attention.kind, "kv_heads", heads), dim, dim, width};
}

namespace {

std::string mixer_prefix(const ModelSpec& spec, int64_t layer) {
  return unit_prefix(layer, *spec.layers[static_cast<size_t>(layer)].mixer());
}

/// Empty where the attention has no such parameter.
std::vector<float> dense(const MixerParameters& attention, const std::string& name) {
  const auto it = attention.find(name);
  if (it == attention.end()) {
    return {};
  }
  const Parameter& p = *it->second;
  std::vector<float> out(static_cast<size_t>(p.numel()));
  copy(Tensor::of(Dtype::kF32, Device::kCpu, p.shape, out.data()), p.tensor);
  return out;
}

}  // namespace

MixerParameters layer_parameters(Model& model, int64_t layer) {
  const std::string prefix = mixer_prefix(model.spec(), layer);
  MixerParameters parameters;
  model.visit_layer(layer, [&](const std::string& name, Parameter& p) {
    if (name.starts_with(prefix)) {
      parameters[name.substr(prefix.size())] = &p;
    }
  });
  return parameters;
}

/// Takes the gates' rows out of q_proj's, where those of a head are its query's, then its gate's.
static std::vector<float> take_gates(std::vector<float>& rows, int64_t heads) {
  std::vector<float> queries;
  std::vector<float> gates;
  const auto head = static_cast<int64_t>(rows.size()) / heads / 2;
  for (auto at = rows.begin(); at != rows.end(); at += 2 * head) {
    queries.insert(queries.end(), at, at + head);
    gates.insert(gates.end(), at + head, at + 2 * head);
  }
  rows = queries;
  return gates;
}

/// Puts the temperature of heads on their queries or keys. (Of mixers that norm q, k and what their
/// heads give it is gone with the lengths of those.)
static void put_temperature(AttentionWeights& a, const Options& attention,
                            const std::vector<float>& factors) {
  const bool of_queries = attention.text("attention", "temperature", "") == "query";
  for (std::vector<float>* rows : {of_queries ? &a.q : &a.k, of_queries ? &a.q_bias : &a.k_bias}) {
    for (size_t i = 0; !factors.empty() && i < rows->size(); ++i) {
      (*rows)[i] *= factors[i * factors.size() / rows->size()];
    }
  }
}

/// Root mean squares of the channels that the layer's first norm gives.
static std::vector<float> channel_sizes(Model& model, int64_t layer) {
  std::vector<float> sizes(static_cast<size_t>(model.spec().width), 1.0F);
  const Norm* norm = model.layer(layer).first_norm();
  if (norm != nullptr && norm->spec.kind != NormKind::kNone) {
    copy(Tensor::of(sizes.data(), {model.spec().width}), norm->weight.tensor);
    const float offset = norm->spec.kind == NormKind::kZeroCentred ? 1.0F : 0.0F;
    for (float& size : sizes) {
      size += offset;
    }
  }
  return sizes;
}

/// Of each head's rows of K, the last V.
static void cut_keys(std::vector<float>& rows, const AttentionSizes& shape) {
  std::vector<float> cut;
  const int64_t head = shape.dim * shape.width;
  for (auto at = rows.begin(); at != rows.end(); at += head) {
    cut.insert(cut.end(), at + head - shape.value_dim * shape.width, at + head);
  }
  rows = std::move(cut);
}

AttentionWeights read_attention(Model& teacher, int64_t layer, const Graft& graft,
                                const std::optional<LatentScale>& measured) {
  const MixerParameters p = layer_parameters(teacher, layer);
  const UnitSpec& attention = *teacher.spec().layers[static_cast<size_t>(layer)].mixer();
  if (attention.kind == "latent_attention") {
    const LatentScale scale =
        measured ? *measured : white_latents(attention, p, channel_sizes(teacher, layer));
    AttentionWeights a = read_latent_attention(attention, p, teacher.spec().width, scale);
    if (graft.cuts_keys) {
      cut_keys(a.q, a.shape);
      cut_keys(a.k, a.shape);
      a.shape.dim = a.shape.value_dim;
    }
    return a;
  }
  AttentionWeights a{.shape = attention_shape(attention, teacher.spec().width),
                     .q = dense(p, "q_proj.weight"),
                     .k = dense(p, "k_proj.weight"),
                     .v = dense(p, "v_proj.weight"),
                     .o = dense(p, "o_proj.weight"),
                     .q_bias = dense(p, "q_proj.bias"),
                     .k_bias = dense(p, "k_proj.bias"),
                     .v_bias = dense(p, "v_proj.bias"),
                     .o_bias = dense(p, "o_proj.bias"),
                     .q_norm = dense(p, "q_norm.weight"),
                     .k_norm = dense(p, "k_norm.weight"),
                     .sinks = dense(p, "sinks")};
  if (has_gate(attention)) {
    a.gate = take_gates(a.q, a.shape.heads);
    a.gate_bias = take_gates(a.q_bias, a.shape.heads);
  }
  if (!graft.keeps_qk_norms) {
    put_norms_on_rows(a, attention.options);
  }
  put_temperature(a, attention.options, dense(p, "temperature"));
  return a;
}

namespace {

void check_layers(const ModelSpec& base, const std::vector<int64_t>& layers) {
  std::set<int64_t> seen;
  const auto count = static_cast<int64_t>(base.layers.size());
  for (const int64_t layer : layers) {
    expect(layer >= 0 && layer < count, "layer {} does not exist: the model has layers 0 to {}",
           layer, count - 1);
    expect(seen.insert(layer).second, "layer {} is given twice", layer);
    const LayerSpec& old = base.layers[static_cast<size_t>(layer)];
    expect(old.mixer() != nullptr && is_attention(*old.mixer()),
           "layer {} has no attention to replace: its mixer is {}; choose among the layers that "
           "still have attention",
           layer, old.mixer() == nullptr ? "none" : old.mixer()->kind);
  }
}

// Copies, or with `share` views, every parameter of `to` from the one of the same name in `from`,
// but those of the mixers of `grafted`.
void take_parameters(Model& to, Model& from, const std::vector<int64_t>& grafted, bool share) {
  std::map<std::string, Parameter*> source;
  from.visit([&](const std::string& name, Parameter& p) { source[name] = &p; });
  std::vector<std::string> skip;
  for (const int64_t layer : grafted) {
    skip.push_back(mixer_prefix(to.spec(), layer));
  }
  to.visit([&](const std::string& name, Parameter& p) {
    if (std::any_of(skip.begin(), skip.end(),
                    [&](const std::string& prefix) { return name.starts_with(prefix); })) {
      return;
    }
    const auto it = source.find(name);
    CAMBIUM_CHECK(it != source.end() && it->second->shape == p.shape, "{}", name);
    if (share) {
      p.tensor = it->second->tensor.detached();
    } else {
      copy(p.tensor, it->second->tensor);
    }
  });
}

/// The options that belong to some mixers only: whether one was given, and how it is taken back.
struct OwnOption {
  const char* name;
  bool (*given)(const GraftOptions& options);
  void (*unset)(GraftOptions& options);
};

template <auto kMember>
OwnOption own_option(const char* name) {
  return {name, [](const GraftOptions& o) { return o.*kMember != GraftOptions{}.*kMember; },
          [](GraftOptions& o) { o.*kMember = GraftOptions{}.*kMember; }};
}

const std::vector<OwnOption>& own_options() {
  static const std::vector<OwnOption> all = {
      own_option<&GraftOptions::window>("window"),
      own_option<&GraftOptions::sinks>("sinks"),
      own_option<&GraftOptions::sink_logits>("sink_logits"),
      own_option<&GraftOptions::state>("state"),
      own_option<&GraftOptions::recurrent>("recurrent"),
      own_option<&GraftOptions::window_dropout>("window_dropout"),
      own_option<&GraftOptions::window_share>("window_share"),
      own_option<&GraftOptions::faithful>("faithful"),
      own_option<&GraftOptions::rope>("rope")};
  return all;
}

bool knows(const Graft& graft, const char* option) {
  return std::find(graft.options.begin(), graft.options.end(), option) != graft.options.end();
}

}  // namespace

std::vector<GraftOptions> grafts_of(const GraftOptions& options, const std::string& where) {
  std::vector<std::string> mixers = {options.mixer};
  mixers.insert(mixers.end(), options.beside.begin(), options.beside.end());
  std::vector<GraftOptions> all;
  for (const std::string& mixer : mixers) {
    GraftOptions own = options;
    own.mixer = mixer;
    own.beside.clear();
    for (const OwnOption& option : own_options()) {
      const bool known = std::any_of(mixers.begin(), mixers.end(), [&](const std::string& name) {
        return knows(find_graft(name), option.name);
      });
      if (known && !knows(find_graft(mixer), option.name)) {
        option.unset(own);
      }
    }
    check_graft_options(own, where);
    expect(mixers.size() == 1 || !own.faithful,
           "{}: several mixers have Cambium's own layout; faithful is that of a released one",
           where);
    all.push_back(own);
  }
  return all;
}

void check_graft_options(const GraftOptions& options, const std::string& where) {
  const Graft& graft = find_graft(options.mixer);
  const GraftOptions unset;
  for (const OwnOption& option : own_options()) {
    if (!option.given(options) || knows(graft, option.name)) {
      continue;
    }
    std::vector<std::string> others;
    for (const Graft& other : grafts()) {
      if (knows(other, option.name)) {
        others.emplace_back(other.mixer);
      }
    }
    fail("{}: {} belongs to {}, not to {}", where, option.name, join(others, " and "),
         options.mixer);
  }
  expect(options.window_dropout >= 0.0 && options.window_dropout <= 1.0,
         "{}: expected window_dropout from 0 to 1, got {}", where, options.window_dropout);
  // At 0 or 1 one of the two would never learn.
  expect(options.window_share > 0.0 && options.window_share < 1.0,
         "{}: expected window_share between 0 and 1, got {}", where, options.window_share);
  expect(options.window >= 0 && options.sinks >= 0 && options.state >= 0,
         "{}: expected window, sinks and state of at least 0, got {}, {} and {}", where,
         options.window, options.sinks, options.state);
  expect(options.rope || !options.faithful,
         "{}: the released layout has no positions; leave rope out", where);
  expect(options.calibrate == 0 || (options.from_attention && !options.faithful),
         "{}: calibrate changes the start from attention; it does not go with {}", where,
         options.faithful ? "faithful, which is that of a released layout" : "a random start");
  expect(options.calibrate > 0 || options.calibrate_tokens == unset.calibrate_tokens,
         "{}: calibrate_tokens does nothing without calibrate", where);
}

UnitSpec graft_spec(const UnitSpec& from, int64_t width, const GraftOptions& options) {
  expect(is_attention(from), "a graft replaces attention, not {}", from.kind);
  check_graft_options(options, "graft");
  UnitSpec spec = find_graft(options.mixer).spec(from, attention_shape(from, width), options);
  // What the layer asks of its mixer, whichever it is.
  spec.out = from.out;
  spec.name = from.name;
  return spec;
}

void graft_layer(Model& student, Model& teacher, int64_t layer, const GraftOptions& options,
                 uint64_t seed) {
  const UnitSpec& spec = *student.spec().layers[static_cast<size_t>(layer)].mixer();
  const NewMixer mixer(spec, layer_parameters(student, layer));
  const std::string prefix = mixer_prefix(student.spec(), layer);
  for (const auto& [name, p] : mixer.parameters()) {
    initialise(*p, prefix + name, seed);
  }
  if (!options.from_attention) {
    return;
  }
  const Graft& graft = find_graft(spec.kind);
  if (graft.keeps_parameters) {
    const MixerParameters from = layer_parameters(teacher, layer);
    for (const auto& [name, p] : mixer.parameters()) {
      // What the attention has not (a sink's score) starts by its rule.
      if (const auto it = from.find(name); it != from.end()) {
        copy(p->tensor, it->second->tensor);
      }
    }
  }
  if (graft.start == nullptr) {
    return;
  }
  graft.start(mixer, read_attention(teacher, layer, graft), options);
}

ModelSpec convert_spec(const ModelSpec& base, const ModelSpec& teacher,
                       const std::vector<int64_t>& layers, const GraftOptions& options) {
  expect(base.layers.size() == teacher.layers.size() && base.width == teacher.width &&
             base.vocab == teacher.vocab,
         "the hybrid ({} layers, width {}, vocabulary {}) was not made from this teacher ({}, {}, "
         "{})",
         base.layers.size(), base.width, base.vocab, teacher.layers.size(), teacher.width,
         teacher.vocab);
  check_layers(base, layers);
  ModelSpec spec = base;
  for (const int64_t layer : layers) {
    const auto i = static_cast<size_t>(layer);
    *spec.layers[i].mixer() = graft_spec(*teacher.layers[i].mixer(), spec.width, options);
  }
  // The layout in which such checkpoints were released, where it can say all of this model, so that
  // its users find what they know.
  const std::string released = options.faithful ? find_graft(options.mixer).released_as : "";
  spec.family = !released.empty() && expresses(find_family(released), spec) ? released : "cambium";
  return spec;
}

LoadedModel convert(Model& base, Model& teacher, const std::vector<int64_t>& layers,
                    const GraftOptions& options, uint64_t seed, bool share,
                    const CalibrationData* calibration, std::vector<LayerCalibration>* found) {
  const ModelSpec spec = convert_spec(base.spec(), teacher.spec(), layers, options);
  LoadedModel hybrid{{}, std::make_unique<Model>(spec), {}};
  if (share) {
    take_parameters(*hybrid.model, base, layers, true);
  }
  hybrid.weights.allocate(*hybrid.model);
  if (!share) {
    take_parameters(*hybrid.model, base, layers, false);
  }
  for (const int64_t layer : layers) {
    graft_layer(*hybrid.model, teacher, layer, options, seed);
  }
  if (calibration != nullptr) {
    *found = calibrate(*hybrid.model, teacher, layers, options, *calibration);
  }
  hybrid.weights.move_to(*hybrid.model, base.device());
  hybrid.model->set_activations(base.activations());
  return hybrid;
}

LoadedModel view_windows(Model& base, const std::vector<int64_t>& layers, int64_t window,
                         int64_t sinks) {
  const GraftOptions options{.mixer = "sliding_window", .window = window, .sinks = sinks};
  const ModelSpec spec = convert_spec(base.spec(), base.spec(), layers, options);
  LoadedModel view{{}, std::make_unique<Model>(spec), {}};
  take_parameters(*view.model, base, {}, true);
  view.model->set_activations(base.activations());
  return view;
}

void take_mixer_out(LayerSpec& layer) {
  const UnitSpec* mixer = layer.mixer();
  for (BranchSpec& branch : layer.branches) {
    for (auto unit = branch.units.begin(); unit != branch.units.end(); ++unit) {
      if (&*unit != mixer) {
        continue;
      }
      const auto first = branch.active >= 0 ? branch.units.begin() : unit;
      const auto count = branch.active >= 0 ? static_cast<int64_t>(branch.choices()) : 1;
      branch.units.erase(first, first + count);
      branch.active = -1;
      branch.beside = 0;
      if (branch.units.empty()) {
        branch.out_norm = {NormKind::kNone};
      }
      return;
    }
  }
}

LoadedModel remove_layer(Model& base, int64_t layer, bool whole_block) {
  ModelSpec spec = base.spec();
  spec.family = "cambium";
  expect(layer >= 0 && layer < base.layer_count(),
         "layer {} does not exist: the model has layers 0 to {}", layer, base.layer_count() - 1);
  LayerSpec& edited = spec.layers[static_cast<size_t>(layer)];
  if (whole_block) {
    edited = {};
  } else {
    take_mixer_out(edited);
  }
  LoadedModel without{{}, std::make_unique<Model>(spec), {}};
  take_parameters(*without.model, base, {}, true);
  without.model->set_activations(base.activations());
  return without;
}

}  // namespace cambium
