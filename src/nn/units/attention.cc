#include <cmath>

#include "base/checked.h"
#include "nn/norm.h"
#include "nn/units/head_mixer.h"
#include "nn/units/units.h"
#include "ops/pointwise/pointwise.h"
#include "ops/rope/rope.h"
#include "ops/scale_heads/scale_heads.h"
#include "ops/turned_write/turned_write.h"

namespace cambium {
namespace {

/// A sink's score where nothing else is known: beside a score of 0 its share is 1/400, which is
/// next to nothing and yet has a gradient.
constexpr double kQuietSink = -6.0;

class AttentionUnit : public ScoredMixer {
 public:
  AttentionUnit(const Options& options, int64_t width, const char* owner, bool sliding)
      : heads_(options.size(owner, "heads", kMaxHeads)),
        kv_heads_(options.size_or(owner, "kv_heads", heads_, kMaxHeads, 1)),
        head_dim_(options.size(owner, "head_dim", kMaxHeadDim)),
        window_(options.size_or(owner, "window", 0, kMaxPositions)),
        sinks_(options.size_or(owner, "sinks", 0, kMaxPositions)),
        rope_(options.flag(owner, "rope", true)),
        gate_(options.flag(owner, "gate", false)),
        softcap_(static_cast<float>(
            in_range(owner, "softcap", options.real(owner, "softcap", 0.0), 0.0, 1e6))) {
    std::vector<std::string> known = {"heads",       "kv_heads",    "head_dim",     "window",
                                      "rope",        "scale",       "key_scale",    "qk_norm",
                                      "qk_norm_eps", "qkv_bias",    "out_bias",     "gate",
                                      "softcap",     "sink_logits", "qk_norm_over", "temperature"};
    if (sliding) {
      known.emplace_back("sinks");
    }
    options.expect_only(owner, known);
    expect(heads_ % kv_heads_ == 0,
           "{}: expected kv_heads to divide heads, got heads={} kv_heads={}", owner, heads_,
           kv_heads_);
    expect(!rope_ || head_dim_ % 2 == 0, "{}: expected an even head_dim for rope, got {}", owner,
           head_dim_);
    // A factor of the keys is one of the scores.
    const double scale =
        options.real(owner, "scale", 1.0 / std::sqrt(static_cast<double>(head_dim_))) *
        options.real(owner, "key_scale", 1.0);
    scale_ = static_cast<float>(in_range(owner, "scale", scale, 0.0, 1e6));
    const bool bias = options.flag(owner, "qkv_bias", false);
    q_ = Linear(width, (gate_ ? 2 : 1) * heads_ * head_dim_, ParameterGroup::kMixer, bias);
    k_ = Linear(width, kv_heads_ * head_dim_, ParameterGroup::kMixer, bias);
    v_ = Linear(width, kv_heads_ * head_dim_, ParameterGroup::kMixer, bias);
    out_ = Linear(heads_ * head_dim_, width, ParameterGroup::kMixer,
                  options.flag(owner, "out_bias", false));
    if (options.flag(owner, "sink_logits", false)) {
      sink_logits_ = {.shape = {heads_},
                      .group = ParameterGroup::kNorm,
                      .init = {InitKind::kConstant, kQuietSink},
                      .keep_fp32 = true};
    }
    if (const std::string of = options.text(owner, "temperature", ""); !of.empty()) {
      expect(of == "query" || of == "key", "{}: expected temperature to be query or key, got '{}'",
             owner, of);
      Parameter& factors = of == "query" ? q_factors_ : k_factors_;
      factors = {.shape = {of == "query" ? heads_ : kv_heads_},
                 .group = ParameterGroup::kNorm,
                 .init = {InitKind::kOnes},
                 .keep_fp32 = true};
    }
    if (const double eps = options.real(owner, "qk_norm_eps", 0.0); eps > 0.0) {
      const NormSpec norm{find_norm_kind(options.text(owner, "qk_norm", "rms")),
                          static_cast<float>(in_range(owner, "qk_norm_eps", eps, 0.0, 1.0))};
      const std::string over = options.text(owner, "qk_norm_over", "head");
      norms_width_ = over == "width";
      expect(over == "head" || (norms_width_ && !gate_),
             "{}: expected qk_norm_over to be head or, without an output gate, width, got '{}'",
             owner, over);
      q_norm_ = Norm(norm, norms_width_ ? heads_ * head_dim_ : head_dim_);
      k_norm_ = Norm(norm, norms_width_ ? kv_heads_ * head_dim_ : head_dim_);
    }
  }

  Tensor heads(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const Segments segments = inputs.segments();
    const auto [rows, straight, v] = rows_of_heads(ctx, x);
    KvPages pages;
    if (inputs.state != nullptr) {
      pages = {inputs.page(kKeys), inputs.page(kValues), inputs.state->table,
               inputs.state->pages_per_segment};
      if (pages.keys.dtype == Dtype::kF8E4M3) {
        pages.key_scales = inputs.page(kKeyScales);
        pages.value_scales = inputs.page(kValueScales);
      }
    }
    Scored scored = straight;
    if (rope_ && inputs.state != nullptr &&
        turned_write_serves(ctx, scored.k, *inputs.rope, segments, pages)) {
      scored.q = turned_write(ctx, scored.q, scored.k, v, *inputs.rope, segments, pages);
      pages.written = true;
    } else {
      scored = turned(ctx, scored, inputs);
    }
    Tensor y = attention(ctx, scored.q, scored.k, v, segments, config(),
                         inputs.state == nullptr ? nullptr : &pages);
    if (gate_) {
      y = sigmoid_gate(ctx, rows.slice(2, head_dim_, head_dim_), y);
    }
    return y.merge_last();
  }

  Scored scored(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    return turned(ctx, rows_of_heads(ctx, x).scored, inputs);
  }

  AttentionConfig config() const override {
    return {scale_, window_, sinks_, softcap_, sink_logits_.tensor};
  }

  int64_t head_count() const override { return heads_; }

  StateLayout state_layout() const override {
    return {.pages = {{"keys", {kv_heads_, head_dim_}}, {"values", {kv_heads_, head_dim_}}},
            .slots = {},
            .window = window_,
            .sinks = sinks_};
  }

  void visit(const ParameterVisitor& visitor) override {
    q_.visit("q_proj", visitor);
    k_.visit("k_proj", visitor);
    v_.visit("v_proj", visitor);
    out_.visit("o_proj", visitor);
    q_norm_.visit("q_norm", visitor);
    k_norm_.visit("k_norm", visitor);
    if (!sink_logits_.shape.empty()) {
      visitor("sinks", sink_logits_);
    }
    for (Parameter* factors : {&q_factors_, &k_factors_}) {
      if (!factors->shape.empty()) {
        visitor("temperature", *factors);
      }
    }
  }

 private:
  enum Pages { kKeys, kValues, kKeyScales, kValueScales };  // scales where kept in f8

  struct Projected {
    Tensor rows;    // (T, H, D or 2 D): of a head its query's, then its gate's
    Scored scored;  // not turned yet
    Tensor v;       // (T, Hkv, D)
  };

  Projected rows_of_heads(Context& ctx, const Tensor& x) const {
    auto [queries, keys, values] = forward_each(ctx, x, q_, k_, v_);
    if (norms_width_) {
      queries = q_norm_.forward(ctx, queries);
      keys = k_norm_.forward(ctx, keys);
    }
    const Tensor rows = queries.split_last(heads_, (gate_ ? 2 : 1) * head_dim_);
    Tensor q = gate_ ? rows.slice(2, 0, head_dim_) : rows;
    Tensor k = keys.split_last(kv_heads_, head_dim_);
    if (!norms_width_) {
      q = q_norm_.forward(ctx, q);
      k = k_norm_.forward(ctx, k);
    }
    q = q_factors_.shape.empty() ? q : scale_heads(ctx, q, q_factors_.tensor);
    k = k_factors_.shape.empty() ? k : scale_heads(ctx, k, k_factors_.tensor);
    return {rows, {q, k}, values.split_last(kv_heads_, head_dim_)};
  }

  Scored turned(Context& ctx, const Scored& straight, const UnitInputs& inputs) const {
    if (!rope_) {
      return straight;
    }
    const auto turned = rope(ctx, straight.q, straight.k, *inputs.rope);
    return {turned[0], turned[1]};
  }

  int64_t heads_, kv_heads_, head_dim_, window_, sinks_;
  bool rope_, gate_;
  bool norms_width_ = false;  // the norms of q and k are over all heads
  float softcap_;
  float scale_ = 1.0F;
  Linear q_, k_, v_;
  Norm q_norm_, k_norm_;  // none where qk_norm_eps is 0
  Parameter sink_logits_;
  Parameter q_factors_, k_factors_;  // of heads; none without a temperature
};

}  // namespace

std::unique_ptr<Unit> make_attention(const Options& options, int64_t width) {
  return std::make_unique<AttentionUnit>(options, width, "attention", false);
}

std::unique_ptr<Unit> make_sliding_window(const Options& options, int64_t width) {
  options.size("sliding_window", "window", kMaxPositions);
  if (options.has("kv_rank")) {
    return make_latent_window(options, width);
  }
  return std::make_unique<AttentionUnit>(options, width, "sliding_window", true);
}

}  // namespace cambium
