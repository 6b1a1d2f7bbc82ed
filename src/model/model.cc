#include "model/model.h"

#include <cstring>

#include "ops/embedding/embedding.h"
#include "ops/matmul/matmul.h"
#include "ops/norm/norm.h"

namespace cambium {
namespace {

void copy(const Tensor& to, const Tensor& from) {
  CAMBIUM_CHECK(to.same_shape(from) && to.contiguous() && from.contiguous());
  std::memcpy(to.data, from.data, static_cast<size_t>(from.bytes()));
}

}  // namespace

Model::Model(ModelSpec spec) : spec_(std::move(spec)), rope_(spec_.rope) {
  const double scale = 0.02;
  embed_ = {.shape = {spec_.vocab, spec_.width},
            .group = ParameterGroup::kEmbedding,
            .init = {InitKind::kNormal, scale}};
  norm_ = {.shape = {spec_.width}, .group = ParameterGroup::kNorm, .init = {InitKind::kOnes}};
  if (!spec_.tied_head) {
    head_ = embed_;
  }
  layers_.reserve(spec_.layers.size());
  for (const LayerSpec& layer : spec_.layers) {
    layers_.emplace_back(layer, spec_.width, spec_.norm_eps);
  }
}

const RopeTable& Model::rope_for(const Batch& batch) {
  rope_.ensure(batch.positions_end());
  return rope_;
}

Tensor Model::forward(Context& ctx, const Batch& batch, const ForwardOptions& options) {
  CAMBIUM_CHECK(options.states.empty() || options.states.size() == layers_.size());
  CAMBIUM_CHECK(options.taps.empty() || options.taps.size() == layers_.size());
  const RopeTable& table = rope_for(batch);
  const bool whole = options.end_layer < 0;
  const size_t end = whole ? layers_.size() : static_cast<size_t>(options.end_layer);
  CAMBIUM_CHECK(end <= layers_.size() && options.first_layer >= 0);
  CAMBIUM_CHECK(ctx.tape == nullptr || (whole && !options.start.defined()));
  Tensor h;
  if (options.start.defined()) {
    h = ctx.result_like(options.start, false);
    copy(h, options.start);
  } else {
    CAMBIUM_CHECK(options.first_layer == 0);
    h = embedding(ctx, embed_.tensor, batch.tokens());
  }
  for (auto i = static_cast<size_t>(options.first_layer); i < end; ++i) {
    const ForwardInputs inputs{&batch, &table,
                               options.states.empty() ? nullptr : &options.states[i]};
    MixerTap* tap = options.taps.empty() ? nullptr : &options.taps[i];
    if (ctx.tape == nullptr) {
      // Inference: a layer's activations go as soon as its result is copied over its input.
      MixerTap kept;
      if (tap != nullptr) {
        kept = {ctx.result_like(h, false), ctx.result_like(h, false)};
      }
      const ArenaScope scope(*ctx.arena);
      MixerTap inside;
      const Tensor next = layers_[i].forward(ctx, h, inputs, tap == nullptr ? nullptr : &inside);
      if (next.data != h.data) {
        copy(h, next);
      }
      if (tap != nullptr && inside.input.defined()) {
        copy(kept.input, inside.input);
        copy(kept.output, inside.output);
        *tap = kept;
      }
    } else if (options.checkpoint_layers) {
      h = checkpointed_layer(ctx, i, h, inputs, tap);
    } else {
      h = layers_[i].forward(ctx, h, inputs, tap);
    }
  }
  return whole ? rms_norm(ctx, h, norm_.tensor, spec_.norm_eps) : h;
}

// Forward without a tape, keeping the result only; backward runs the layer again with a tape of its
// own. A tapped layer is kept whole: its caller puts a gradient on the tapped output.
Tensor Model::checkpointed_layer(Context& ctx, size_t layer, const Tensor& h,
                                 const ForwardInputs& inputs, MixerTap* tap) {
  Block& block = layers_[layer];
  if (tap != nullptr || block.removed()) {
    return block.forward(ctx, h, inputs, tap);
  }
  const Tensor result = ctx.result_like(h, true);
  {
    const ArenaScope scope(*ctx.arena);
    Context plain = ctx;
    plain.tape = nullptr;
    copy(result, block.forward(plain, h.detached(), inputs, nullptr));
  }
  ctx.record([&block, h, inputs, result](const Context& c) {
    Tape tape(*c.arena);
    Context again = c;
    again.tape = &tape;
    const Tensor y = block.forward(again, h, inputs, nullptr);
    if (!y.has_grad()) {
      return;  // nothing in or below this layer is trained
    }
    std::memcpy(y.grad, result.grad, static_cast<size_t>(y.bytes()));
    tape.backward(again);
  });
  return result;
}

Tensor Model::logits(const Context& ctx, const Tensor& hidden) const {
  const Tensor out = ctx.result(hidden.dtype, {hidden.dim(0), spec_.vocab}, false);
  matmul_into(ctx, out, hidden, head());
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
  visitor("norm.weight", norm_);
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
