// Units that published models have and this build cannot run yet: parameters and state follow from
// the options, so that their models are built, counted and printed like any other. Making one real
// is replacing its function here by a file of its own.
#include <cmath>
#include <utility>

#include "base/checked.h"
#include "nn/norm.h"
#include "nn/units/units.h"

namespace cambium {
namespace {

/// Parameters and state without a forward.
class DeclaredUnit : public Unit {
 public:
  DeclaredUnit(const char* kind, UnitRole role)
      : kind_(kind),
        group_(role == UnitRole::kMixer ? ParameterGroup::kMixer : ParameterGroup::kFeedForward) {}

  Tensor forward(Context& /*ctx*/, const Tensor& /*x*/, const UnitInputs& /*inputs*/) override {
    fail("{} is not built yet", kind_);
  }
  StateLayout state_layout() const override { return layout; }
  std::string missing() const override { return kind_; }
  void visit(const ParameterVisitor& visitor) override {
    for (auto& [name, parameter] : parameters_) {
      visitor(name, parameter);
    }
  }

  // They start as their like in units that run do (Linear, norm_weight, mamba2).
  void matrix(const std::string& name, int64_t out, int64_t in) { add(name, {out, in}, in); }
  void matrices(const char* name, int64_t count, int64_t out, int64_t in) {
    add(name, {count, out, in}, in);
  }
  void norm(const char* name, int64_t size) { parameters_.emplace_back(name, norm_weight(size)); }
  void bias(const char* name, int64_t size) {
    parameters_.emplace_back(name, Parameter{.shape = {size}, .group = ParameterGroup::kNorm});
  }
  /// The gate, up and down of a SwiGLU, with a prefix such as "shared.".
  void swiglu(const std::string& prefix, int64_t width, int64_t inner) {
    matrix(prefix + "gate.weight", inner, width);
    matrix(prefix + "up.weight", inner, width);
    matrix(prefix + "down.weight", width, inner);
  }

  StateLayout layout;

 private:
  void add(std::string name, std::vector<int64_t> shape, int64_t in) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(in));
    parameters_.emplace_back(
        std::move(name),
        Parameter{.shape = std::move(shape), .group = group_, .init = {InitKind::kUniform, scale}});
  }

  const char* kind_;
  ParameterGroup group_;
  std::vector<std::pair<std::string, Parameter>> parameters_;
};

}  // namespace

std::unique_ptr<Unit> make_latent_attention(const Options& options, int64_t width) {
  constexpr const char* kName = "latent_attention";
  options.expect_only(
      kName, {"heads", "q_rank", "kv_rank", "nope_dim", "rope_dim", "value_dim", "rope", "scale",
              "norm_eps", "index_heads", "index_dim", "index_top"});
  const int64_t heads = options.size(kName, "heads", kMaxHeads);
  const int64_t q_rank = options.size_or(kName, "q_rank", 0, kMaxWidth);
  const int64_t kv_rank = options.size(kName, "kv_rank", kMaxWidth);
  const int64_t nope = options.size(kName, "nope_dim", kMaxHeadDim);
  const int64_t rope = options.size(kName, "rope_dim", kMaxHeadDim);
  const int64_t value = options.size(kName, "value_dim", kMaxHeadDim);
  auto unit = std::make_unique<DeclaredUnit>(kName, UnitRole::kMixer);
  if (q_rank > 0) {
    unit->matrix("q_a_proj.weight", q_rank, width);
    unit->norm("q_a_norm.weight", q_rank);
    unit->matrix("q_b_proj.weight", heads * (nope + rope), q_rank);
  } else {
    unit->matrix("q_proj.weight", heads * (nope + rope), width);
  }
  unit->matrix("kv_a_proj.weight", kv_rank + rope, width);
  unit->norm("kv_a_norm.weight", kv_rank);
  unit->matrix("kv_b_proj.weight", heads * (nope + value), kv_rank);
  unit->matrix("o_proj.weight", width, heads * value);
  unit->layout.pages = {{"latent", {kv_rank}}, {"rope_key", {rope}}};
  if (const int64_t index = options.size_or(kName, "index_heads", 0, kMaxHeads); index > 0) {
    const int64_t dim = options.size(kName, "index_dim", kMaxHeadDim);
    expect(q_rank > 0, "latent_attention: the index of keys reads the query's latent; give q_rank");
    unit->matrix("indexer.q_proj.weight", index * dim, q_rank);
    unit->matrix("indexer.k_proj.weight", dim, width);
    unit->norm("indexer.k_norm.weight", dim);
    unit->bias("indexer.k_norm.bias", dim);
    unit->matrix("indexer.weights_proj.weight", index, width);
    unit->layout.pages.push_back({"index_key", {dim}});
  }
  return unit;
}

}  // namespace cambium
