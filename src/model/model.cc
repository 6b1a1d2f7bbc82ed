#include "model/model.h"

#include <algorithm>

#include "base/random.h"
#include "base/signals.h"
#include "base/text.h"
#include "ops/activation/activation.h"
#include "ops/embedding/embedding.h"
#include "ops/matmul/matmul.h"
#include "ops/pointwise/pointwise.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

Tensor scaled(Context& ctx, float scale, const Tensor& x) {
  return scale == 1.0F ? x : add_scaled(ctx, scale, x, 0.0F, x);
}

}  // namespace

Model::Model(ModelSpec spec) : spec_(std::move(spec)) {
  const double scale = 0.02;
  embed_ = {.shape = {spec_.vocab, spec_.width},
            .group = ParameterGroup::kEmbedding,
            .init = {InitKind::kNormal, scale}};
  norm_ = Norm(spec_.norm, spec_.width);
  if (!spec_.tied_head) {
    head_ = embed_;
  }
  layers_.reserve(spec_.layers.size());
  for (const LayerSpec& layer : spec_.layers) {
    layers_.emplace_back(layer, spec_.width);
  }
  ropes_.emplace_back(spec_.rope);
  for (const RopeConfig& rope : spec_.more_ropes) {
    ropes_.emplace_back(rope);
  }
  for (const LayerSpec& layer : spec_.layers) {
    expect(layer.rope >= 0 && static_cast<size_t>(layer.rope) < ropes_.size(),
           "expected a layer's rope below {}, the number of the model's, got {}", ropes_.size(),
           layer.rope);
  }
  note_states();
}

void Model::note_states() {
  first_state_.clear();
  state_layouts_.clear();
  for (const Layer& layer : layers_) {
    first_state_.push_back(state_layouts_.size());
    state_layouts_.insert(state_layouts_.end(), layer.state_layouts().begin(),
                          layer.state_layouts().end());
  }
}

void Model::activate(std::span<const int> active) {
  CAMBIUM_CHECK(active.size() == layers_.size(), "{} of {}", active.size(), layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    BranchSpec* choice = spec_.layers[i].choice();
    CAMBIUM_CHECK((choice == nullptr) == (active[i] < 0), "layer {}", i);
    if (choice != nullptr && choice->active != active[i]) {
      choice->active = active[i];
      layers_[i].activate(active[i]);
    }
  }
  note_states();
}

void Model::expect_runs() const {
  std::vector<std::string> missing;
  const auto add = [&](const std::string& what) {
    if (!what.empty() && std::find(missing.begin(), missing.end(), what) == missing.end()) {
      missing.push_back(what);
    }
  };
  for (const Layer& layer : layers_) {
    for (const std::string& what : layer.missing()) {
      add(what);
    }
  }
  expect(missing.empty(),
         "this build cannot run this {} model, only describe it: {} {} not built yet", spec_.family,
         join(missing, ", "), missing.size() == 1 ? "is" : "are");
}

uint64_t layer_noise(uint64_t noise, int64_t layer) {
  return noise == 0 ? 0 : mix_seed(noise, static_cast<uint64_t>(layer));
}

LayerInputs Model::layer_inputs(size_t layer, const Batch& batch,
                                const std::vector<const Turns*>& turns,
                                const ForwardOptions& options) const {
  const size_t count = layers_[layer].state_layouts().size();
  const std::span<const UnitState>& states = options.states;
  return {.batch = &batch,
          .rope = turns[static_cast<size_t>(spec_.layers[layer].rope)],
          .states = states.empty() ? states : states.subspan(first_state_[layer], count),
          .noise = layer_noise(options.noise, static_cast<int64_t>(layer)),
          .router = options.routers.empty() ? nullptr : &options.routers[layer]};
}

const Turns* Model::turns_of(const Context& ctx, const Batch& batch, RopeTable& rope) const {
  rope.ensure(batch.positions_end());
  return new (ctx.host_arena().allocate(sizeof(Turns)))
      Turns(rope.turns(ctx, batch.segments(), batch.lengths()));
}

const Turns* Model::rope_for(const Context& ctx, const Batch& batch, int64_t layer) {
  return turns_of(ctx, batch,
                  ropes_[static_cast<size_t>(spec_.layers[static_cast<size_t>(layer)].rope)]);
}

Tensor Model::forward(Context& ctx, const Batch& batch, const ForwardOptions& options) {
  CAMBIUM_CHECK(options.states.empty() || options.states.size() == state_layouts_.size());
  CAMBIUM_CHECK(options.taps.empty() || options.taps.size() == layers_.size());
  CAMBIUM_CHECK(options.routers.empty() || options.routers.size() == layers_.size());
  std::vector<const Turns*> turns;
  for (RopeTable& rope : ropes_) {
    turns.push_back(turns_of(ctx, batch, rope));
  }
  const bool whole = options.end_layer < 0;
  const size_t end = whole ? layers_.size() : static_cast<size_t>(options.end_layer);
  CAMBIUM_CHECK(end <= layers_.size() && options.first_layer >= 0);
  CAMBIUM_CHECK(ctx.tape == nullptr || (whole && !options.start.defined()));
  CAMBIUM_CHECK(options.start.defined() || options.first_layer == 0);
  Tensor h = options.start.defined()
                 ? options.start
                 : scaled(ctx, spec_.embedding_scale,
                          embedding(ctx, embed_.tensor, batch.tokens(), options.newest));
  const auto first = static_cast<size_t>(options.first_layer);
  const auto inputs = [&](size_t layer) { return layer_inputs(layer, batch, turns, options); };
  const auto tap = [&](size_t layer) {
    return options.taps.empty() ? nullptr : &options.taps[layer];
  };
  if (ctx.tape != nullptr) {
    // What is tapped is given its gradient before the backward pass begins.
    GradientPool gradients;
    Context layered = ctx;
    layered.gradients = options.taps.empty() ? &gradients : nullptr;
    for (size_t i = first; i < end; ++i) {
      const Tensor result = options.checkpoint_layers
                                ? checkpointed_layer(layered, i, h, inputs(i), tap(i))
                                : layers_[i].forward(layered, h, inputs(i), tap(i));
      if (result.grad_memory != h.grad_memory) {
        gradients.next_layer();
      }
      h = result;
    }
    return scaled(ctx, spec_.logit_scale, norm_.forward(ctx, h));
  }
  Residual residual = Residual::stream(ctx, h);
  for (size_t i = first; i < end; ++i) {
    stop_point();
    infer_layer(ctx, i, residual, h, inputs(i), tap(i), next_norm(i + 1, end, whole));
  }
  return whole ? scaled(ctx, spec_.logit_scale, residual.normed(ctx, norm_)) : residual.value(ctx);
}

// A layer's activations go as soon as its result is in the stream. `next`: the norm that reads the
// stream next; null where the stream itself is the result. `like` has the activations' shape and
// type.
void Model::infer_layer(Context& ctx, size_t layer, Residual& residual, const Tensor& like,
                        const LayerInputs& inputs, MixerTap* tap, const Norm* next) const {
  MixerTap kept;
  if (tap != nullptr) {
    kept = {ctx.result_like(like, false), ctx.result_like(like, false)};
  }
  const ArenaScope scope(*ctx.arena);
  MixerTap inside;
  layers_[layer].forward(ctx, residual, inputs, tap == nullptr ? nullptr : &inside);
  if (tap != nullptr && inside.input.defined()) {
    copy(kept.input, inside.input);
    copy(kept.output, inside.output);
    *tap = kept;
  }
  residual.settle(ctx, next);
}

// That of the layers from `layer` up to `end`, or after them.
const Norm* Model::next_norm(size_t layer, size_t end, bool whole) const {
  for (size_t i = layer; i < end; ++i) {
    if (const Norm* norm = layers_[i].first_norm(); norm != nullptr) {
      return norm;
    }
  }
  return whole ? &norm_ : nullptr;
}

// Forward without a tape, keeping the result only; backward runs the layer again with a tape of its
// own. A tapped layer is kept whole: its caller puts a gradient on the tapped output.
Tensor Model::checkpointed_layer(Context& ctx, size_t layer, const Tensor& h,
                                 const LayerInputs& inputs, MixerTap* tap) {
  Layer& made = layers_[layer];
  if (tap != nullptr || made.passes()) {
    return made.forward(ctx, h, inputs, tap);
  }
  const Tensor result = ctx.result_like(h, true);
  {
    const ArenaScope scope(*ctx.arena);
    Context plain = ctx;
    plain.tape = nullptr;
    copy(result, made.forward(plain, h.detached(), inputs, nullptr));
  }
  ctx.record({result}, [&made, h, inputs, result](const Context& c) {
    Tape tape(c.host_arena());
    Context again = c;
    again.tape = &tape;
    LayerInputs unread = inputs;
    unread.unread = true;
    const Tensor y = made.forward(again, h, unread, nullptr);
    if (!y.has_grad()) {
      return;  // nothing in or below this layer is trained
    }
    const bool first = y.takes_grad();
    CAMBIUM_CHECK(first, "{}", y);
    copy(y.grad_tensor(), result.grad_tensor());
    tape.backward(again);
  });
  return result;
}

Tensor Model::logits(const Context& ctx, const Tensor& hidden) const {
  const Tensor out = ctx.result(hidden.dtype, {hidden.dim(0), spec_.vocab}, false);
  matmul_into(ctx, out, hidden, head());
  if (spec_.logit_cap > 0.0F) {
    soft_cap(ctx, out, spec_.logit_cap);
  }
  return out;
}

void Model::visit_layer(int64_t layer, const ParameterVisitor& visitor) {
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  layers_[static_cast<size_t>(layer)].visit(
      [&](const std::string& name, Parameter& p) { visitor(prefix + name, p); });
}

void Model::visit(const ParameterVisitor& visitor) {
  visitor("embed.weight", embed_);
  for (int64_t i = 0; i < layer_count(); ++i) {
    visit_layer(i, visitor);
  }
  norm_.visit("norm", visitor);
  if (!spec_.tied_head) {
    visitor("head.weight", head_);
  }
}

int64_t Model::parameter_count() {
  int64_t n = 0;
  visit([&](const std::string&, Parameter& p) { n += p.numel(); });
  return n;
}

}  // namespace cambium
