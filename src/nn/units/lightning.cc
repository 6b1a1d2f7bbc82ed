// Lightning attention (MiniMax-01, arXiv 2501.08313; Qin et al. 2024, arXiv 2401.04658): linear
// attention whose heads forget at fixed rates,
//
//   S_t = exp(-slope) S_{t-1} + k_t v_t'     y = out_proj(rms_norm(S' q) * sigmoid(gate_proj x))
//
// with q, k and v after SiLU. In place of softmax attention (HypeNet, arXiv 2601.22156) it goes
// without SiLU, keeps the norms of q and k and the rotation, and shares key-value heads.
#include <cmath>

#include "base/checked.h"
#include "nn/norm.h"
#include "nn/units/head_mixer.h"
#include "nn/units/units.h"
#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"
#include "ops/recurrence/recurrence.h"
#include "ops/rope/rope.h"

namespace cambium {
namespace {

constexpr const char* kName = "lightning";

/// The rates of ALiBi (Press et al. 2021, arXiv 2108.12409): powers of 2^(-8 / heads); where the
/// number of heads is no power of two, those of the next smaller one, and between them, unless
/// `geometric`, as transformers' MiniMax has them.
double slope_of(int64_t head, int64_t heads, bool geometric) {
  if (geometric) {
    return std::exp2(-8.0 * static_cast<double>(head + 1) / static_cast<double>(heads));
  }
  int64_t power = 1;
  while (2 * power <= heads) {
    power *= 2;
  }
  const int64_t step = head < power ? 2 * (head + 1) : 2 * (head - power) + 1;
  return std::exp2(-4.0 * static_cast<double>(step) / static_cast<double>(power));
}

class LightningUnit : public HeadMixer {
 public:
  LightningUnit(const Options& options, int64_t width)
      : heads_(options.size(kName, "heads", kMaxHeads)),
        kv_heads_(options.size_or(kName, "kv_heads", heads_, kMaxHeads, 1)),
        head_dim_(options.size(kName, "head_dim", kMaxHeadDim)),
        value_dim_(options.size_or(kName, "value_dim", head_dim_, kMaxHeadDim, 1)),
        silu_(options.flag(kName, "silu", true)),
        rope_(options.flag(kName, "rope", false)),
        by_head_(options.flag(kName, "rows_by_head", false)),
        norm_group_(options.size_or(kName, "norm_group", inner(), kMaxElements, 1)),
        norm_eps_(static_cast<float>(options.real(kName, "norm_eps", 1e-6))) {
    options.expect_only(
        kName, {"heads", "kv_heads", "head_dim", "value_dim", "silu", "rope", "rows_by_head",
                "norm_group", "norm_eps", "qk_norm", "qk_norm_eps", "qkv_bias", "out_bias",
                "layer_of_slopes", "layers", "geometric_slopes"});
    expect(heads_ % kv_heads_ == 0,
           "lightning: expected kv_heads to divide heads, got heads={} kv_heads={}", heads_,
           kv_heads_);
    expect(!rope_ || head_dim_ % 2 == 0, "lightning: expected an even head_dim for rope, got {}",
           head_dim_);
    expect(!by_head_ || (kv_heads_ == heads_ && value_dim_ == head_dim_),
           "lightning: rows_by_head needs as many kv_heads as heads={}, of value_dim={}, got {} of "
           "{}",
           heads_, head_dim_, kv_heads_, value_dim_);
    expect(inner() % norm_group_ == 0,
           "lightning: expected norm_group to divide {} channels, got {}", inner(), norm_group_);
    const int64_t layers = options.size_or(kName, "layers", 0, kMaxLayers);
    const int64_t layer = options.size_or(kName, "layer_of_slopes", 0, kMaxLayers);
    expect(layer == 0 || layer < layers,
           "lightning: expected layer_of_slopes below layers={}, got {}", layers, layer);
    // Later layers forget more slowly; 1e-5 as in the published code.
    const double slower =
        layers == 0
            ? 1.0
            : 1.0 - static_cast<double>(layer) / (static_cast<double>(layers) - 1.0 + 1e-5) + 1e-5;
    const bool geometric = options.flag(kName, "geometric_slopes", false);
    for (int64_t h = 0; h < heads_; ++h) {
      exact_decay_.push_back(-slope_of(h, heads_, geometric) * slower);
      decay_.push_back(static_cast<float>(exact_decay_.back()));
    }
    qkv_ = Linear(
        width,
        {{"q", heads_ * head_dim_}, {"k", kv_heads_ * head_dim_}, {"v", kv_heads_ * value_dim_}},
        ParameterGroup::kMixer, options.flag(kName, "qkv_bias", false));
    gate_ = Linear(width, inner(), ParameterGroup::kMixer);
    reads_ = {&qkv_, &gate_};
    out_ = Linear(inner(), width, ParameterGroup::kMixer, options.flag(kName, "out_bias", false));
    if (const double eps = options.real(kName, "qk_norm_eps", 0.0); eps > 0.0) {
      const NormKind kind = find_norm_kind(options.text(kName, "qk_norm", "rms"));
      q_norm_ = k_norm_ = Norm(
          {kind, static_cast<float>(in_range(kName, "qk_norm_eps", eps, 0.0, 1.0))}, head_dim_);
    }
    norm_ = norm_weight(inner());
  }

  Tensor heads(Context& ctx, const Tensor& x, std::span<const Tensor> read,
               const UnitInputs& inputs) override {
    const Tensor& open = read[1];
    auto [q, k, v] = heads_of(ctx, read[0]);
    q = q_norm_.forward(ctx, q);
    k = k_norm_.forward(ctx, k);
    if (rope_) {
      const auto turned = rope(ctx, q, k, *inputs.rope);
      q = turned[0];
      k = turned[1];
    }
    if (kv_heads_ != heads_) {
      k = repeat_heads(ctx, k, heads_ / kv_heads_);
      v = repeat_heads(ctx, v, heads_ / kv_heads_);
    }
    const Tensor y = recurrence(ctx, {.q = q, .k = k, .v = v, .log_decay = decay_of(ctx, x)},
                                inputs.segments(), inputs.slot(kState));
    const GatedNormConfig norm{norm_eps_, norm_group_, GateOrder::kNormFirst,
                               GateActivation::kSigmoid};
    return gated_rms_norm(ctx, y.merge_last(), open, norm_.tensor, norm);
  }

  int64_t head_count() const override { return heads_; }

  StateLayout state_layout() const override {
    StateLayout layout;
    layout.slots = {{"state", {heads_, head_dim_, value_dim_}}};
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    qkv_.visit("qkv_proj", visitor);
    q_norm_.visit("q_norm", visitor);
    k_norm_.visit("k_norm", visitor);
    gate_.visit("gate_proj", visitor);
    visitor("norm.weight", norm_);
    out_.visit("out_proj", visitor);
  }

 private:
  enum Slots { kState };
  struct Heads {
    Tensor q, k, v;  // (T, H, D), (T, Hkv, D), (T, Hkv, V)
  };

  int64_t inner() const { return heads_ * value_dim_; }

  Heads heads_of(Context& ctx, const Tensor& rows) const {
    if (by_head_) {
      // q, k and v of a head stand together; what SiLU gives lies as the recurrence wants it.
      const Tensor heads = rows.split_last(heads_, 3 * head_dim_);
      const auto one = [&](int64_t i) { return heads.slice(2, i * head_dim_, head_dim_); };
      return {silu(ctx, one(0)), silu(ctx, one(1)), silu(ctx, one(2))};
    }
    const Tensor active = silu_ ? silu(ctx, rows) : rows;
    return {part(active, qkv_.weight, "q").split_last(heads_, head_dim_),
            part(active, qkv_.weight, "k").split_last(kv_heads_, head_dim_),
            part(active, qkv_.weight, "v").split_last(kv_heads_, value_dim_)};
  }

  /// (T, H): one row for all tokens.
  Tensor decay_of(const Context& ctx, const Tensor& x) const {
    const Dtype dtype = sum_dtype(x.dtype);
    const void* row = dtype == Dtype::kF64
                          ? static_cast<const void*>(ctx.to_device(std::span(exact_decay_)))
                          : static_cast<const void*>(ctx.to_device(std::span(decay_)));
    const int64_t shape[] = {x.dim(0), heads_};
    Tensor decay = Tensor::of(dtype, x.device, shape, const_cast<void*>(row));
    decay.stride[0] = 0;
    return decay;
  }

  int64_t heads_, kv_heads_, head_dim_, value_dim_;
  bool silu_, rope_, by_head_;
  int64_t norm_group_;
  float norm_eps_;
  std::vector<double> exact_decay_;  // log decay of each head
  std::vector<float> decay_;
  Linear qkv_, gate_;
  Norm q_norm_, k_norm_;  // per head; none where qk_norm_eps is 0
  Parameter norm_;
};

}  // namespace

std::unique_ptr<Unit> make_lightning(const Options& options, int64_t width) {
  return std::make_unique<LightningUnit>(options, width);
}

}  // namespace cambium
