// Training checkpoints: all that a run needs to go on as if it had not stopped, in one folder that
// appears whole or not at all.
//
//   checkpoints/step-000120/  training.json  state.safetensors  checksums.json
//
// Frozen parameters are not in it: they are the start model's, and its fingerprint is compared. Nor
// is the optimiser's state where the run has ended: no step follows.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"
#include "tensor/tensor.h"
#include "train/dataset.h"
#include "train/step_judge.h"

namespace cambium {

struct TrainSummary {
  int64_t steps = 0;    // of the whole run, resumed parts included
  int64_t tokens = 0;   // that went through the model
  int64_t learned = 0;  // those among them that were labels
  double seconds = 0.0;
  double first_loss = 0.0;
  double last_loss = 0.0;  // mean of the last steps, at most ten
  DataPosition data;
  std::string checkpoint;  // the last one's folder; empty without
};

struct CheckpointState {
  TrainSummary summary;  // its checkpoint is the folder itself
  uint64_t log_bytes = 0;
  int64_t optimizer_steps = 0;
  bool ended = false;          // no step follows: without the optimiser's state
  std::string device = "cpu";  // that the steps were done on, as describe_device() says
  StepJudge::State judge;
  /// What must not change between the parts of a run, by name.
  std::map<std::string, std::string> fingerprint;
};

/// "cpu", or "cuda (NVIDIA H100 80GB HBM3)": runs on devices of one description go on bit for bit.
std::string describe_device(Device device);

/// Tensors of a checkpoint by name, of any device.
using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

/// RUN/checkpoints/step-NNNNNN.
std::string checkpoint_path(const std::string& run, int64_t step);
/// Fills the folder of a checkpoint, which is its caller's to commit.
std::unique_ptr<AtomicDirectory> write_checkpoint(const std::string& run,
                                                  const CheckpointState& state,
                                                  const NamedTensors& tensors);
/// After the checkpoint of `step`: removes all but the newest `keep`, of each what we wrote, and
/// the folder when nothing else is in it.
void remove_old_checkpoints(const std::string& run, int64_t step, int64_t keep);

/// "step-000120".
bool is_checkpoint_name(const std::string& name);
/// The checkpoints of a run folder, whole or not, newest first.
std::vector<std::filesystem::path> list_checkpoints(const std::string& run);

struct FoundCheckpoint {
  std::string newest;                // the newest whole one; empty when there is none
  std::vector<std::string> damaged;  // newer ones: what is wrong with each
};
FoundCheckpoint find_whole_checkpoint(const std::string& run);
/// The newest whole checkpoint of a run folder: damaged ones are passed over.
std::optional<std::string> newest_checkpoint(const std::string& run);

CheckpointState read_checkpoint_state(const std::string& folder);
/// Fills `tensors`; Error unless names, shapes and types are exactly those of the checkpoint.
void read_checkpoint_tensors(const std::string& folder, const NamedTensors& tensors);

/// Error that lists what differs, with both values.
void expect_same_run(const std::string& folder, const std::map<std::string, std::string>& stored,
                     const std::map<std::string, std::string>& ours);

}  // namespace cambium
