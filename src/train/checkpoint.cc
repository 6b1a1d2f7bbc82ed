#include "train/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/json_fields.h"
#include "files/checksums.h"
#include "files/safetensors.h"
#include "tensor/arena.h"
#include "tensor/copy.h"
#include "tensor/device_memory.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kPrefix = "step-";

std::string checkpoints_of(const std::string& run) {
  return (fs::path(run) / "checkpoints").string();
}

/// What training changes is f32, or bf16 where the optimiser keeps its state so.
StoredType type_of(const Tensor& t, const std::string& name) {
  CAMBIUM_CHECK(t.contiguous() && (t.dtype == Dtype::kF32 || t.dtype == Dtype::kBF16), "{}", name);
  return t.dtype == Dtype::kF32 ? StoredType::kF32 : StoredType::kBF16;
}

std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.shape.begin(), t.shape.begin() + t.rank};
}

/// Removes a checkpoint as it was written; what else lies in its folder stays.
void remove_checkpoint(const fs::path& folder) {
  std::error_code ignored;
  for (const char* name : {"training.json", "state.safetensors", "checksums.json"}) {
    fs::remove(folder / name, ignored);
  }
  fs::remove(folder, ignored);
}

}  // namespace

std::string describe_device(Device device) {
  return device.kind == Device::kCpu ? "cpu"
                                     : fmt::format("cuda ({})", cuda_device_info(device).name);
}

bool is_checkpoint_name(const std::string& name) {
  const std::string_view prefix = kPrefix;
  return name.starts_with(prefix) && name.size() > prefix.size() &&
         name.find_first_not_of("0123456789", prefix.size()) == std::string::npos;
}

std::vector<fs::path> list_checkpoints(const std::string& run) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(checkpoints_of(run), error)) {
    const std::string name = entry.path().filename().string();
    if (is_checkpoint_name(name)) {
      found.push_back(entry.path());
    }
  }
  // Steps are padded with zeros, and a longer name is a later step.
  std::sort(found.begin(), found.end(), [](const fs::path& a, const fs::path& b) {
    const std::string x = a.filename().string();
    const std::string y = b.filename().string();
    return x.size() != y.size() ? x.size() > y.size() : x > y;
  });
  return found;
}

std::string checkpoint_path(const std::string& run, int64_t step) {
  return (fs::path(checkpoints_of(run)) / fmt::format("{}{:06}", kPrefix, step)).string();
}

std::unique_ptr<AtomicDirectory> write_checkpoint(const std::string& run,
                                                  const CheckpointState& state,
                                                  const NamedTensors& tensors) {
  auto folder = std::make_unique<AtomicDirectory>(checkpoint_path(run, state.summary.steps),
                                                  AtomicDirectory::Existing::kReplace);
  std::vector<TensorSource> sources;
  for (const auto& [name, tensor] : tensors) {
    sources.push_back({name, type_of(tensor, name), shape_of(tensor),
                       [t = tensor](const PutBytes& put) { read_in_pieces(t, t.dtype, put); }});
  }
  const FileChecksums written =
      write_safetensors(folder->path() + "/state.safetensors", std::move(sources));
  const TrainSummary& done = state.summary;
  const Json json = {{"step", done.steps},
                     {"next_sample", done.data.next_sample},
                     {"documents", done.data.documents},
                     {"cut", done.data.cut},
                     {"dropped", done.data.dropped},
                     {"log_bytes", state.log_bytes},
                     {"tokens", done.tokens},
                     {"learned", done.learned},
                     {"seconds", done.seconds},
                     {"first_loss", done.first_loss},
                     {"last_loss", done.last_loss},
                     {"optimizer_steps", state.optimizer_steps},
                     {"ended", state.ended},
                     {"device", state.device},
                     {"recent", state.judge.recent},
                     {"first", state.judge.first},
                     {"above", state.judge.above},
                     {"fingerprint", state.fingerprint}};
  write_file_atomically(folder->path() + "/training.json", json.dump(2) + "\n");
  write_checksums(folder->path(), written);
  return folder;
}

void remove_old_checkpoints(const std::string& run, int64_t step, int64_t keep) {
  const fs::path newest = checkpoint_path(run, step);
  int64_t kept = 0;
  for (const fs::path& old : list_checkpoints(run)) {
    // Later ones are left from before a resume from this run's past; they are not whole.
    if (old.filename().string() > newest.filename().string() || kept++ < keep) {
      continue;
    }
    remove_checkpoint(old);
  }
}

FoundCheckpoint find_whole_checkpoint(const std::string& run) {
  FoundCheckpoint found;
  for (const fs::path& folder : list_checkpoints(run)) {
    try {
      expect(verify_checksums(folder.string()) > 0, "{}: checksums.json is missing",
             folder.string());
      found.newest = folder.string();
      break;
    } catch (const Error& error) {
      found.damaged.emplace_back(error.what());  // an older one may be whole
    }
  }
  return found;
}

std::optional<std::string> newest_checkpoint(const std::string& run) {
  const FoundCheckpoint found = find_whole_checkpoint(run);
  return found.newest.empty() ? std::nullopt : std::optional(found.newest);
}

CheckpointState read_checkpoint_state(const std::string& folder) {
  const std::string path = folder + "/training.json";
  const Json root = parse_json<Json>(read_text_file(path), path);
  const JsonFields json(root, path);
  CheckpointState state;
  TrainSummary& done = state.summary;
  done.steps = json.whole("step");
  done.data.next_sample = json.unsigned_whole("next_sample");
  done.data.documents = json.whole("documents");
  done.data.cut = json.whole("cut");
  done.data.dropped = json.whole("dropped");
  done.tokens = json.whole("tokens");
  done.learned = json.whole("learned");
  done.seconds = json.real("seconds");
  done.first_loss = json.real("first_loss");
  done.last_loss = json.real("last_loss");
  done.checkpoint = folder;
  state.log_bytes = json.unsigned_whole("log_bytes");
  state.optimizer_steps = json.whole("optimizer_steps");
  state.ended = json.has("ended") && json.flag("ended");
  state.device = json.has("device") ? json.text("device") : state.device;
  state.judge.recent = json.reals("recent");
  state.judge.first = json.has("first") ? json.reals("first") : state.judge.first;
  state.judge.above = json.whole("above");
  state.fingerprint = json.texts_by_name("fingerprint");
  return state;
}

void read_checkpoint_tensors(const std::string& folder, const NamedTensors& tensors) {
  const SafeTensors file = SafeTensors::open(folder + "/state.safetensors");
  for (const auto& [name, tensor] : tensors) {
    const TensorEntry& entry = file.at(name);
    const std::vector<int64_t> shape = shape_of(tensor);
    const StoredType type = type_of(tensor, name);
    expect(entry.dtype == type && entry.shape == shape, "{}: tensor {} is {} {}, expected {} {}",
           file.path(), name, stored_type_name(entry.dtype), shape_text(entry.shape),
           stored_type_name(type), shape_text(shape));
    copy(tensor, Tensor::of(tensor.dtype, Device::kCpu, shape, const_cast<std::byte*>(entry.data)));
  }
  expect(file.tensors().size() == tensors.size(),
         "{}: has {} tensors, expected {}; it belongs to another run", file.path(),
         file.tensors().size(), tensors.size());
}

void expect_same_run(const std::string& folder, const std::map<std::string, std::string>& stored,
                     const std::map<std::string, std::string>& ours) {
  std::string differences;
  const auto add = [&](const std::string& key, const std::string& was, const std::string& is) {
    differences +=
        fmt::format("{}{}: was {}, is now {}", differences.empty() ? "" : "; ", key, was, is);
  };
  for (const auto& [key, value] : stored) {
    const auto it = ours.find(key);
    if (it == ours.end()) {
      add(key, value, "absent");
    } else if (it->second != value) {
      add(key, value, it->second);
    }
  }
  for (const auto& [key, value] : ours) {
    if (!stored.contains(key)) {
      add(key, "absent", value);
    }
  }
  expect(differences.empty(),
         "cannot resume from {}: {}. Give the settings the run was started with, or start a new "
         "one in another folder",
         folder, differences);
}

}  // namespace cambium
