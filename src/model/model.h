// Model: runs a ModelSpec. One forward serves training, prefill, chunked prefill and decode.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "model/spec.h"
#include "nn/batch.h"
#include "nn/router_tap.h"
#include "tensor/workspace.h"

namespace cambium {

struct ForwardOptions {
  /// In the order of Model::state_layouts, when sequences keep state; empty in training.
  std::span<const UnitState> states = {};
  /// Tokens chosen by steps before, I32 on the model's device, for tokens that the batch does not
  /// hold itself.
  Tensor newest = {};
  /// With a tape: keep only each layer's input and run the layer again in the backward pass.
  bool checkpoint_layers = false;
  /// What the layers draw at random is named by; 0 = nothing is drawn (UnitInputs::noise).
  uint64_t noise = 0;
  /// One per layer, filled in; empty = not wanted.
  std::span<MixerTap> taps = {};
  /// With a tape, one per layer: what its router is trained by. They and their memory outlive the
  /// backward steps, in which a layer that is run again fills them. Empty = nothing.
  std::span<RouterTap> routers = {};
  /// Part of the way, without a tape: from the input of `first_layer`, which is `start` (T, C) in
  /// place of the embeddings, to the input of `end_layer`; -1 = to the end and the final norm.
  Tensor start = {};
  int64_t first_layer = 0;
  int64_t end_layer = -1;
};

class Model {
 public:
  /// Parameters have shapes but no memory yet (see weights.h).
  explicit Model(ModelSpec spec);
  /// Makes other units of the choices run: `active` has one for each layer, -1 where it has no
  /// choice. Nothing is loaded or moved; what a sequence has kept of the units before is of no use
  /// to the others.
  void activate(std::span<const int> active);
  /// Error that names every unit, norm or wiring of the spec that this build cannot run; such a
  /// model can be described and counted only.
  void expect_runs() const;

  /// Hidden states after the final norm, times logit_scale: what the head reads.   -> (T, C)
  Tensor forward(Context& ctx, const Batch& batch, const ForwardOptions& options = {});
  /// Logits of hidden rows (R, C) -> (R, V), F32 (F64 for F64 models). No tape.
  Tensor logits(const Context& ctx, const Tensor& hidden) const;
  /// The output head (V, C): the embedding where they are tied.
  const Tensor& head() const { return spec_.tied_head ? embed_.tensor : head_.tensor; }

  /// Visits every parameter once, in a fixed order, by names such as "embed.weight",
  /// "layers.3.mixer.q_proj.weight", "norm.weight", "head.weight".
  void visit(const ParameterVisitor& visitor);
  /// Visits one layer's parameters with their full names.
  void visit_layer(int64_t layer, const ParameterVisitor& visitor);

  const ModelSpec& spec() const { return spec_; }
  Layer& layer(int64_t i) { return layers_[static_cast<size_t>(i)]; }
  const Layer& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  int64_t layer_count() const { return static_cast<int64_t>(layers_.size()); }
  int64_t parameter_count();
  /// Where the weights are, and the type that forward computes activations in there.
  Device device() const { return embed_.tensor.device; }
  Dtype activations() const { return activations_; }
  /// F32, or on a CUDA device BF16.
  void set_activations(Dtype dtype) { activations_ = dtype; }
  /// Of the units that keep state, in order.
  const std::vector<StateLayout>& state_layouts() const { return state_layouts_; }
  /// How the tokens of `batch` turn in a layer, in the arena of `ctx`. Forward does this itself;
  /// callers that run single mixers need it.
  const Turns* rope_for(const Context& ctx, const Batch& batch, int64_t layer);

 private:
  void infer_layer(Context& ctx, size_t layer, Residual& residual, const Tensor& like,
                   const LayerInputs& inputs, MixerTap* tap, const Norm* next) const;
  const Norm* next_norm(size_t layer, size_t end, bool whole) const;
  Tensor checkpointed_layer(Context& ctx, size_t layer, const Tensor& h, const LayerInputs& inputs,
                            MixerTap* tap);

  void note_states();

  ModelSpec spec_;
  LayerInputs layer_inputs(size_t layer, const Batch& batch, const std::vector<const Turns*>& turns,
                           const ForwardOptions& options) const;
  const Turns* turns_of(const Context& ctx, const Batch& batch, RopeTable& rope) const;

  Dtype activations_ = Dtype::kF32;
  Parameter embed_, head_;
  Norm norm_;
  std::vector<Layer> layers_;
  std::vector<StateLayout> state_layouts_;
  std::vector<size_t> first_state_;  // of each layer, in state_layouts_
  std::vector<RopeTable> ropes_;     // the spec's rope, then more_ropes
};

/// UnitInputs::noise of a layer of a call that has this noise.
uint64_t layer_noise(uint64_t noise, int64_t layer);

/// The context of a call of `model` that works in `workspace`, which is on its device.
inline Context context_for(const Model& model, Workspace& workspace, Tape* tape = nullptr) {
  CAMBIUM_CHECK(workspace.device() == model.device());
  return workspace.context(model.activations(), tape);
}

}  // namespace cambium
