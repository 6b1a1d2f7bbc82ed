// A layer is a list of branches, a branch a norm and the units that read what it gives:
//
//   x = norm(h);   h = keep * (residual_normed ? x : h) + sum over units of out_i * unit_i(x)
//
// or, where the branch has a norm of its output too, out_norm(unit_i(x)) in place of unit_i(x).
//
// Every family is data of this form: Llama is {norm, attention}, {norm, swiglu}; OLMo 2 norms the
// outputs instead, Gemma 2 both; Nemotron-H has one branch a layer, Falcon-H1 two mixers in one
// branch, a supernet several mixers of which one is active. Wirings that carry more than one h
// (several residual streams, attention over the depth of the network) would be further fields of
// BranchSpec, read by Layer::forward and nobody else.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "nn/norm.h"
#include "nn/residual.h"
#include "nn/unit.h"

namespace cambium {

struct BranchSpec {
  NormSpec norm{};
  /// All read x and are added; of none nothing is (and the norm keeps its parameters).
  std::vector<UnitSpec> units;
  /// -1: all units run; k: unit k alone does (supernet), but for those that stand beside a choice.
  int active = -1;
  /// Of a choice: so many of the last units run whichever of the others is chosen.
  int beside = 0;
  float keep = 1.0F;
  bool residual_normed = false;
  /// Of the output, for a branch that runs one unit.
  NormSpec out_norm{NormKind::kNone};

  /// The units but for those beside a choice.
  size_t choices() const { return units.size() - static_cast<size_t>(beside); }
  bool runs(size_t unit) const {
    return active < 0 || static_cast<size_t>(active) == unit || unit >= choices();
  }
  friend bool operator==(const BranchSpec&, const BranchSpec&) = default;
};

/// No branches = the layer is removed: it returns its input and has no parameters.
struct LayerSpec {
  std::vector<BranchSpec> branches;
  /// Which of the model's rotations its units turn by (ModelSpec::rope_of).
  int rope = 0;

  bool removed() const { return branches.empty(); }
  /// The first that runs, or null. Of several mixers it speaks for the layer: it is converted.
  const UnitSpec* mixer() const { return find(UnitRole::kMixer); }
  const UnitSpec* feed_forward() const { return find(UnitRole::kFeedForward); }
  /// All mixers that run.
  std::vector<UnitSpec> mixers() const;
  /// All mixers, also those of a choice that do not run.
  std::vector<UnitSpec> all_mixers() const;
  /// The first branch of which one unit runs, or null: where a supernet chooses.
  const BranchSpec* choice() const;
  BranchSpec* choice() { return const_cast<BranchSpec*>(std::as_const(*this).choice()); }
  UnitSpec* mixer() { return const_cast<UnitSpec*>(std::as_const(*this).mixer()); }
  /// Whether its mixer is of this kind.
  bool mixes_by(std::string_view kind) const {
    const UnitSpec* unit = mixer();
    return unit != nullptr && unit->kind == kind;
  }
  friend bool operator==(const LayerSpec&, const LayerSpec&) = default;

 private:
  const UnitSpec* find(UnitRole role) const;
};

/// What most decoders are made of: {norm, mixer}, {norm, swiglu of `inner` channels}.
LayerSpec decoder_layer(UnitSpec mixer, int64_t inner, const NormSpec& norm = {});

/// What a caller may look at inside a layer: the normalised input of its mixer and its output
/// before the residual is added, both (T, C). They live as long as the arena the forward call ran
/// on is not released.
struct MixerTap {
  Tensor input;
  Tensor output;
};

/// What a layer sees of the forward call: a state for each of its units that keeps one, in order
/// (Layer::state_layouts); empty in training.
struct LayerInputs {
  const Batch* batch = nullptr;
  const Turns* rope = nullptr;
  std::span<const UnitState> states;
  /// The layer is run again for its backward steps: nothing reads the values of its result.
  bool unread = false;
  uint64_t noise = 0;           // as UnitInputs'
  RouterTap* router = nullptr;  // the same
};

class Layer {
 public:
  Layer(const LayerSpec& spec, int64_t width);
  /// h (T, C) -> (T, C)
  Tensor forward(Context& ctx, const Tensor& h, const LayerInputs& inputs, MixerTap* tap) const;
  /// The same to a stream.
  void forward(Context& ctx, Residual& h, const LayerInputs& inputs, MixerTap* tap) const;
  /// Unit `unit` of the branch of LayerSpec::choice() runs from now on, and no other choice of it.
  void activate(int unit);
  /// The norm that reads the stream first; null where nothing runs.
  const Norm* first_norm() const;
  /// Visits names such as "input_norm.weight", "mixer.q_proj.weight", "post_norm.weight",
  /// "feed_forward.up.weight". The norms of third and later branches are norm_3, norm_4, ..., those
  /// of outputs out_norm_1, out_norm_2, ...
  void visit(const ParameterVisitor& visitor);
  /// The factor of the unit whose parameters have this name (unit_name); the spec's until then.
  void set_out(const std::string& unit, float out);

  /// The first mixer that runs, or null.
  Unit* mixer() const { return mixer_; }
  /// Nothing runs: forward returns its input.
  bool passes() const { return passes_; }
  /// Of the units that run and keep state.
  const std::vector<StateLayout>& state_layouts() const { return state_layouts_; }
  /// What this build lacks to run the layer, each thing once; any unit of a choice may be to run.
  std::vector<std::string> missing() const;

 private:
  struct Piece {
    std::string name;
    UnitRole role;
    float out;
    bool runs;
    bool has_state;
    std::unique_ptr<Unit> unit;
  };
  struct Branch {
    std::string norm_name, out_norm_name;
    Norm norm, out_norm;
    float keep;
    bool residual_normed;
    size_t choices;  // 0 = all pieces run
    std::vector<Piece> pieces;

    bool runs() const;
  };

  void note_what_runs();

  std::vector<Branch> branches_;
  std::vector<StateLayout> state_layouts_;
  Unit* mixer_ = nullptr;
  bool passes_ = true;
};

}  // namespace cambium
