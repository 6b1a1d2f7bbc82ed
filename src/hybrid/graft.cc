#include "hybrid/graft.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "base/text.h"

namespace cambium {
namespace {

using MixerParameters = std::map<std::string, Parameter*>;

MixerParameters layer_parameters(Model& model, int64_t layer) {
  const std::string prefix = "layers." + std::to_string(layer) + ".mixer.";
  MixerParameters parameters;
  model.visit_layer(layer, [&](const std::string& name, Parameter& p) {
    if (name.starts_with(prefix)) {
      parameters[name.substr(prefix.size())] = &p;
    }
  });
  return parameters;
}

float* values(const MixerParameters& layer, const char* name) {
  const auto it = layer.find(name);
  CAMBIUM_CHECK(it != layer.end(), "{}", name);
  return it->second->tensor.ptr<float>();
}

struct Heads {
  int64_t heads, kv_heads, dim, width;
  int64_t share() const { return heads / kv_heads; }  // query heads of a key-value head
};

Heads heads_of(const UnitSpec& attention, int64_t width) {
  const Options& o = attention.options;
  const int64_t heads = o.integer("attention", "heads");
  return {heads, o.integer("attention", "kv_heads", heads), o.integer("attention", "head_dim"),
          width};
}

// Attention as dense fp32 rows: the norm of q and k per head (Qwen3) leaves its weight on the rows,
// whose length the new mixer normalises or learns.
struct Attention {
  Heads heads;
  std::vector<float> q, k, v, o;  // (H D, C), (Hkv D, C), (Hkv D, C), (C, H D)
};

std::vector<float> dense(const Parameter& p) {
  std::vector<float> out(static_cast<size_t>(p.numel()));
  copy_values(Tensor::of(out.data(), {p.shape[0], p.shape[1]}), p.tensor);
  return out;
}

Attention read_attention(Model& teacher, int64_t layer) {
  const MixerParameters p = layer_parameters(teacher, layer);
  Attention a{
      heads_of(*teacher.spec().layers[static_cast<size_t>(layer)].mixer(), teacher.spec().width),
      dense(*p.at("q_proj.weight")), dense(*p.at("k_proj.weight")), dense(*p.at("v_proj.weight")),
      dense(*p.at("o_proj.weight"))};
  for (auto [rows, norm] : {std::pair{&a.q, "q_norm.weight"}, std::pair{&a.k, "k_norm.weight"}}) {
    if (const auto it = p.find(norm); it != p.end()) {
      const float* scale = it->second->tensor.ptr<float>();
      for (size_t i = 0; i < rows->size(); ++i) {
        (*rows)[i] *=
            scale[(i / static_cast<size_t>(a.heads.width)) % static_cast<size_t>(a.heads.dim)];
      }
    }
  }
  return a;
}

// Copies row `from` of `source` (.., width) to row `to` of `target`.
void copy_row(float* target, int64_t to, const std::vector<float>& source, int64_t from,
              int64_t width) {
  std::copy_n(source.begin() + from * width, width, target + to * width);
}

void copy_rows(float* target, int64_t to, const std::vector<float>& source, int64_t width) {
  std::copy(source.begin(), source.end(), target + to * width);
}

// Convolution that starts by passing the current token alone.
void pass_through(Parameter& conv, float last_tap) {
  float* w = conv.tensor.ptr<float>();
  const int64_t taps = conv.shape.back();
  for (int64_t i = 0; i < conv.numel(); ++i) {
    w[i] = i % taps == taps - 1 ? last_tap : 0.0F;
  }
}

float inverse_softplus(double y) {
  return static_cast<float>(y + std::log(-std::expm1(-y)));
}

// Heads remember over time scales spread evenly in logarithm from a few tokens to hundreds: with
// rate 1 / scale a state fades by e over `scale` tokens.
double head_rate(int64_t head, int64_t heads) {
  const double low = std::log(1.0 / 512.0);
  const double high = std::log(1.0 / 8.0);
  const double at = heads == 1 ? 0.5 : static_cast<double>(head) / static_cast<double>(heads - 1);
  return std::exp(low + (high - low) * at);
}

void graft_mamba(const MixerParameters& s, const Attention& a, const UnitSpec& spec,
                 bool faithful) {
  const Heads& h = a.heads;
  const int64_t inner = spec.options.integer("mamba", "inner");
  const int64_t xb = spec.options.integer("mamba", "xb");
  const int64_t n = spec.options.integer("mamba", "state");
  float* in = values(s, "in_proj.weight");
  float* out = values(s, "out_proj.weight");
  copy_rows(in, inner, a.v, h.width);
  copy_rows(in, inner + xb, a.k, h.width);
  if (faithful) {
    copy_rows(in, inner + 2 * xb, a.q, h.width);
    std::copy(a.o.begin(), a.o.end(), out);
    return;
  }
  // Scan head j reads group j / share of B and x: slice s of key-value head k. Giving it slice s of
  // query head k * share + m pairs the same dimensions that the attention's dot product paired.
  const int64_t slices = h.dim / n;
  for (int64_t j = 0; j < inner / n; ++j) {
    const int64_t group = j / h.share();
    const int64_t query = group / slices * h.share() + j % h.share();
    const int64_t first = query * h.dim + group % slices * n;
    for (int64_t i = 0; i < n; ++i) {
      copy_row(in, inner + 2 * xb + j * n + i, a.q, first + i, h.width);
      for (int64_t c = 0; c < h.width; ++c) {
        out[c * inner + j * n + i] = a.o[static_cast<size_t>(c * inner + first + i)];
      }
    }
  }
  pass_through(*s.at("conv1d.weight"), 1.0F);
  // The bias acts twice: half of it each time gives steps of the range it was drawn for.
  Parameter& bias = *s.at("dt_proj.bias");
  for (int64_t c = 0; c < inner; ++c) {
    bias.tensor.ptr<float>()[c] *= 0.5F;
  }
}

void graft_mamba2(const MixerParameters& s, const Attention& a) {
  const Heads& h = a.heads;
  const int64_t inner = h.heads * h.dim;
  float* in = values(s, "in_proj.weight");
  const int64_t kv = h.kv_heads * h.dim;
  copy_rows(in, inner, a.v, h.width);
  copy_rows(in, inner + kv, a.k, h.width);
  copy_rows(in, inner + 2 * kv, a.q, h.width);
  std::copy(a.o.begin(), a.o.end(), values(s, "out_proj.weight"));
  pass_through(*s.at("conv1d.weight"), 1.0F);
  // Step 0.1 everywhere, decay per token e^(-0.1 A) = e^-rate.
  std::fill_n(in + (2 * inner + 2 * kv) * h.width, h.heads * h.width, 0.0F);
  for (int64_t i = 0; i < h.heads; ++i) {
    values(s, "dt_bias")[i] = inverse_softplus(0.1);
    values(s, "A_log")[i] = static_cast<float>(std::log(head_rate(i, h.heads) / 0.1));
  }
}

void graft_gated_delta_net(const MixerParameters& s, const Attention& a, bool faithful) {
  const Heads& h = a.heads;
  float* in = values(s, "in_proj.weight");
  std::copy(a.o.begin(), a.o.end(), values(s, "out_proj.weight"));
  std::fill_n(values(s, "ba_proj.weight"), s.at("ba_proj.weight")->numel(), 0.0F);
  if (faithful) {
    // The released converter: the first kv_heads query heads, values tiled by modulo, no output
    // gate, one decay for every head.
    const int64_t kv = h.kv_heads * h.dim;
    std::copy_n(a.q.begin(), kv * h.width, in);
    copy_rows(in, kv, a.k, h.width);
    for (int64_t row = 0; row < h.heads * h.dim; ++row) {
      copy_row(in, 2 * kv + row, a.v, row / h.dim % h.kv_heads * h.dim + row % h.dim, h.width);
    }
    std::fill_n(in + (2 * kv + h.heads * h.dim) * h.width, h.heads * h.dim * h.width, 0.0F);
    pass_through(*s.at("conv1d.weight"), 0.5F);
    for (int64_t i = 0; i < h.heads; ++i) {
      values(s, "A_log")[i] = std::log(0.1F);
      values(s, "dt_bias")[i] = 0.0F;
    }
    return;
  }
  const int64_t kv = h.kv_heads * h.dim;
  copy_rows(in, 0, a.q, h.width);
  copy_rows(in, h.heads * h.dim, a.k, h.width);
  copy_rows(in, h.heads * h.dim + kv, a.v, h.width);
  pass_through(*s.at("conv1d.weight"), 1.0F);
  for (int64_t i = 0; i < h.heads; ++i) {
    // decay e^(-A softplus(dt_bias)) with softplus(dt_bias) = 0.1
    values(s, "A_log")[i] = static_cast<float>(std::log(head_rate(i, h.heads) / 0.1));
    values(s, "dt_bias")[i] = inverse_softplus(0.1);
  }
}

void check_layers(const ModelSpec& base, const std::vector<int64_t>& layers) {
  std::set<int64_t> seen;
  const auto count = static_cast<int64_t>(base.layers.size());
  for (const int64_t layer : layers) {
    expect(layer >= 0 && layer < count, "layer {} does not exist: the model has layers 0 to {}",
           layer, count - 1);
    expect(seen.insert(layer).second, "layer {} is given twice", layer);
    const LayerSpec& old = base.layers[static_cast<size_t>(layer)];
    expect(old.mixes_by("attention"),
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
    skip.push_back("layers." + std::to_string(layer) + ".mixer.");
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
      copy_values(p.tensor, it->second->tensor);
    }
  });
}

}  // namespace

void expect_graft(const std::string& mixer) {
  const std::vector<std::string> grafts = {"mamba", "mamba2", "gated_delta_net", "sliding_window"};
  if (std::find(grafts.begin(), grafts.end(), mixer) == grafts.end()) {
    fail("unknown mixer '{}'{}; {} cannot take the place of attention, choose {}", mixer,
         did_you_mean(mixer, grafts), mixer, join(grafts, ", "));
  }
}

UnitSpec graft_spec(const UnitSpec& from, int64_t width, const GraftOptions& options) {
  expect(from.kind == "attention", "a graft replaces attention, not {}", from.kind);
  expect_graft(options.mixer);
  const Heads h = heads_of(from, width);
  const std::string& name = options.mixer;
  if (name == "sliding_window") {
    UnitSpec spec{name, from.options};
    spec.options.set("window", options.window > 0 ? options.window : int64_t{128});
    return spec;
  }
  if (name == "mamba") {
    int64_t state = options.state > 0 ? options.state : 16;
    if (options.state == 0) {
      while (h.dim % state != 0) {
        --state;
      }
    }
    expect(h.dim % state == 0,
           "mamba: expected the state to divide the attention's head_dim {}, got {}", h.dim, state);
    return {name,
            {{"inner", h.heads * h.dim},
             {"xb", h.kv_heads * h.dim},
             {"state", state},
             {"dt_rank", (width + 15) / 16},
             {"conv", int64_t{4}},
             {"repeat_before_conv", true},
             {"conv_bias", true}}};
  }
  if (name == "mamba2") {
    return {name,
            {{"heads", h.heads},
             {"head_dim", h.dim},
             {"state", h.dim},
             {"x_heads", h.kv_heads},
             {"b_heads", h.kv_heads},
             {"c_heads", h.heads},
             {"conv", int64_t{4}},
             {"norm_group", h.dim}}};
  }
  if (name == "gated_delta_net") {
    const int64_t q_heads = options.faithful ? h.kv_heads : h.heads;
    const int64_t v_heads = options.faithful ? h.heads : h.kv_heads;
    return {name,
            {{"heads", h.heads},
             {"q_heads", q_heads},
             {"k_heads", h.kv_heads},
             {"v_heads", v_heads},
             {"key_dim", h.dim},
             {"value_dim", h.dim},
             {"conv", int64_t{4}},
             {"rope", !options.faithful && h.dim % 2 == 0}}};
  }
  fail("{} cannot take the place of attention", name);
}

void graft_layer(Model& student, Model& teacher, int64_t layer, const GraftOptions& options,
                 uint64_t seed) {
  const MixerParameters s = layer_parameters(student, layer);
  const std::string prefix = "layers." + std::to_string(layer) + ".mixer.";
  for (const auto& [name, p] : s) {
    initialise(*p, prefix + name, seed);
  }
  if (!options.from_attention) {
    return;
  }
  const UnitSpec& spec = *student.spec().layers[static_cast<size_t>(layer)].mixer();
  if (spec.kind == "sliding_window") {
    const MixerParameters from = layer_parameters(teacher, layer);
    for (const auto& [name, p] : s) {
      copy_values(p->tensor, from.at(name)->tensor);
    }
    return;
  }
  const Attention attention = read_attention(teacher, layer);
  if (spec.kind == "mamba") {
    graft_mamba(s, attention, spec, options.faithful);
  } else if (spec.kind == "mamba2") {
    graft_mamba2(s, attention);
  } else if (spec.kind == "gated_delta_net") {
    graft_gated_delta_net(s, attention, options.faithful);
  } else {
    fail("{} cannot start from attention", spec.kind);
  }
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
  bool only_mamba = true;
  for (const int64_t layer : layers) {
    const auto i = static_cast<size_t>(layer);
    *spec.layers[i].mixer() = graft_spec(*teacher.layers[i].mixer(), spec.width, options);
  }
  for (const LayerSpec& layer : spec.layers) {
    only_mamba = only_mamba && (layer.mixes_by("mamba") || layer.mixes_by("attention"));
  }
  // Apriel-H1's own layout where it can express the model, so that its users find what they know.
  spec.family = options.faithful && only_mamba && options.mixer == "mamba" ? "apriel_h" : "cambium";
  return spec;
}

LoadedModel convert(Model& base, Model& teacher, const std::vector<int64_t>& layers,
                    const GraftOptions& options, uint64_t seed, bool share) {
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
  return hybrid;
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
    // The branches stay, so that the other parameters keep their names.
    for (BranchSpec& branch : edited.branches) {
      std::erase_if(branch.units, [](const UnitSpec& unit) {
        return find_unit_kind(unit.kind).role == UnitRole::kMixer;
      });
      if (branch.units.empty()) {
        branch = {.norm = branch.norm, .units = {}};
      }
    }
  }
  LoadedModel without{{}, std::make_unique<Model>(spec), {}};
  take_parameters(*without.model, base, {}, true);
  return without;
}

}  // namespace cambium
