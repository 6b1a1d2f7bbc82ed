// Placements relaxed to gates: in every open layer attention and the mixer that is to take its
// place stand side by side, scaled by a gate and by what it leaves of one,
//
//   h = h + out (g attention(x) + (1 - g) mixer(x)),   g = sigmoid(s),
//
// and the logits s alone are learned: the teacher's predictions and final hidden states at a price
// of attention (FlashMorph, arXiv 2606.30562, describes it in words). All layers are judged at
// once, so one that stands in for another is not counted twice, and it costs one training of as
// many numbers as there are layers.
//
// One price tells apart the layers of about one number of open gates: above it all are open, below
// it shut. So the price rises from a hundredth to the highest in equal factors, and the layer whose
// gate was open longest on that way, by the mean over all steps, is needed most. Gates stay off
// their ends, from where they would come back too slowly.
#pragma once

#include <vector>

#include "hybrid/importance.h"
#include "hybrid/mixer_bank.h"
#include "train/trainer.h"

namespace cambium {

struct RelaxationConfig {
  /// Steps, sequences, schedule and betas of Adam. Losses: loss.reverse_kl, and align.weight of the
  /// final hidden states' distance, in lengths of the teacher's, over tokens with a label or all.
  TrainConfig train;
  double price = 10.0;  // the highest, of attention in all layers, in nats a token
};

/// A bank's attention and its kind 1 in one model, which views their memory but for the output
/// projections.
class GatedMixers {
 public:
  /// Every open layer has the kind (MixerBank::expect_everywhere).
  explicit GatedMixers(const MixerBank& bank);

  Model& model() const { return *both_.model; }
  size_t layers() const { return layers_.size(); }
  /// A gate a layer.
  void set(const std::vector<double>& gates);
  /// d loss / d logit of each, of the gradients that backward steps have left in the projections,
  /// which are zero afterwards. What a mixer gives is linear in its output projection W, bias
  /// included: with G the gradient of W, d loss / d g = <G, W> / g, and so no operation is needed.
  std::vector<double> take_gradients();

 private:
  struct Layer {
    int64_t index = 0;
    std::string attention, beside;  // the units' names in the layer
    float out_attention = 1.0F, out_beside = 1.0F;
    std::vector<Tensor> of_attention, of_beside;  // the projections' parameters
    double gate = 0.5;
  };

  LoadedModel both_;
  std::vector<Layer> layers_;
};

/// Learns the gates of the bank's layers from where `state` stands, which `keep` is told of after
/// each step; the mean of each gate over all steps.
std::vector<double> learn_gates(const MixerBank& bank, const RelaxationConfig& config,
                                const DocumentSource& data, PartialGates& state,
                                const std::function<void()>& keep);

}  // namespace cambium
