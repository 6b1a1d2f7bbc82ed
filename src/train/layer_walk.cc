#include "train/layer_walk.h"

#include "base/error.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

void keep(OwnedTensor& to, const Tensor& from) {
  if (!to.view.defined()) {
    to = OwnedTensor(from.dtype, {from.dim(0), from.dim(1)}, false, from.device);
  }
  copy(to.view, from);
}

}  // namespace

LayerWalk::LayerWalk(const HeldOut& held_out, Model& base, Model* teacher, int64_t bytes)
    : held_out_(held_out),
      base_(base),
      teacher_(teacher),
      bytes_(bytes),
      workspace_(base.device()) {}

int64_t LayerWalk::load(int64_t first, int64_t limit) {
  loaded_.clear();
  layer_ = 0;
  Context ctx = context_for(base_, workspace_);
  int64_t used = 0;
  int64_t at = first;
  for (; at < limit; ++at) {
    const PackedSequence& group = held_out_.groups()[static_cast<size_t>(at)];
    const int64_t width = base_.spec().width + (teacher_ == nullptr ? 0 : teacher_->spec().width);
    const int64_t bytes = group.batch.size() * width * int64_t{sizeof(float)};
    if (at > first && used + bytes > bytes_) {
      break;
    }
    used += bytes;
    const WorkspaceScope scope(workspace_);
    Loaded loaded{&group, {}, {}};
    keep(loaded.hidden, base_.forward(ctx, group.batch, {.end_layer = 0}));
    if (teacher_ != nullptr) {
      keep(loaded.taught, teacher_->forward(ctx, group.batch));
    }
    loaded_.push_back(std::move(loaded));
  }
  return at;
}

void LayerWalk::advance(int64_t layer) {
  CAMBIUM_CHECK(layer >= layer_ && layer <= base_.layer_count());
  Context ctx = context_for(base_, workspace_);
  for (Loaded& l : loaded_) {
    const WorkspaceScope scope(workspace_);
    keep(l.hidden,
         base_.forward(ctx, l.group->batch,
                       {.start = l.hidden.view, .first_layer = layer_, .end_layer = layer}));
  }
  layer_ = layer;
}

void LayerWalk::pass(
    const std::function<void(const PackedSequence& group, const MixerTap& tap)>& see) {
  CAMBIUM_CHECK(layer_ < base_.layer_count());
  Context ctx = context_for(base_, workspace_);
  std::vector<MixerTap> taps(static_cast<size_t>(base_.layer_count()));
  for (Loaded& l : loaded_) {
    const WorkspaceScope scope(workspace_);
    ForwardOptions options{
        .taps = taps, .start = l.hidden.view, .first_layer = layer_, .end_layer = layer_ + 1};
    keep(l.hidden, base_.forward(ctx, l.group->batch, options));
    see(*l.group, taps[static_cast<size_t>(layer_)]);
  }
  ++layer_;
}

std::vector<LossSums> LayerWalk::measure(Model& model) {
  std::vector<LossSums> sums;
  Context ctx = context_for(base_, workspace_);
  for (const Loaded& l : loaded_) {
    const WorkspaceScope scope(workspace_);
    const Tensor hidden =
        model.forward(ctx, l.group->batch, {.start = l.hidden.view, .first_layer = layer_});
    HeldOut::add_sums(ctx, *l.group, model, hidden, teacher_, l.taught.view, sums);
  }
  return sums;
}

}  // namespace cambium
