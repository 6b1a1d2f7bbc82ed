#include "train/run_record.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/json.h"
#include "base/progress.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

/// Folders of versions that left no mark: a log of our events, or checkpoints.
bool looks_like_training(const fs::path& folder) {
  std::error_code error;
  const fs::path log = folder / "log.jsonl";
  if (fs::is_regular_file(log, error) && fs::file_size(log, error) > 0) {
    const MappedFile file(log.string());
    const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                                file.bytes().size());
    const auto line = try_json<nlohmann::json>(text.substr(0, text.find('\n')));
    return line.is_object() && line.contains("event") && line.contains("step");
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(folder / "checkpoints", error)) {
    if (is_checkpoint_name(entry.path().filename().string()) &&
        fs::is_regular_file(entry.path() / "training.json", error)) {
      return true;
    }
  }
  return false;
}

}  // namespace

RunFolderUse training_folder_use(bool resume, std::vector<std::string> more) {
  RunFolderUse use{"train", resume, {"log.jsonl", "checkpoints"}, looks_like_training};
  use.names.insert(use.names.end(), more.begin(), more.end());
  return use;
}

RunRecord::RunRecord(std::shared_ptr<RunFolder> folder, bool resume)
    : folder_(std::move(folder)), log_(log_path()) {
  expect(resume || (log_.size() == 0 && list_checkpoints(path()).empty()),
         "{} holds a run already; resume it (--resume) or choose another folder", path());
}

std::optional<std::string> RunRecord::find_checkpoint() {
  const FoundCheckpoint found = find_whole_checkpoint(path());
  if (!found.newest.empty()) {
    for (const std::string& damage : found.damaged) {
      note("a damaged checkpoint is passed over: {}", damage);
    }
    if (!found.damaged.empty()) {
      note("the run goes on from {}, an older checkpoint", found.newest);
    }
    return found.newest;
  }
  expect(
      found.damaged.empty(),
      "{} cannot be resumed: none of its {} checkpoints is whole (the newest: {}). To start from "
      "the beginning, move {}/checkpoints and {} away; or choose another folder",
      path(), found.damaged.size(), found.damaged.empty() ? "" : found.damaged.front(), path(),
      log_path());
  if (log_.size() > 0) {
    note("{} has no checkpoint yet: the run starts from its first step", path());
    log_.truncate(0);
  }
  return std::nullopt;
}

void RunRecord::restore(const std::string& checkpoint, const CheckpointState& state,
                        const NamedTensors& tensors) {
  expect(log_.size() >= state.log_bytes,
         "{} is shorter than it was when {} was written ({} of {} bytes); it cannot be continued",
         log_path(), checkpoint, log_.size(), state.log_bytes);
  read_checkpoint_tensors(checkpoint, tensors);
  log_.truncate(state.log_bytes);
}

std::string RunRecord::save(CheckpointState& state, const NamedTensors& tensors, int64_t keep,
                            Background& background) {
  background.wait();
  folder_->expect_present();
  log_.sync();
  state.log_bytes = log_.size();
  // The system has a copy of all that is written: from here on the tensors may change.
  const std::shared_ptr<AtomicDirectory> written = write_checkpoint(path(), state, tensors);
  background.run([written, run = path(), step = state.summary.steps, keep] {
    written->commit();
    remove_old_checkpoints(run, step, keep);
  });
  return checkpoint_path(path(), state.summary.steps);
}

void RunRecord::log(const nlohmann::ordered_json& line) {
  folder_->expect_present();
  log_.append(line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

}  // namespace cambium
