// A file that takes longer to write than a process may live.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/checksum.h"

namespace cambium {

/// Written piece by piece over several runs, it appears under its name at commit(). Until then it
/// is PATH.part, and PATH.part.kept says how much of that is known to be whole: bytes and their
/// checksum.
class ResumableFile {
 public:
  /// Goes on with what an earlier run kept, where that begins with `begin`; else starts with
  /// `begin`. Error that says what to do when what was kept begins otherwise or was damaged, and
  /// when another process writes it.
  ResumableFile(std::string path, std::string_view begin);
  /// Keeps what is written, unless it has its name.
  ~ResumableFile();
  ResumableFile(const ResumableFile&) = delete;
  ResumableFile& operator=(const ResumableFile&) = delete;

  /// Bytes there are, those of earlier runs included, and their checksum.
  uint64_t size() const { return size_; }
  uint64_t checksum() const { return checksum_.digest(); }
  void write(std::span<const std::byte> bytes);
  /// All that is written is whole: another run goes on from here.
  void keep();
  /// Gives the file its name. Nothing can be written afterwards.
  void commit();

 private:
  void take_kept(std::string_view begin);
  void flush();

  std::string path_, part_, mark_;
  int fd_ = -1;
  std::vector<std::byte> buffer_;
  uint64_t size_ = 0;
  Checksum checksum_;
};

}  // namespace cambium
