// A unit is what stands between a norm and the residual: a mixer, in which tokens see each other,
// or a feed-forward, which takes each token by itself. It owns its parameters and says what state a
// sequence keeps for it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "nn/options.h"
#include "nn/parameter.h"
#include "nn/state.h"
#include "ops/selection/selection.h"
#include "tensor/context.h"

namespace cambium {

enum class UnitRole : uint8_t { kMixer, kFeedForward };

/// A unit as data.
struct UnitSpec {
  std::string kind;
  Options options{};
  /// Factor of its output where it is added to the residual.
  float out = 1.0F;
  /// Of its parameters within the layer; empty = "mixer" or "feed_forward", by its role.
  std::string name{};
  friend bool operator==(const UnitSpec&, const UnitSpec&) = default;
};

/// The index of an attention unit, which chooses what each token looks at.
struct IndexShape {
  int64_t heads = 0;  // 0: none, every token looks at all before it or in its window
  int64_t dim = 0;    // of their queries, and of the one key a token
  Selection selection{};
  bool by_head = false;  // each head chooses for a head of keys; otherwise all have one list
  friend bool operator==(const IndexShape&, const IndexShape&) = default;
};

/// Objects have shapes, no memory: a model of any size can be built, counted and printed.
class Unit {
 public:
  virtual ~Unit() = default;
  /// x (T, C), already normalised -> (T, C), before the residual is added.
  virtual Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) = 0;
  virtual StateLayout state_layout() const { return {}; }
  virtual IndexShape index() const { return {}; }
  /// Visits the parameters with names relative to the unit, such as "q_proj.weight".
  virtual void visit(const ParameterVisitor& visitor) = 0;
  /// Empty, or what this build lacks to run the unit ("experts", "attention's output gate"): it can
  /// be described, and a model with it is refused before any weight is read.
  virtual std::string missing() const { return {}; }
};

/// One row of the table of units (nn/units/registry.cc): a new unit adds one; what this build
/// cannot run of it, missing() refuses.
struct UnitKind {
  const char* name;  // as in UnitSpec::kind
  UnitRole role;
  char letter;              // in layer maps
  const char* description;  // one line for people
  /// Error for unknown or impossible options.
  std::unique_ptr<Unit> (*make)(const Options& options, int64_t width);
};

const std::vector<UnitKind>& unit_kinds();
/// Error that lists or suggests known kinds when there is none of this name.
const UnitKind& find_unit_kind(const std::string& name);
/// Builds the unit for a model of `width` channels.
std::unique_ptr<Unit> make_unit(const UnitSpec& spec, int64_t width);
/// What its parameters' names begin with inside the layer: its own name or its role's.
std::string unit_name(const UnitSpec& spec);

}  // namespace cambium
