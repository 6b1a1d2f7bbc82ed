#include "hybrid/stage_files.h"

#include <unistd.h>

#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/file.h"
#include "base/json.h"
#include "base/json_fields.h"
#include "files/checksums.h"
#include "hybrid/graft.h"
#include "hybrid/sealed.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

// What a run writes directly in its folder.
std::vector<std::string> run_names() {
  return {"plan.toml",    "inputs.json", "teacher.json", "stages",
          "summary.json", "report.html", "frontier.svg", "frontier.csv"};
}

bool looks_ours(const fs::path& folder) {
  return fs::is_regular_file(folder / "plan.toml");
}

}  // namespace

void check_run_folder(const fs::path& folder, const HybridPlan& plan, bool resume) {
  const fs::path plan_path = folder / "plan.toml";
  if (fs::exists(plan_path)) {
    expect(resume, "{} holds a run already; go on with --resume, or choose another folder",
           folder.string());
    expect(read_text_file(plan_path.string()) == plan.text,
           "{} was started with another plan; compare it with {}, or choose another folder",
           folder.string(), plan_path.string());
  } else if (!fs::exists(folder / RunFolder::kMark)) {
    for (const std::string& name : run_names()) {
      expect(!fs::exists(folder / name),
             "{} is in the way: no run of `cambium hybridize` wrote it; move it away or choose "
             "another folder",
             (folder / name).string());
    }
  }
  fs::path there = fs::absolute(folder);
  while (!fs::exists(there) && there.has_parent_path() && there != there.parent_path()) {
    there = there.parent_path();
  }
  expect(fs::is_directory(there) && ::access(there.c_str(), W_OK) == 0,
         "{} cannot be written: {} is not a folder that this user may write", folder.string(),
         there.string());
}

RunFolder open_run_folder(const fs::path& folder, bool resume) {
  return RunFolder(folder, {"hybridize", resume, run_names(), looks_ours});
}

void expect_begun_with(const fs::path& folder, const nlohmann::ordered_json& inputs) {
  const fs::path path = folder / "inputs.json";
  if (!fs::exists(path)) {
    expect(!fs::exists(folder / "teacher.json"),
           "{} was begun by an earlier version, which took its data in another order; choose "
           "another folder",
           folder.string());
    write_sealed(path, inputs.dump(1) + "\n");
    return;
  }
  const auto root = parse_json<nlohmann::json>(read_sealed(path), path.string());
  const JsonFields before(root, path.string());
  for (const auto& [name, value] : inputs.items()) {
    if (name == "tokenizer's rules" && !before.has(name.c_str())) {
      continue;  // begun by a version that did not write them down
    }
    // Versions that did not write the device down had the CPU only.
    const std::string unsaid = name == "device" ? "cpu" : "nothing";
    const std::string then = before.has(name.c_str()) ? before.text(name.c_str()) : unsaid;
    expect(then == value.get<std::string>(),
           "{} was begun with another {}: {} then, {} now; give it what it began with, or choose "
           "another folder",
           folder.string(), name, then, value.get<std::string>());
  }
}

void write_result(const ModelSummary& model, const std::filesystem::path& path) {
  RunSummary one;
  one.models.push_back(model);
  write_sealed(path, summary_json(one));
}

ModelSummary read_result(const std::filesystem::path& path) {
  const RunSummary one = parse_summary(read_sealed(path), path.string());
  expect(one.models.size() == 1, "{}: expected the result of one model", path.string());
  return one.models[0];
}

std::string file_digest(const std::filesystem::path& path) {
  return checksum_text(checksum(MappedFile(path.string()).bytes()));
}

std::map<std::string, std::string> stage_files(const std::filesystem::path& folder) {
  std::map<std::string, std::string> digests;
  const auto add = [&](const std::filesystem::path& path) {
    if (std::filesystem::is_regular_file(path)) {
      digests[std::filesystem::relative(path, folder).string()] = file_digest(path);
    }
  };
  add(folder / "scores.json");
  add(folder / "search.json");
  add(folder / "chosen.json");
  add(folder / "placement.json");
  add(folder / "calibration.json");
  for (const std::string& mixer : graft_mixers()) {
    add(folder / ("calibration-" + mixer + ".json"));
  }
  for (int64_t attempt = 1; std::filesystem::exists(folder / fmt::format("attempt-{}", attempt));
       ++attempt) {
    const std::filesystem::path at = folder / fmt::format("attempt-{}", attempt);
    add(at / "result.json");
    for (const char* phase : {"fit", "align", "distill", "sft", "on_policy"}) {
      add(at / phase / "log.jsonl");
    }
  }
  return digests;
}

void verify_stage_files(const std::filesystem::path& folder) {
  const std::filesystem::path list = folder / "files.json";
  const auto root = parse_json<nlohmann::json>(read_sealed(list), list.string());
  const auto stored = JsonFields(root, list.string()).texts_by_name("files");
  const std::map<std::string, std::string> now = stage_files(folder);
  for (const auto& [name, digest] : stored) {
    const auto it = now.find(name);
    const std::string path = (folder / name).string();
    expect(it != now.end(), "{} is missing; the stage had written it", path);
    expect(it->second == digest,
           "{} is not what was written: its checksum is {}, not {}; it was damaged or edited", path,
           it->second, digest);
  }
}

void verify_model(const std::filesystem::path& dir, const std::string& checksums) {
  expect(verify_checksums(dir.string()) > 0, "{} has no checksums.json", dir.string());
  expect(file_digest(dir / "checksums.json") == checksums,
         "{} is not the model that was measured: its checksums.json has another checksum than "
         "result.json says",
         dir.string());
}

}  // namespace cambium
