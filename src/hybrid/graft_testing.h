// What tests of grafts begin with: small teachers, and how two models are compared.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "base/checked.h"
#include "base/random.h"
#include "base/testing.h"
#include "hybrid/graft.h"
#include "hybrid/grafts/graft_table.h"
#include "train/testing.h"

namespace cambium::graft_testing {

enum class Biases : uint8_t { kNone, kOfQkv, kOfAll };
constexpr Biases kAllBiases[] = {Biases::kNone, Biases::kOfQkv, Biases::kOfAll};

// 6 layers, 4 query heads on 2 key-value heads of 8 dims.
inline ModelSpec teacher_spec(Biases biases = Biases::kNone) {
  ModelSpec spec;
  spec.family = "llama";
  spec.vocab = 50;
  spec.width = 24;
  spec.rope.dim = 8;
  spec.max_positions = 128;
  spec.layers.assign(
      6,
      decoder_layer({"attention",
                     {{"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{8}}}},
                    32));
  for (LayerSpec& layer : spec.layers) {
    if (biases != Biases::kNone) {
      layer.mixer()->options.set("qkv_bias", true);
    }
    if (biases == Biases::kOfAll) {
      layer.mixer()->options.set("out_bias", true);
    }
  }
  return spec;
}

// Biases of attention, which start at zero, drawn at random.
inline LoadedModel make_teacher(const ModelSpec& spec) {
  LoadedModel teacher = fresh_model(spec, 1);
  teacher.model->visit([](const std::string& name, Parameter& p) {
    Rng random(3, name.size() + static_cast<size_t>(name[7]));
    for (int64_t i = 0; name.ends_with("_proj.bias") && i < p.numel(); ++i) {
      p.tensor.ptr<float>()[i] = random.normal();
    }
  });
  return teacher;
}

inline std::vector<int32_t> prompt() {
  std::vector<int32_t> tokens(40);
  std::iota(tokens.begin(), tokens.end(), 3);
  return tokens;
}

inline std::vector<float> logits(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(prompt());
  const Tensor out = model.logits(ctx, model.forward(ctx, batch));
  return {out.ptr<float>(), out.ptr<float>() + out.numel()};
}

// What the mixer of a layer gives, before it is added to the residual.
inline std::vector<float> mixer_output(Model& model, int64_t layer) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(prompt());
  std::vector<MixerTap> taps(static_cast<size_t>(model.layer_count()));
  model.forward(ctx, batch, {.taps = taps});
  const Tensor& out = taps[static_cast<size_t>(layer)].output;
  return {out.ptr<float>(), out.ptr<float>() + out.numel()};
}

inline double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    worst = larger_error(worst, std::abs(a[i] - b[i]));
  }
  return worst;
}

inline Parameter& parameter(Model& model, const std::string& name) {
  Parameter* found = nullptr;
  model.visit([&](const std::string& n, Parameter& p) { found = n == name ? &p : found; });
  CAMBIUM_CHECK(found != nullptr, "{}", name);
  return *found;
}

/// A teacher whose attention has a gate of its output, a soft cap and sinks' scores, some of each.
inline LoadedModel make_gated_teacher(bool bends, Biases biases = Biases::kNone) {
  ModelSpec spec = teacher_spec(biases);
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set("gate", true);
    if (bends) {
      layer.mixer()->options.set("softcap", 0.5);
      layer.mixer()->options.set("sink_logits", true);
    }
  }
  LoadedModel teacher = make_teacher(spec);
  teacher.model->visit([](const std::string& name, Parameter& p) {
    for (int64_t i = 0; name.ends_with(".sinks") && i < p.numel(); ++i) {
      p.tensor.ptr<float>()[i] = static_cast<float>(i) - 1.0F;
    }
  });
  return teacher;
}

}  // namespace cambium::graft_testing
