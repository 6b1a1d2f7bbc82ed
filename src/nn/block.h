// One layer of every model: norm, mixer, residual; norm, feed-forward, residual.
#pragma once

#include <memory>

#include "nn/linear.h"
#include "nn/mixer.h"

namespace cambium {

/// A layer as data.
struct LayerSpec {
  MixerSpec mixer;
  int64_t ff_inner = 0;
  /// The whole layer is gone: it returns its input and has no parameters.
  bool removed = false;
  friend bool operator==(const LayerSpec&, const LayerSpec&) = default;
};

/// What a caller may look at inside a layer: the normalised input of the mixer and its output
/// before the residual is added, both (T, C). They live as long as the arena the forward call ran
/// on is not released.
struct MixerTap {
  Tensor input;
  Tensor output;
};

class Block {
 public:
  Block(const LayerSpec& spec, int64_t width, float norm_eps);
  /// h (T, C) -> (T, C)
  Tensor forward(Context& ctx, const Tensor& h, const ForwardInputs& inputs, MixerTap* tap);
  /// Visits names such as "mixer.q_proj.weight", "input_norm.weight", "feed_forward.up.weight".
  void visit(const ParameterVisitor& visitor);

  Mixer& mixer() { return *mixer_; }
  const Mixer& mixer() const { return *mixer_; }
  bool removed() const { return removed_; }

 private:
  bool removed_;
  float norm_eps_;
  std::unique_ptr<Mixer> mixer_;
  Parameter input_norm_, post_norm_;
  FeedForward feed_forward_;
};

}  // namespace cambium
