#include <algorithm>
#include <cmath>
#include <numbers>
#include <tuple>

#include "base/text.h"
#include "hybrid/grafts/graft_table.h"
#include "nn/norm.h"

namespace cambium {

const std::vector<Graft>& grafts() {
  static const std::vector<Graft> table = {
      mamba_graft(),     mamba2_graft(),         gated_delta_net_graft(), kimi_delta_graft(),
      lightning_graft(), sliding_window_graft(), parallel_graft()};
  return table;
}

std::vector<std::string> graft_mixers() {
  std::vector<std::string> names;
  for (const Graft& graft : grafts()) {
    names.emplace_back(graft.mixer);
  }
  return names;
}

const Graft& find_graft(const std::string& mixer) {
  for (const Graft& graft : grafts()) {
    if (mixer == graft.mixer) {
      return graft;
    }
  }
  const std::vector<std::string> names = graft_mixers();
  fail("unknown mixer '{}'{}; {} cannot take the place of attention, choose {}", mixer,
       did_you_mean(mixer, names), mixer, join(names, ", "));
}

Parameter& NewMixer::at(const std::string& name) const {
  const auto it = parameters_.find(name);
  CAMBIUM_CHECK(it != parameters_.end(), "{}", name);
  return *it->second;
}

float* NewMixer::row(const std::string& name, std::string_view block, int64_t row) const {
  const Parameter& p = at(name);
  return p.tensor.ptr<float>() + (rows_of(p, block).begin + row) * (p.numel() / p.shape[0]);
}

void NewMixer::put(const std::string& name, std::string_view block,
                   const std::vector<float>& rows) const {
  const Parameter& p = at(name);
  CAMBIUM_CHECK(
      static_cast<int64_t>(rows.size()) == rows_of(p, block).count * (p.numel() / p.shape[0]),
      "{} {}", name, block);
  std::copy(rows.begin(), rows.end(), row(name, block, 0));
}

void NewMixer::fill(const std::string& name, std::string_view block, float value) const {
  const Parameter& p = at(name);
  std::fill_n(row(name, block, 0), rows_of(p, block).count * (p.numel() / p.shape[0]), value);
}

void NewMixer::scale(const std::string& name, std::string_view block,
                     const std::vector<float>& factors) const {
  const Parameter& p = at(name);
  const int64_t count = rows_of(p, block).count * (p.numel() / p.shape[0]);
  const auto parts = static_cast<int64_t>(factors.size());
  CAMBIUM_CHECK(count % parts == 0, "{} {}", name, block);
  float* values = row(name, block, 0);
  for (int64_t i = 0; i < count; ++i) {
    values[i] *= factors[static_cast<size_t>(i / (count / parts))];
  }
}

void NewMixer::put_multiples(const std::string& name, std::string_view block,
                             const std::vector<float>& values,
                             const std::vector<float>& direction) const {
  const int64_t rows = rows_of(at(name), block).count;
  CAMBIUM_CHECK(values.size() == 1 || static_cast<int64_t>(values.size()) == rows, "{} {}", name,
                block);
  for (int64_t i = 0; i < rows; ++i) {
    const float value = values[values.size() == 1 ? 0 : static_cast<size_t>(i)];
    std::transform(direction.begin(), direction.end(), row(name, block, i),
                   [=](float x) { return value * x; });
  }
}

double half_life(const HeadStatistics& head) {
  constexpr double kLeast = 0.5;
  return std::max(kLeast, std::numbers::ln2 * head.look_back);
}

float write_gate(const HeadStatistics& head) {
  const double beta = 0.3 + 0.4 * std::clamp(head.concentration, 0.0, 1.0);
  return static_cast<float>(std::log(beta / (1.0 - beta)));
}

std::vector<float> calibrated_log_rates(const AttentionStatistics& statistics, double step) {
  std::vector<float> rates;
  for (const HeadStatistics& head : statistics.heads) {
    rates.push_back(static_cast<float>(std::log(std::numbers::ln2 / half_life(head) / step)));
  }
  return rates;
}

/// Factors that bring heads of these sizes to the size `to`.
static std::vector<float> resized(const std::vector<float>& rms, double to) {
  std::vector<float> factors;
  for (const float size : rms) {
    factors.push_back(size > 0.0F ? static_cast<float>(to / size) : 1.0F);
  }
  return factors;
}

void resize_heads(const NewMixer& mixer, const AttentionWeights& from, const std::string& bias,
                  std::string_view block, const std::vector<float>& rms, double to) {
  const std::vector<float> factors = resized(rms, to);
  mixer.scale("in_proj.weight", block, factors);
  if (!from.q_bias.empty()) {
    mixer.scale(bias, block, factors);
  }
}

void put_calibrated_rates(const NewMixer& mixer, const AttentionStatistics& statistics,
                          double step) {
  const std::vector<float> rates = calibrated_log_rates(statistics, step);
  std::copy(rates.begin(), rates.end(), mixer.values("A_log"));
}

int64_t window_of(const UnitSpec& attention, const GraftOptions& options) {
  const int64_t asked = options.window > 0 ? options.window : 128;
  const int64_t own = attention.options.integer("attention", "window", 0);
  return own > 0 ? std::min(own, asked) : asked;
}

UnitSpec windowed(const UnitSpec& attention, const char* kind, const GraftOptions& options) {
  UnitSpec unit{kind};
  for (const auto& [key, value] : attention.options.values()) {
    if (!key.starts_with("index_")) {
      unit.options.set(key, value);
    }
  }
  unit.options.set("window", window_of(attention, options));
  if (options.sinks > 0) {
    unit.options.set("sinks", options.sinks);
  }
  if (options.sink_logits) {
    expect(attention.kind == "attention",
           "{}: a window on latents has no sinks' scores; leave sink_logits out", kind);
    unit.options.set("sink_logits", true);
  }
  return unit;
}

bool has_gate(const UnitSpec& attention) {
  return attention.options.flag("attention", "gate", false);
}

void check_gate(const UnitSpec& attention, const char* mixer, GatePlace place) {
  if (!has_gate(attention)) {
    return;
  }
  expect(place != GatePlace::kNone,
         "the faithful {} has no place for the gate of an attention's output; leave faithful out",
         mixer);
  expect(
      place == GatePlace::kWeightAndBias || !attention.options.flag("attention", "qkv_bias", false),
      "{} has no place for the bias of an attention's output gate; choose mamba or "
      "sliding_window",
      mixer);
}

void ask_for_biases(UnitSpec& mixer, const UnitSpec& attention, const char* qkv) {
  if (qkv != nullptr && attention.options.flag("attention", "qkv_bias", false)) {
    mixer.options.set(qkv, true);
  }
  if (attention.options.flag("attention", "out_bias", false)) {
    mixer.options.set("out_bias", true);
  }
}

void put_norms_on_rows(AttentionWeights& a, const Options& attention) {
  const bool zero_centred =
      find_norm_kind(attention.text("attention", "qk_norm", "rms")) == NormKind::kZeroCentred;
  const float offset = zero_centred ? 1.0F : 0.0F;
  const auto width = static_cast<size_t>(a.shape.width);
  for (auto [rows, bias, norm] :
       {std::tuple{&a.q, &a.q_bias, &a.q_norm}, std::tuple{&a.k, &a.k_bias, &a.k_norm}}) {
    for (size_t i = 0; !norm->empty() && i < rows->size(); ++i) {
      (*rows)[i] *= offset + (*norm)[i / width % norm->size()];
    }
    for (size_t i = 0; !norm->empty() && i < bias->size(); ++i) {
      (*bias)[i] *= offset + (*norm)[i % norm->size()];
    }
    norm->clear();
  }
}

void put_output(const NewMixer& mixer, const AttentionWeights& from) {
  if (!mixer.has("out_proj.weight")) {
    return;
  }
  std::copy(from.o.begin(), from.o.end(), mixer.values("out_proj.weight"));
  if (!from.o_bias.empty()) {
    std::copy(from.o_bias.begin(), from.o_bias.end(), mixer.values("out_proj.bias"));
  }
}

void put_delta_heads(const NewMixer& mixer, const AttentionWeights& from) {
  mixer.put("in_proj.weight", "q", from.q);
  mixer.put("in_proj.weight", "k", from.k);
  mixer.put("in_proj.weight", "v", from.v);
  pass_through(mixer.at("conv1d.weight"), 1.0F);
  if (!from.q_bias.empty()) {
    mixer.put("conv1d.bias", "q", from.q_bias);
    mixer.put("conv1d.bias", "k", from.k_bias);
    mixer.put("conv1d.bias", "v", from.v_bias);
  }
}

void shrink_delta_heads(const NewMixer& mixer, const AttentionWeights& from,
                        const AttentionStatistics& statistics) {
  constexpr double kSmall = 0.1;
  for (const auto& [block, rms] :
       {std::pair{"q", &statistics.q_rms}, std::pair{"k", &statistics.k_rms},
        std::pair{"v", &statistics.v_rms}}) {
    resize_heads(mixer, from, "conv1d.bias", block, *rms, kSmall);
  }
}

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

double head_rate(int64_t head, int64_t heads) {
  const double low = std::log(1.0 / 512.0);
  const double high = std::log(1.0 / 8.0);
  const double at = heads == 1 ? 0.5 : static_cast<double>(head) / static_cast<double>(heads - 1);
  return std::exp(low + (high - low) * at);
}

}  // namespace cambium
