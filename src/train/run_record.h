// What a run of training leaves in its folder and goes on from: log.jsonl and checkpoints/.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "base/background.h"
#include "base/file.h"
#include "base/run_folder.h"
#include "train/checkpoint.h"

namespace cambium {

/// The use of a folder by a run of training; `more` are names beside log.jsonl and checkpoints that
/// the run writes there.
RunFolderUse training_folder_use(bool resume, std::vector<std::string> more = {});

class RunRecord {
 public:
  /// `folder` is claimed. Without `resume`, Error when a run is there already.
  RunRecord(std::shared_ptr<RunFolder> folder, bool resume);

  /// The newest whole checkpoint of the run to be resumed; damaged ones that are passed over are
  /// said on standard error. Nothing when there is none: the log is emptied then. Error when there
  /// are some and none is whole.
  std::optional<std::string> find_checkpoint();
  /// Fills `tensors` from the checkpoint, and drops the lines of the log that came after it.
  void restore(const std::string& checkpoint, const CheckpointState& state,
               const NamedTensors& tensors);
  /// Writes a checkpoint, of which the newest `keep` stay; returns its folder, which is there once
  /// `background` is done. Waits for what that does already.
  std::string save(CheckpointState& state, const NamedTensors& tensors, int64_t keep,
                   Background& background);

  /// Adds a line to the log. Error when the folder is gone.
  void log(const nlohmann::ordered_json& line);
  const RunFolder& folder() const { return *folder_; }

 private:
  std::string path() const { return folder_->path().string(); }
  std::string log_path() const { return path() + "/log.jsonl"; }

  std::shared_ptr<RunFolder> folder_;
  LineLog log_;
};

}  // namespace cambium
