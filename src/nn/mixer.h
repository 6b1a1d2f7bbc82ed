// A mixer is the part of a layer in which tokens see each other. It owns its parameters and says
// what state a sequence keeps for it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "nn/batch.h"
#include "nn/options.h"
#include "nn/parameter.h"
#include "tensor/context.h"

namespace cambium {

/// Which mixer a layer has, as data.
struct MixerSpec {
  std::string kind;
  Options options;
  friend bool operator==(const MixerSpec&, const MixerSpec&) = default;
};

class Mixer {
 public:
  virtual ~Mixer() = default;
  /// x (T, C), already normalised -> (T, C), before the residual is added.
  virtual Tensor forward(Context& ctx, const Tensor& x, const ForwardInputs& inputs) = 0;
  virtual StateLayout state_layout() const = 0;
  /// Visits the parameters with names relative to the mixer, such as "q_proj.weight".
  virtual void visit(const ParameterVisitor& visitor) = 0;
};

/// One row of the table of mixers (nn/mixers/registry.cc): a new mixer adds one.
struct MixerKind {
  const char* name;         // as in MixerSpec::kind
  char letter;              // in layer maps
  const char* description;  // one line for people
  std::unique_ptr<Mixer> (*make)(const Options& options, int64_t width);
};

const std::vector<MixerKind>& mixer_kinds();
/// Error that lists or suggests known kinds when there is none of this name.
const MixerKind& find_mixer_kind(const std::string& name);
/// Builds the mixer for a model of `width` channels; Error for unknown or impossible options.
std::unique_ptr<Mixer> make_mixer(const MixerSpec& spec, int64_t width);

}  // namespace cambium
