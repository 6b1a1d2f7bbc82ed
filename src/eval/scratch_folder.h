// The folder a sandboxed program runs in: measured while it runs and removed afterwards, whatever
// the program did to it (folders nested without end, or that cannot be listed).
#pragma once

#include <cstdint>
#include <filesystem>

namespace cambium {

class ScratchFolder {
 public:
  /// Fresh, below the system's folder for temporary files; of `owner` where this process is root.
  explicit ScratchFolder(uint32_t owner);
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

  /// Bytes of its files and folders, or more than `enough` as soon as that is passed. Folders
  /// nested deeper than any program needs count as more than enough.
  int64_t bytes(int64_t enough) const;

 private:
  std::filesystem::path path_;
};

/// Bytes of files that process `pid` holds open and that have no name any more.
int64_t unnamed_bytes(int pid);

}  // namespace cambium
