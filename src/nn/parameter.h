// Parameters of a model and the one visitor that load, save, count, zero, optimise and shard share.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "tensor/tensor.h"

namespace cambium {

/// What an optimiser may treat alike: each group has its own learning-rate scale and weight decay.
enum class ParameterGroup { kMixer, kFeedForward, kNorm, kEmbedding };
inline constexpr int kParameterGroups = 4;
const char* parameter_group_name(ParameterGroup group);

/// How a parameter starts when it is not loaded.
enum class InitKind {
  kZeros,
  kOnes,
  kNormal,      // normal with standard deviation `scale`
  kUniform,     // uniform in [-scale, scale]
  kLogRange,    // A_log of Mamba-1: log(1 + index in the last axis)
  kLogUniform,  // A_log of Mamba-2: log of uniform in [1, 16]
  kStepBias,    // inverse softplus of a step drawn log-uniformly from [1e-3, 1e-1]
  kConstant,    // `scale` everywhere
};

struct Init {
  InitKind kind = InitKind::kZeros;
  double scale = 0.0;
};

/// Rows of a fused projection that are used apart: what a unit's forward slices, the graft fills
/// and a family's tensor rules split and join.
struct RowBlock {
  const char* name;
  int64_t rows = 0;
};

/// A named tensor of a model. The model declares shape and rules; Weights gives it memory.
struct Parameter {
  std::vector<int64_t> shape;
  ParameterGroup group = ParameterGroup::kMixer;
  Init init{};
  /// Kept in fp32 when weights are stored in bf16 (A_log, dt_bias, D).
  bool keep_fp32 = false;
  /// A stack of matrices along the first axis (experts), of which a token goes through so many; 0 =
  /// no stack.
  int64_t used = 0;
  /// In the order of the rows; empty = the rows have no parts.
  std::vector<RowBlock> blocks{};
  Tensor tensor{};

  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : shape) {
      n *= size;
    }
    return n;
  }
  /// What a token is multiplied by, and what may be kept in bf16.
  bool is_matrix() const { return (shape.size() == 2 || used > 0) && !keep_fp32; }
  /// Numbers that one token reads.
  int64_t active() const { return used > 0 ? numel() / shape.front() * used : numel(); }
};

/// Rows [begin, begin + count) of a parameter.
struct RowRange {
  int64_t begin = 0;
  int64_t count = 0;
};
/// Where the block `first`, or the blocks from `first` to `last`, stand. The names are the unit's
/// own: one that does not exist is our bug.
RowRange rows_of(const Parameter& parameter, std::string_view first, std::string_view last = {});
/// The columns of y (T, rows) = x weight^T that those rows of `weight` give: a view.
Tensor part(const Tensor& y, const Parameter& weight, std::string_view first,
            std::string_view last = {});

/// Called with the parameter's full name, for example "layers.3.mixer.q_proj.weight".
using ParameterVisitor = std::function<void(const std::string& name, Parameter& parameter)>;

/// Fills a bound F32 parameter by its rule, from the stream (seed, name): the same whatever else
/// the model holds.
void initialise(Parameter& parameter, const std::string& name, uint64_t seed);

}  // namespace cambium
