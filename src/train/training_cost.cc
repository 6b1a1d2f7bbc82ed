#include "train/training_cost.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "base/text.h"
#include "model/supernet.h"
#include "nn/units/units.h"
#include "ops/loss/loss.h"

namespace cambium {
namespace {

/// Of attention on latents, with a window or without.
bool on_latents(const UnitSpec& unit) {
  return unit.options.has("kv_rank");
}

/// Channels of queries or values, on average, times the positions each sees on average, causally.
double attended(const UnitSpec& mixer, int64_t sequence) {
  if (!is_attention(mixer) && mixer.kind != "sliding_window" && mixer.kind != "parallel") {
    return 0.0;
  }
  const Options& o = mixer.options;
  const double seen = static_cast<double>(sequence) / 2.0;
  const int64_t window = o.integer(mixer.kind, "window", 0);
  const int64_t most = window + o.integer(mixer.kind, "sinks", 0);
  const int64_t both = on_latents(mixer)
                           ? o.integer(mixer.kind, "nope_dim") + o.integer(mixer.kind, "rope_dim") +
                                 o.integer(mixer.kind, "value_dim")
                           : 2 * o.integer(mixer.kind, "head_dim");
  return static_cast<double>(o.integer(mixer.kind, "heads") * both) / 2.0 *
         (window > 0 ? std::min(seen, static_cast<double>(most)) : seen);
}

struct LayerWork {
  double matrices = 0.0;  // weights
  double trained = 0.0;   // those that get gradients
  double attended = 0.0;
};

/// Of the layers in order, and of the head behind them.
std::vector<LayerWork> work_of(const ModelSpec& spec, int64_t sequence,
                               const std::function<bool(const std::string&)>& trained) {
  Model model(spec);
  const std::set<std::string> resting = resting_units(spec);
  std::vector<LayerWork> work(spec.layers.size() + 1);
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    LayerWork& layer = work[i];
    model.visit_layer(static_cast<int64_t>(i), [&](const std::string& name, Parameter& p) {
      if (p.is_matrix() && !resting.contains(unit_of(name))) {
        const auto count = static_cast<double>(p.active());
        layer.matrices += count;
        layer.trained += trained && trained(name) ? count : 0.0;
      }
    });
    for (const UnitSpec& mixer : spec.layers[i].mixers()) {
      layer.attended += attended(mixer, sequence);
    }
  }
  LayerWork& head = work.back();
  head.matrices = static_cast<double>(spec.vocab * spec.width);
  const bool head_trained = trained && trained(spec.tied_head ? "embed.weight" : "head.weight");
  head.trained = head_trained ? head.matrices : 0.0;
  return work;
}

/// Channels a token of what the operations of a unit give, which stay for the backward pass.
int64_t unit_channels(const UnitSpec& unit, int64_t width) {
  const Options& o = unit.options;
  const char* who = unit.kind.c_str();
  const auto size = [&](const char* key, int64_t fallback = 0) {
    return o.integer(who, key, fallback);
  };
  if (unit.kind == "parallel") {
    const UnitSpec window{"sliding_window", unit.options};
    return unit_channels(window, width) + unit_channels(recurrent_part(unit.options), width);
  }
  if (on_latents(unit)) {
    const int64_t turned = size("rope_dim");
    const int64_t q = size("heads") * (size("nope_dim") + turned);
    const int64_t v = size("heads") * size("value_dim");
    // Latents before and after their norms; q, its turned dims and q put together; k without those
    // and k put together; v, what is attended to, out.
    return 2 * (size("q_rank") + size("kv_rank") + turned) + 4 * q + 2 * v + width;
  }
  if (unit.kind == "attention" || unit.kind == "sliding_window") {
    const int64_t q = size("heads") * size("head_dim");
    const int64_t k = size("kv_heads", size("heads")) * size("head_dim");
    // Before and after the rotation, v, what is attended to, out; q and k before their norms.
    return 3 * q + 3 * k + width + (o.has("qk_norm_eps") ? q + k : 0);
  }
  if (unit.kind == "mamba") {
    return 6 * size("inner") + 2 * size("xb") + size("dt_rank") + width;
  }
  if (unit.kind == "mamba2") {
    const int64_t inner = size("heads") * size("head_dim");
    const int64_t state = size("b_heads", size("heads")) * size("state");
    return 6 * inner + 4 * state + width;
  }
  if (unit.kind == "gated_delta_net") {
    const int64_t heads = size("heads", size("v_heads"));
    const int64_t keys = size("k_heads", heads) * size("key_dim");
    const int64_t values = heads * size("value_dim");
    return 8 * keys + 6 * values + width;
  }
  if (unit.kind == "kimi_delta") {
    const int64_t keys = size("heads") * size("head_dim");
    const int64_t values = size("heads") * size("value_dim", size("head_dim"));
    return 10 * keys + 6 * values + width;
  }
  if (unit.kind == "lightning") {
    const int64_t keys = size("head_dim");
    const int64_t values = size("value_dim", keys);
    return size("heads") * (3 * keys + 5 * values) +
           size("kv_heads", size("heads")) * (3 * keys + values) + width;
  }
  if (unit.kind == "swiglu") {
    return 3 * size("inner") + width;
  }
  if (unit.kind == "feed_forward") {
    return 2 * size("inner") + width;
  }
  return 8 * width;
}

/// Of a layer: its units, a norm and a sum for each branch.
int64_t layer_channels(const LayerSpec& layer, int64_t width) {
  int64_t channels = 0;
  for (const BranchSpec& branch : layer.branches) {
    channels += branch.units.empty() ? 0 : width;
    for (size_t i = 0; i < branch.units.size(); ++i) {
      if (!branch.runs(i)) {
        continue;
      }
      const UnitSpec& unit = branch.units[i];
      channels += unit_channels(unit, width) + width;
      channels += branch.out_norm.kind == NormKind::kNone ? 0 : width;
    }
  }
  return channels;
}

}  // namespace

double forward_flops(const ModelSpec& spec, int64_t sequence) {
  double flops = 0.0;
  for (const LayerWork& layer : work_of(spec, sequence, nullptr)) {
    flops += 2.0 * layer.matrices + 4.0 * layer.attended;
  }
  return flops;
}

double training_flops(const TrainConfig& config, const TrainingShape& shape) {
  const bool aligns = config.objective == Objective::kAlign;
  const double watched =
      shape.teacher == nullptr ? 0.0 : forward_flops(*shape.teacher, config.sequence_length);
  double flops = watched;
  bool reached = shape.trained && shape.trained("embed.weight");
  for (const LayerWork& layer : work_of(*shape.student, config.sequence_length, shape.trained)) {
    if (aligns) {
      flops += 6.0 * layer.trained;
      continue;
    }
    reached = reached || layer.trained > 0.0;
    const double forward = 2.0 * layer.matrices + 4.0 * layer.attended;
    flops += forward + 2.0 * layer.trained;
    flops += reached ? 2.0 * layer.matrices + 8.0 * layer.attended : 0.0;
  }
  return flops;
}

std::vector<MemoryItem> training_memory(const TrainConfig& config, const TrainingShape& shape) {
  const auto stored = [&](const Parameter& p) {
    return p.numel() * (shape.bf16_matrices && p.is_matrix() ? 2 : 4);
  };
  int64_t teacher = 0;
  if (shape.teacher != nullptr) {
    Model(*shape.teacher).visit([&](const std::string&, Parameter& p) { teacher += stored(p); });
  }
  int64_t frozen = 0;
  int64_t trained = 0;
  int64_t matrices = 0;  // numbers of the trained ones
  int64_t largest = 0;   // of which, where it is rounded for each product
  Model(*shape.student).visit([&](const std::string& name, Parameter& p) {
    if (shape.trained && shape.trained(name)) {
      trained += p.numel();
      matrices += p.is_matrix() ? p.numel() : 0;
      largest = p.is_matrix() ? std::max(largest, p.numel()) : largest;
    } else if (!shape.shared || !shape.shared(name)) {
      frozen += stored(p);
    }
  });
  const ModelSpec& spec = *shape.student;
  const int64_t element = dtype_size(shape.activations);
  const int64_t tokens = config.sequence_length;
  int64_t all = 0;
  int64_t most = 0;
  for (const LayerSpec& layer : spec.layers) {
    const int64_t channels = layer_channels(layer, spec.width);
    all += channels;
    most = std::max(most, channels);
  }
  const auto layers = static_cast<int64_t>(spec.layers.size());
  const bool aligns = config.objective == Objective::kAlign;
  // Layers share the memory of gradients, every other one the same; what is aligned is not shared.
  const int64_t beside = std::min(layers, int64_t{2});
  const int64_t kept = aligns                     ? 2 * layers * spec.width + 2 * most
                       : config.checkpoint_layers ? (layers + beside) * spec.width + 2 * most
                                                  : all + std::min(all, beside * most);
  const int64_t ends = (shape.teacher != nullptr ? 3 : 2) * 2 * spec.width;
  const bool cuda = shape.activations == Dtype::kBF16 || shape.bf16_matrices;
  const int64_t rows = head_loss_rows(spec.vocab, Device{cuda ? Device::kCuda : Device::kCpu});
  const int64_t logits = std::min(rows, tokens) * spec.vocab * element *
                         ((shape.teacher != nullptr ? 2 : 1) + (spec.logit_cap > 0.0F ? 1 : 0));
  const bool narrow = shape.activations == Dtype::kBF16;
  const bool once = rounds_once(config, shape.activations);
  const bool offload = cuda && config.optimizer.offload;
  return {{"teacher", teacher},
          {"frozen weights", frozen},
          {"trained weights", 4 * trained},
          {"rounded weights", once ? 2 * matrices : 0},
          {"gradients", 4 * trained},
          {"optimiser", optimizer_state_bytes(config.optimizer) * trained, offload},
          {"activations", tokens * element * (kept + ends)},
          {"logits", aligns ? 0 : logits},
          {"workspace", (narrow && !once ? 2 * largest : 0) + (cuda ? int64_t{32} << 20 : 0)}};
}

int64_t total_bytes(const std::vector<MemoryItem>& items) {
  return std::accumulate(
      items.begin(), items.end(), int64_t{0},
      [](int64_t sum, const MemoryItem& item) { return sum + (item.host ? 0 : item.bytes); });
}

std::string memory_parts(const std::vector<MemoryItem>& items) {
  const auto bytes = [](int64_t n) { return human_bytes(static_cast<uint64_t>(n)); };
  std::vector<std::string> parts;
  for (const MemoryItem& item : items) {
    if (item.bytes > 0) {
      parts.push_back(
          fmt::format("{} {}{}", item.kind, bytes(item.bytes), item.host ? " of the host's" : ""));
    }
  }
  return fmt::format("{} in all: {}", bytes(total_bytes(items)), join(parts, ", "));
}

}  // namespace cambium
