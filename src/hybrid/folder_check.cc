#include "hybrid/folder_check.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "files/checksums.h"
#include "hybrid/sealed.h"
#include "model/weights.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

// Rounding of other kernels and storages stays below; load_model asks for less.
constexpr double kGoldenTolerance = 1e-3;

bool has_weights(const fs::path& folder) {
  return fs::exists(folder / "model.safetensors") ||
         fs::exists(folder / "model.safetensors.index.json");
}

class Checker {
 public:
  void visit(const fs::path& folder) {
    const bool listed = fs::exists(folder / "checksums.json");
    const bool model = fs::exists(folder / "config.json") && has_weights(folder);
    if (listed) {
      row(folder, [&] { return files(folder); });
    }
    if (model && !listed) {
      rows_.push_back({folder.string(), "no checksums.json: its files cannot be checked", true});
    }
    if (model) {
      row(folder, [&] { return golden(folder); });
    }
    std::vector<fs::path> inside;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      inside.push_back(entry.path());
    }
    std::sort(inside.begin(), inside.end());
    for (const fs::path& path : inside) {
      if (fs::is_symlink(path) || path.filename().string().starts_with('.')) {
        continue;
      }
      if (fs::is_directory(path)) {
        visit(path);
      } else if (path.extension() == ".json" && is_sealed_file(path)) {
        row(path, [&] { return sealed(path); });
      }
    }
  }
  std::vector<FolderCheckRow> take() { return std::move(rows_); }

 private:
  template <class Check>
  void row(const fs::path& path, Check check) {
    try {
      rows_.push_back({path.string(), check(), true});
    } catch (const Error& e) {
      rows_.push_back({path.string(), e.what(), false});
    }
  }

  static std::string files(const fs::path& folder) {
    const size_t files = verify_checksums(folder.string());
    const std::vector<std::string> others = unlisted_files(folder.string());
    return fmt::format("{} files are as written{}", files,
                       others.empty() ? "" : "; not listed: " + shortened(join(others, ", ")));
  }

  static std::string golden(const fs::path& folder) {
    if (!fs::exists(folder / "golden.safetensors")) {
      const LoadedModel loaded = load_model(folder);
      expect_numbers(*loaded.model, folder);
      return "loads; there is no golden.safetensors to compare with";
    }
    const LoadedModel loaded = load_model(folder, {.check_golden = false});
    return fmt::format("golden prompt: {:.1e} standard deviations from what was stored",
                       check_golden(*loaded.model, folder, kGoldenTolerance));
  }

  static bool is_sealed_file(const fs::path& path) {
    constexpr uint64_t kMost = uint64_t{1} << 28;
    return fs::is_regular_file(path) && fs::file_size(path) < kMost &&
           is_sealed(read_text_file(path.string()));
  }

  // Of a stage's list also the files that it names.
  static std::string sealed(const fs::path& path) {
    const auto json = parse_json<nlohmann::json>(read_sealed(path), path.string());
    size_t listed = 0;
    if (path.filename() == "files.json" && json.contains("files") && json["files"].is_object()) {
      for (const auto& [name, digest] : json["files"].items()) {
        const fs::path file = path.parent_path() / name;
        expect(fs::is_regular_file(file), "{} is missing; {} lists it", file.string(),
               path.string());
        const std::string now = checksum_text(checksum(MappedFile(file.string()).bytes()));
        expect(digest == now,
               "{} is not what was written: its checksum is {}; it was damaged or edited",
               file.string(), now);
        ++listed;
      }
    }
    return listed == 0 ? "as written"
                       : fmt::format("as written, and the {} files it lists", listed);
  }

  std::vector<FolderCheckRow> rows_;
};

}  // namespace

std::vector<FolderCheckRow> check_folder(const fs::path& folder) {
  expect(fs::is_directory(folder), "{} is not a folder", folder.string());
  Checker checker;
  checker.visit(folder);
  std::vector<FolderCheckRow> rows = checker.take();
  expect(!rows.empty(), "{} holds nothing that can be checked: no checkpoint and no run",
         folder.string());
  return rows;
}

void accept_files(const fs::path& folder) {
  expect(fs::exists(folder / "checksums.json") ||
             (fs::exists(folder / "config.json") && has_weights(folder)),
         "{} is no checkpoint: expected config.json and model.safetensors in it", folder.string());
  write_checksums(folder.string());
}

}  // namespace cambium
