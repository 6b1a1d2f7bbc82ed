// Held-out losses of many models that are one model but for one layer, as leave-one-out asks for
// them: the teacher runs once, the common layers below the changed one run once, and each model
// starts at its changed layer. The numbers are those of HeldOut::measure, bit for bit.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "tensor/arena.h"
#include "train/held_out.h"

namespace cambium {

class LayerWalk {
 public:
  /// Everything given must outlive the walk. Null teacher: no KL terms. `bytes` is what the hidden
  /// states of the loaded documents may take (8 C bytes a token, half without a teacher).
  LayerWalk(const HeldOut& held_out, Model& base, Model* teacher, int64_t bytes);

  int64_t groups() const { return static_cast<int64_t>(held_out_.groups().size()); }
  /// Loads groups of documents from `first` on, before `limit`: as many as `bytes` hold, at least
  /// one. They stand at the input of layer 0. Returns the first that is not loaded.
  int64_t load(int64_t first, int64_t limit);
  /// Walks the loaded documents up to the input of `layer`, which is not below where they are.
  void advance(int64_t layer);
  /// Walks them through the layer they stand at, and shows what its mixer reads and gives for each
  /// group of documents. The tensors live as long as the call of `see`.
  void pass(const std::function<void(const PackedSequence& group, const MixerTap& tap)>& see);
  /// Sums of each loaded document of `model`, which is `base` below the layer they stand at.
  std::vector<LossSums> measure(Model& model);

 private:
  struct Loaded {
    const PackedSequence* group;
    OwnedTensor hidden;  // (T, C): the input of layer_
    OwnedTensor taught;  // (T, Ct): the teacher's final hidden states
  };

  const HeldOut& held_out_;
  Model& base_;
  Model* teacher_;
  int64_t bytes_;
  int64_t layer_ = 0;
  std::vector<Loaded> loaded_;
  Workspace workspace_;
};

}  // namespace cambium
