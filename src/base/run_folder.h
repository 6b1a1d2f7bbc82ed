// The folder of a run: marked as ours, locked while the run goes, and never more ours than what we
// wrote into it. A run claims its folder before any work; a foreign file where the run would write,
// another run that is going on in it, or a run that is there already is an Error then.
//
// The mark is the file .cambium-run with the kind of run in it; its lock is the run's. Folders of
// versions without marks are taken over by --resume when they look like ours.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace cambium {

struct RunFolderUse {
  std::string kind;  // "train": a folder of one kind is not taken by another
  bool resume = false;
  /// What the run writes directly in the folder: if one of them is there, a run has begun.
  std::vector<std::string> names;
  /// Whether an unmarked folder with some of `names` in it was written by a run of this kind.
  std::function<bool(const std::filesystem::path& folder)> looks_ours;
};

class RunFolder {
 public:
  /// Creates the folder where it is missing, marks and locks it.
  RunFolder(std::filesystem::path path, const RunFolderUse& use);
  /// A run that wrote nothing, as one whose model cannot be read, leaves nothing: neither the mark
  /// that it made nor the folder.
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Error when the folder is no longer the one that was claimed: somebody removed, moved or
  /// replaced it, and what the run wrote is not where it will be looked for.
  void expect_present() const;
  /// Error where its disk has fewer than `bytes` free for `what`: said before the work that is to
  /// be kept, not after it. Nothing where the system does not say.
  void expect_room(uint64_t bytes, std::string_view what) const;

  static constexpr const char* kMark = ".cambium-run";

 private:
  std::filesystem::path path_;
  int lock_ = -1;
  bool mark_is_new_ = false;
  bool folder_is_new_ = false;
};

}  // namespace cambium
