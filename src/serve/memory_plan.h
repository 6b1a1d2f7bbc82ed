// The memory that serving a model takes of a device, planned before its weights are there: weights,
// the workspace of the largest step, the cache, and a reserve for what the driver takes (code,
// graphs, metadata of steps, rounding).
//
// The workspace is measured, not worked out: an engine over one layer of each kind, with weights of
// zeros, runs the largest steps that there are on the device itself, and what its arenas held is
// the answer. The state of long sequences is there in few pages, used again and again. Formulas for
// every operation's scratch would be a second copy of the kernels that nothing keeps true; this
// runs the kernels, libraries included, in well under a second. Without the device the same layers
// go over the meta device, where what operations ask for is counted but the kernels' own scratch is
// not: a share is added for it, and the plan says "about".
#pragma once

#include <filesystem>
#include <string>

#include "model/weights.h"
#include "serve/engine.h"

namespace cambium {

struct MemoryRequest {
  const ModelSpec* spec = nullptr;
  WeightSizes weights{};
  /// memory_bytes: at most so much cache; 0 = what is left. The other settings as for an engine.
  EngineConfig engine{};
  /// The CPU or a CUDA device; of one that is not here, the meta device.
  Device device{};
  /// Memory of the device; 0 = what it has, and of that what is free.
  int64_t total_bytes = 0;
};

struct MemoryPlan {
  std::string device;     // "cuda:0, NVIDIA H100 80GB HBM3"
  bool measured = false;  // the workspace; else counted
  int64_t total = 0;      // bytes, like all below
  int64_t taken = 0;      // of the total by others, by what is loaded already and by code
  int64_t weights = 0;
  WorkspaceBytes workspace{};
  int64_t reserve = 0;
  CacheSizes cache{};
  int64_t longest = 0;  // tokens of the longest sequence that the cache holds alone
  /// What to make the engine of: the request's, completed, with the cache's limit and reserved.
  EngineConfig engine{};

  int64_t left() const {
    return total - taken - weights - workspace.device - reserve - cache.bytes;
  }
  /// "weights 28.0 GiB, workspace 1.9 GiB, ...".
  std::string parts() const;
  /// One line for people.
  std::string line() const;
};

/// Error that names the parts where they leave no room for a single sequence, or less than the
/// request wants of cache.
MemoryPlan plan_memory(const MemoryRequest& request);

/// For commands: the plan for the model in `dir` (a checkpoint folder, or a configuration for
/// random weights) on a CUDA device, said on standard error and by errors of memory that runs out;
/// returns what to make the engine of; `preset` of a supernet. On the CPU, where memory is taken as
/// it is needed, `config`.
EngineConfig planned_engine(const std::filesystem::path& dir, MatrixStorage storage, Device device,
                            const EngineConfig& config, const std::string& preset = {});

/// What the largest steps of an engine take on the device, where each sequence has `behind` tokens
/// (as many as the cache might hold of all of them).
WorkspaceBytes measure_workspace(const ModelSpec& spec, bool narrow, const EngineConfig& config,
                                 Device device, int64_t behind);
/// The same without the device, by shapes alone.
WorkspaceBytes count_workspace(const ModelSpec& spec, bool narrow, const EngineConfig& config);

}  // namespace cambium
