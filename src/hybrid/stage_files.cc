#include "hybrid/stage_files.h"

#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/file.h"
#include "base/json.h"
#include "base/json_fields.h"
#include "files/checksums.h"
#include "hybrid/graft.h"
#include "hybrid/sealed.h"

namespace cambium {

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
