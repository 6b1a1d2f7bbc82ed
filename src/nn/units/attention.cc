// Softmax attention. With an index (MiniMax-M3) each head of keys has a head of the index beside
// it, by which a token chooses the blocks of keys that the head's queries look at; the index is not
// trained by this, as a choice has no gradient.
#include <cmath>
#include <optional>

#include "base/checked.h"
#include "nn/norm.h"
#include "nn/units/head_mixer.h"
#include "nn/units/indexer.h"
#include "nn/units/units.h"
#include "ops/chosen_attention/chosen_attention.h"
#include "ops/pointwise/pointwise.h"
#include "ops/rope/rope.h"
#include "ops/scale_heads/scale_heads.h"
#include "ops/turned_write/turned_write.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

/// A sink's score where nothing else is known: beside a score of 0 its share is 1/400, which is
/// next to nothing and yet has a gradient.
constexpr double kQuietSink = -6.0;

/// The index: a query for each head of keys and one key a token, normed and turned as attention's.
struct BlockIndex {
  BlockIndex() = default;
  BlockIndex(const Options& options, const char* owner, int64_t width, int64_t kv_heads,
             const std::optional<NormSpec>& norm)
      : heads(options.size_or(owner, "index_heads", 0, kMaxHeads)) {
    if (heads == 0) {
      return;
    }
    expect(heads == kv_heads,
           "{}: expected an index_heads for each of kv_heads={}, whose keys it chooses, got {}",
           owner, kv_heads, heads);
    dim = options.size(owner, "index_dim", kMaxHeadDim);
    selection = read_selection(options, owner, "blocks");
    q = Linear(width, heads * dim, ParameterGroup::kMixer);
    k = Linear(width, dim, ParameterGroup::kMixer);
    if (norm) {
      q_norm = Norm(*norm, dim);
      k_norm = Norm(*norm, dim);
    }
  }

  void visit(const ParameterVisitor& visitor) {
    if (heads > 0) {
      q.visit("indexer.q_proj", visitor);
      k.visit("indexer.k_proj", visitor);
      q_norm.visit("indexer.q_norm", visitor);
      k_norm.visit("indexer.k_norm", visitor);
    }
  }

  int64_t heads = 0, dim = 0;  // no heads: no index
  Selection selection;
  Linear q, k;
  Norm q_norm, k_norm;
};

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
    } else {
      known.insert(known.end(), {"index_heads", "index_dim"});
      known.insert(known.end(), selection_options().begin(), selection_options().end());
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
    reads_ = {&q_, &k_, &v_};
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
    std::optional<NormSpec> index_norm;
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
      index_norm = norm;
    }
    if (!sliding) {
      index_ = BlockIndex(options, owner, width, kv_heads_, index_norm);
    }
    expect(index_.heads == 0 || (window_ == 0 && softcap_ == 0.0F && sink_logits_.shape.empty()),
           "{}: expected no window, softcap or sink_logits beside an index, which chooses what is "
           "looked at",
           owner);
  }

  Tensor heads(Context& ctx, const Tensor& x, std::span<const Tensor> read,
               const UnitInputs& inputs) override {
    const Segments segments = inputs.segments();
    const auto [rows, straight, v] = rows_of_heads(ctx, read);
    KvPages pages;
    if (inputs.state != nullptr) {
      pages = {inputs.page(kKeys), inputs.page(kValues), inputs.state->table,
               inputs.state->pages_per_segment};
      pages.key_scales = scales(inputs, kKeys);
      pages.value_scales = scales(inputs, kValues);
    }
    const ChosenTokens chosen = choose(ctx, x, inputs);
    Scored scored = straight;
    if (rope_ && inputs.state != nullptr &&
        turned_write_serves(ctx, scored.k, *inputs.rope, segments, pages)) {
      scored.q = turned_write(ctx, scored.q, scored.k, v, *inputs.rope, segments, pages);
      pages.written = true;
    } else {
      scored = turned(ctx, scored, inputs);
    }
    const KvPages* past = inputs.state == nullptr ? nullptr : &pages;
    Tensor y;
    if (!chosen.defined()) {
      y = attention(ctx, scored.q, scored.k, v, segments, config(), past);
    } else if (past != nullptr && (ctx.batch_invariant || ctx.device().kind == Device::kCpu)) {
      y = attend_apart(ctx, scored, v, segments, chosen, pages);
    } else {
      y = chosen_attention(ctx, scored.q, scored.k, v, segments, scale_, chosen, past);
    }
    if (gate_) {
      y = sigmoid_gate(ctx, rows.slice(2, head_dim_, head_dim_), y);
    }
    return y.merge_last();
  }

  Scored scored(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    return turned(ctx, rows_of_heads(ctx, forward_all(ctx, x, reads())).scored, inputs);
  }

  AttentionConfig config() const override {
    return {scale_, window_, sinks_, softcap_, sink_logits_.tensor};
  }

  int64_t head_count() const override { return heads_; }

  IndexShape index() const override { return {index_.heads, index_.dim, index_.selection, true}; }

  StateLayout state_layout() const override {
    StateLayout layout{
        .pages = {{"keys", {kv_heads_, head_dim_}}, {"values", {kv_heads_, head_dim_}}},
        .slots = {},
        .window = window_,
        .sinks = sinks_};
    if (index_.heads > 0) {
      layout.pages.push_back({"index_key", {1, index_.dim}});
    }
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    q_.visit("q_proj", visitor);
    k_.visit("k_proj", visitor);
    v_.visit("v_proj", visitor);
    out_.visit("o_proj", visitor);
    q_norm_.visit("q_norm", visitor);
    k_norm_.visit("k_norm", visitor);
    index_.visit(visitor);
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
  enum Pages { kKeys, kValues, kIndexKey };  // after them their scales where kept in f8

  struct Projected {
    Tensor rows;    // (T, H, D or 2 D): of a head its query's, then its gate's
    Scored scored;  // not turned yet
    Tensor v;       // (T, Hkv, D)
  };

  /// Where the scales of a part are, or nothing.
  Tensor scales(const UnitInputs& inputs, Pages part) const {
    const int64_t parts = index_.heads > 0 ? 3 : 2;
    return inputs.page(part).dtype == Dtype::kF8E4M3 ? inputs.page(parts + part) : Tensor{};
  }

  /// Nothing where there is no index, or no token has more behind it than it may look at. The keys
  /// of the index go to their pages either way.
  ChosenTokens choose(Context& ctx, const Tensor& x, const UnitInputs& inputs) const {
    if (index_.heads == 0 || (inputs.state == nullptr && looks_at_all(inputs, index_.selection))) {
      return {};
    }
    Context untaped = ctx;
    untaped.tape = nullptr;
    const auto [queries, keys] = forward_each(untaped, x.detached(), index_.q, index_.k);
    Scored scored{index_.q_norm.forward(untaped, queries.split_last(index_.heads, index_.dim)),
                  index_.k_norm.forward(untaped, keys.split_last(1, index_.dim))};
    scored = turned(untaped, scored, inputs);
    return choose_by_index(untaped, scored.q, scored.k, {}, inputs, index_.selection,
                           inputs.page(kIndexKey),
                           inputs.state == nullptr ? Tensor{} : scales(inputs, kIndexKey));
  }

  /// Tokens that look at all before them by attention, the others by what they chose: what a token
  /// gives does not depend on how its sequence is cut, nor on those beside it.
  Tensor attend_apart(Context& ctx, const Scored& scored, const Tensor& v, const Segments& segments,
                      const ChosenTokens& chosen, KvPages pages) const {
    if (!pages.written) {
      write_keys(ctx, scored.k, v, segments, pages);
      pages.written = true;
    }
    const std::vector<AttendingRun> runs = attending_runs(segments, index_.selection);
    if (runs.size() == 1) {
      return chosen_attention(ctx, scored.q, scored.k, v, segments, scale_, chosen, &pages);
    }
    const Tensor y = ctx.result(v.dtype, {segments.tokens(), heads_, v.dim(2)}, false);
    for (const AttendingRun& run : runs) {
      const auto rows = [&](const Tensor& t) { return t.slice(0, run.token, run.start.back()); };
      const auto each = static_cast<size_t>(pages.pages_per_segment);
      KvPages own = pages;
      own.table =
          pages.table.subspan(static_cast<size_t>(run.segment) * each, run.position.size() * each);
      ChosenTokens of_run = chosen;
      of_run.pieces += run.token * chosen.lists * chosen.budget;
      copy(rows(y), run.all ? attention(ctx, rows(scored.q), rows(scored.k), rows(v),
                                        run.segments(), config(), &own)
                            : chosen_attention(ctx, rows(scored.q), rows(scored.k), rows(v),
                                               run.segments(), scale_, of_run, &own));
    }
    return y;
  }

  Projected rows_of_heads(Context& ctx, std::span<const Tensor> read) const {
    Tensor queries = read[0];
    Tensor keys = read[1];
    const Tensor& values = read[2];
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
  BlockIndex index_;
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
