// Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): keys and values of all heads
// come from one latent a token, beside one rotated key that all heads share:
//
//   c = rms_norm(kv_a x)    k[h] = [kv_b_k[h] c, rope(k_r x)]    v[h] = kv_b_v[h] c
//
// Where tokens are not cached, keys and values are expanded and attention is the plain one. A cache
// keeps the latent and the shared key; queries then go through kv_b_k and results through kv_b_v,
// and no key is expanded, but those of prompts that begin in the call. With an index
// (DeepSeek-V3.2) a token attends to the index_top tokens, blocks or pools of tokens that its index
// scores highest; the index is not trained by this, as a choice has no gradient. With a window it
// is a sliding_window, and on cached latents its tokens are a choice too.
#include "ops/latent_attention/latent_attention.h"

#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "nn/norm.h"
#include "nn/units/head_mixer.h"
#include "nn/units/indexer.h"
#include "nn/units/units.h"
#include "ops/head_matmul/head_matmul.h"
#include "ops/join_heads/join_heads.h"
#include "ops/pointwise/pointwise.h"
#include "ops/rope/rope.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

constexpr const char* kName = "latent_attention";
constexpr const char* kWindow = "sliding_window";
constexpr auto kGroup = ParameterGroup::kMixer;
/// Of the index's layer norm, in every published model.
constexpr float kIndexEps = 1e-6F;

/// The index: queries of its own from the query's latent, one key a token, weights of its heads.
struct Indexer {
  Indexer() = default;
  Indexer(const Options& options, int64_t width, int64_t q_rank, int64_t rope_dim)
      : heads(options.size_or(kName, "index_heads", 0, kMaxHeads)) {
    if (heads == 0) {
      return;
    }
    dim = options.size(kName, "index_dim", kMaxHeadDim);
    selection = read_selection(options, kName, "tokens");
    interleaved = options.flag(kName, "index_interleaved", false);
    expect(q_rank > 0, "latent_attention: the index of keys reads the query's latent; give q_rank");
    expect(dim >= rope_dim, "latent_attention: expected index_dim of at least rope_dim={}, got {}",
           rope_dim, dim);
    q = Linear(q_rank, heads * dim, kGroup);
    k = Linear(width, dim, kGroup);
    k_norm = Norm({NormKind::kLayer, kIndexEps}, dim);
    weights = Linear(width, heads, kGroup);
  }

  void visit(const ParameterVisitor& visitor) {
    if (heads > 0) {
      q.visit("indexer.q_proj", visitor);
      k.visit("indexer.k_proj", visitor);
      k_norm.visit("indexer.k_norm", visitor);
      weights.visit("indexer.weights_proj", visitor);
    }
  }

  int64_t heads = 0, dim = 0;
  Selection selection;
  bool interleaved = false;  // the pairs of its rotation, which turns its first dims
  Linear q, k, weights;
  Norm k_norm;
};

class LatentAttentionUnit : public ScoredMixer {
 public:
  LatentAttentionUnit(const Options& options, int64_t width, const char* owner, bool sliding)
      : heads_(options.size(owner, "heads", kMaxHeads)),
        q_rank_(options.size_or(owner, "q_rank", 0, kMaxWidth)),
        rank_(options.size(owner, "kv_rank", kMaxWidth)),
        nope_(options.size(owner, "nope_dim", kMaxHeadDim)),
        rope_dim_(options.size(owner, "rope_dim", kMaxHeadDim)),
        value_(options.size(owner, "value_dim", kMaxHeadDim)),
        rope_(options.flag(owner, "rope", true)),
        gate_(options.flag(owner, "gate", false)) {
    std::vector<std::string> known = {"heads",     "q_rank", "kv_rank", "nope_dim", "rope_dim",
                                      "value_dim", "rope",   "scale",   "norm_eps", "gate"};
    const auto more =
        sliding ? std::vector<std::string>{"window", "sinks"}
                : std::vector<std::string>{"index_heads", "index_dim", "index_interleaved"};
    known.insert(known.end(), more.begin(), more.end());
    if (!sliding) {
      known.insert(known.end(), selection_options().begin(), selection_options().end());
    }
    options.expect_only(owner, known);
    if (sliding) {
      window_ = options.size(owner, "window", kMaxPositions);
      sinks_ = options.size_or(owner, "sinks", 0, kMaxPositions);
    } else {
      index_ = Indexer(options, width, q_rank_, rope_dim_);
    }
    expect(!rope_ || rope_dim_ % 2 == 0, "{}: expected an even rope_dim, got {}", owner, rope_dim_);
    expect(rank_ + rope_dim_ <= kMaxLatent,
           "{}: expected kv_rank and rope_dim of at most {} together, got {} and {}", owner,
           kMaxLatent, rank_, rope_dim_);
    expect(nope_ + rope_dim_ <= kMaxHeadDim,
           "{}: expected nope_dim and rope_dim of at most {} together, got {} and {}", owner,
           kMaxHeadDim, nope_, rope_dim_);
    const double scale =
        options.real(owner, "scale", 1.0 / std::sqrt(static_cast<double>(nope_ + rope_dim_)));
    scale_ = static_cast<float>(in_range(owner, "scale", scale, 0.0, 1e6));
    const auto eps = static_cast<float>(
        in_range(owner, "norm_eps", options.real(owner, "norm_eps", 1e-6), 0.0, 1.0));
    const int64_t rows = heads_ * (nope_ + rope_dim_);
    if (q_rank_ > 0) {
      q_a_ = Linear(width, q_rank_, kGroup);
      q_norm_ = Norm({NormKind::kRms, eps}, q_rank_);
    }
    q_ = Linear(q_rank_ > 0 ? q_rank_ : width, rows, kGroup);
    kv_a_ = Linear(width, rank_ + rope_dim_, kGroup);
    kv_norm_ = Norm({NormKind::kRms, eps}, rank_);
    kv_b_ = Linear(rank_, heads_ * (nope_ + value_), kGroup);
    reads_ = {q_rank_ > 0 ? &q_a_ : &q_, &kv_a_};
    if (gate_) {
      gate_proj_ = Linear(width, heads_, kGroup);
      reads_.push_back(&gate_proj_);
    }
    out_ = Linear(heads_ * value_, width, kGroup);
  }

  Tensor heads(Context& ctx, const Tensor& x, std::span<const Tensor> read,
               const UnitInputs& inputs) override {
    const Segments segments = inputs.segments();
    const Projected rows = rows_of_heads(ctx, read, inputs);
    ChosenTokens chosen = choose(ctx, x, rows.low, inputs);
    Tensor y;
    if (inputs.state == nullptr) {
      y = chosen.defined() ? on_latents(ctx, rows, segments, chosen, nullptr)
                           : expanded(ctx, rows, segments);
    } else {
      const LatentPages pages = latent_pages(inputs);
      write_latents(ctx, rows.latent, rows.key.merge_last(), segments, pages);
      y = chosen.defined() ? on_latents(ctx, rows, segments, chosen, &pages)
                           : cached(ctx, rows, segments, pages);
    }
    y = y.merge_last();
    if (!gate_) {
      return y;
    }
    const Tensor gates = read[2].split_last(heads_, 1);
    return sigmoid_gate(ctx, repeat_heads(ctx, gates, value_).merge_last(), y);
  }

  Scored scored(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const Projected rows = rows_of_heads(ctx, forward_all(ctx, x, reads()), inputs);
    return expanded_scored(ctx, rows, expand(ctx, rows));
  }

  AttentionConfig config() const override {
    return {.scale = scale_, .window = window_, .sinks = sinks_};
  }

  int64_t head_count() const override { return heads_; }

  IndexShape index() const override { return {index_.heads, index_.dim, index_.selection, false}; }

  StateLayout state_layout() const override {
    const int64_t pieces = cambium::latent_pieces(rank_);
    StateLayout layout;
    layout.pages = {{"latent", {pieces, rank_ / pieces}}, {"rope_key", {1, rope_dim_}}};
    if (index_.heads > 0) {
      layout.pages.push_back({"index_key", {1, index_.dim}});
    }
    layout.window = window_;
    layout.sinks = sinks_;
    return layout;
  }

  void visit(const ParameterVisitor& visitor) override {
    if (q_rank_ > 0) {
      q_a_.visit("q_a_proj", visitor);
      q_norm_.visit("q_a_norm", visitor);
      q_.visit("q_b_proj", visitor);
    } else {
      q_.visit("q_proj", visitor);
    }
    kv_a_.visit("kv_a_proj", visitor);
    kv_norm_.visit("kv_a_norm", visitor);
    kv_b_.visit("kv_b_proj", visitor);
    index_.visit(visitor);
    if (gate_) {
      gate_proj_.visit("gate_proj", visitor);
    }
    out_.visit("o_proj", visitor);
  }

 private:
  enum Pages { kLatent, kRopeKey, kIndexKey };  // after them their scales where kept in f8

  /// What a call's tokens are projected to.
  struct Projected {
    Tensor low;     // (T, q_rank): the query's latent, where it has one
    Tensor q;       // (T, H, N + P), its last P not rotated
    Tensor turned;  // (T, H, P): these rotated
    Tensor latent;  // (T, R)
    Tensor key;     // (T, 1, P)
  };

  Projected rows_of_heads(Context& ctx, std::span<const Tensor> read,
                          const UnitInputs& inputs) const {
    Projected rows;
    const Tensor& both = read[1];
    if (q_rank_ > 0) {
      rows.low = q_norm_.forward(ctx, read[0]);
      rows.q = q_.forward(ctx, rows.low);
    } else {
      rows.q = read[0];
    }
    rows.q = rows.q.split_last(heads_, nope_ + rope_dim_);
    rows.turned = rows.q.slice(2, nope_, rope_dim_);
    rows.latent = kv_norm_.forward(ctx, both.slice(1, 0, rank_));
    rows.key = both.slice(1, rank_, rope_dim_).split_last(1, rope_dim_);
    if (rope_) {
      const auto turned = rope(ctx, rows.turned, rows.key, *inputs.rope);
      rows.turned = turned[0];
      rows.key = turned[1];
    }
    return rows;
  }

  int64_t parts() const { return index_.heads > 0 ? 3 : 2; }
  /// Where the scales of a part are, or nothing.
  Tensor scales(const UnitInputs& inputs, Pages part) const {
    return inputs.page(part).dtype == Dtype::kF8E4M3 ? inputs.page(parts() + part) : Tensor{};
  }
  LatentPages latent_pages(const UnitInputs& inputs) const {
    return {inputs.page(kLatent),
            inputs.page(kRopeKey),
            inputs.state->table,
            inputs.state->pages_per_segment,
            scales(inputs, kLatent),
            scales(inputs, kRopeKey),
            window_,
            sinks_};
  }

  /// Nothing where there is no index, or no token has more behind it than it may look at. The keys
  /// of the index go to their pages either way.
  ChosenTokens choose(Context& ctx, const Tensor& x, const Tensor& low,
                      const UnitInputs& inputs) const {
    if (index_.heads == 0 || (inputs.state == nullptr && looks_at_all(inputs, index_.selection))) {
      return {};
    }
    Context untaped = ctx;
    untaped.tape = nullptr;
    const auto [keys, weights] = forward_each(untaped, x.detached(), index_.k, index_.weights);
    Tensor k = index_.k_norm.forward(untaped, keys).split_last(1, index_.dim);
    Tensor q = index_.q.forward(untaped, low.detached()).split_last(index_.heads, index_.dim);
    if (rope_) {
      Turns turns = *inputs.rope;
      turns.interleaved = index_.interleaved;
      const auto turned = rope(untaped, q, k, turns);
      q = turned[0];
      k = turned[1];
    }
    return choose_by_index(untaped, q, k, weights, inputs, index_.selection, inputs.page(kIndexKey),
                           inputs.state == nullptr ? Tensor{} : scales(inputs, kIndexKey));
  }

  /// (T, H, N + V): keys without their rotated dims, and values.
  Tensor expand(Context& ctx, const Projected& rows) const {
    return kv_b_.forward(ctx, rows.latent).split_last(heads_, nope_ + value_);
  }
  Scored expanded_scored(Context& ctx, const Projected& rows, const Tensor& kv) const {
    return {rope_ ? join_heads(ctx, rows.q.slice(2, 0, nope_), rows.turned) : rows.q,
            join_heads(ctx, kv.slice(2, 0, nope_), rows.key)};
  }

  /// Attention of queries to keys of their own.
  Tensor expanded(Context& ctx, const Projected& rows, const Segments& segments) const {
    const Tensor kv = expand(ctx, rows);
    const auto [q, k] = expanded_scored(ctx, rows, kv);
    return attention(ctx, q, k, kv.slice(2, nope_, value_), segments, config());
  }

  /// The same on the latents.
  Tensor on_latents(Context& ctx, const Projected& rows, const Segments& segments,
                    const ChosenTokens& chosen, const LatentPages* pages) const {
    const Tensor weight = kv_b_.weight.tensor.reshape({heads_, nope_ + value_, rank_});
    const Tensor q =
        head_matmul_transposed(ctx, rows.q.slice(2, 0, nope_), weight.slice(1, 0, nope_));
    const Tensor y = latent_attention(ctx, join_heads(ctx, q, rows.turned), rows.latent,
                                      rows.key.merge_last(), segments, scale_, chosen, pages);
    return head_matmul(ctx, y, weight.slice(1, nope_, value_));
  }

  /// On pages, which have the call's latents: segments of one kind after the other. A prompt that
  /// begins here sees nothing of them but the numbers that the call has too, and is expanded.
  Tensor cached(Context& ctx, const Projected& rows, const Segments& segments,
                const LatentPages& pages) const {
    const auto begins = [&](int64_t s) {
      return segments.position[static_cast<size_t>(s)] == 0 && segments.length(s) > 1 &&
             !ctx.batch_invariant && pages.latents.dtype == rows.latent.dtype;
    };
    const auto of_kind = [&](const Projected& own, const Segments& some, const LatentPages& theirs,
                             bool begin) {
      if (begin) {
        return expanded(ctx, own, some);
      }
      const ChosenTokens window =
          window_ > 0 ? choose_window(ctx, some, window_, sinks_) : ChosenTokens{};
      return on_latents(ctx, own, some, window, &theirs);
    };
    Tensor y;
    for (int64_t s = 0, end = 0; s < segments.count(); s = end) {
      for (end = s + 1; end < segments.count() && begins(end) == begins(s);) {
        ++end;
      }
      if (end - s == segments.count()) {
        return of_kind(rows, segments, pages, begins(s));
      }
      const auto first = static_cast<size_t>(s);
      const auto count = static_cast<size_t>(end - s);
      std::vector<int32_t> start(segments.start.begin() + s, segments.start.begin() + end + 1);
      const int32_t token = start[0];
      const int32_t tokens = start[count] - token;
      std::for_each(start.begin(), start.end(), [&](int32_t& t) { t -= token; });
      const auto slice = [&](const Tensor& t) { return t.slice(0, token, tokens); };
      LatentPages theirs = pages;
      theirs.table = pages.table.subspan(first * static_cast<size_t>(pages.pages_per_segment),
                                         count * static_cast<size_t>(pages.pages_per_segment));
      const Tensor part =
          of_kind({{}, slice(rows.q), slice(rows.turned), slice(rows.latent), slice(rows.key)},
                  {start, segments.position.subspan(first, count), {}}, theirs, begins(s));
      if (!y.defined()) {
        y = ctx.result(part.dtype, {segments.tokens(), heads_, value_}, false);
      }
      copy(slice(y), part);
    }
    return y;
  }

  int64_t heads_, q_rank_, rank_, nope_, rope_dim_, value_;
  int64_t window_ = 0, sinks_ = 0;  // 0 = all tokens
  bool rope_, gate_;
  float scale_ = 1.0F;
  Indexer index_;
  Linear q_a_, q_, kv_a_, kv_b_, gate_proj_;
  Norm q_norm_, kv_norm_;
};

}  // namespace

std::unique_ptr<Unit> make_latent_attention(const Options& options, int64_t width) {
  return std::make_unique<LatentAttentionUnit>(options, width, kName, false);
}

std::unique_ptr<Unit> make_latent_window(const Options& options, int64_t width) {
  return std::make_unique<LatentAttentionUnit>(options, width, kWindow, true);
}

}  // namespace cambium
