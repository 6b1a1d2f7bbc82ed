#include "nn/block.h"

#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"

namespace cambium {

Block::Block(const LayerSpec& spec, int64_t width, float norm_eps)
    : removed_(spec.removed), norm_eps_(norm_eps) {
  if (removed_) {
    mixer_ = make_mixer({"identity", {}}, width);
    return;
  }
  mixer_ = make_mixer(spec.mixer, width);
  for (Parameter* norm : {&input_norm_, &post_norm_}) {
    norm->shape = {width};
    norm->group = ParameterGroup::kNorm;
    norm->init = {InitKind::kOnes};
  }
  feed_forward_ = FeedForward(width, spec.ff_inner);
}

Tensor Block::forward(Context& ctx, const Tensor& h, const ForwardInputs& inputs, MixerTap* tap) {
  if (removed_) {
    return h;
  }
  const Tensor x = rms_norm(ctx, h, input_norm_.tensor, norm_eps_);
  const Tensor y = mixer_->forward(ctx, x, inputs);
  if (tap != nullptr) {
    *tap = {x, y};
  }
  const Tensor middle = add(ctx, h, y);
  const Tensor z = rms_norm(ctx, middle, post_norm_.tensor, norm_eps_);
  return add(ctx, middle, feed_forward_.forward(ctx, z));
}

void Block::visit(const ParameterVisitor& visitor) {
  if (removed_) {
    return;
  }
  visitor("input_norm.weight", input_norm_);
  mixer_->visit([&](const std::string& name, Parameter& p) { visitor("mixer." + name, p); });
  visitor("post_norm.weight", post_norm_);
  feed_forward_.visit("feed_forward", visitor);
}

}  // namespace cambium
