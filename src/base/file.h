// Files that are whole or absent. Reading maps memory; writing goes to a temporary name in the same
// folder, is synced, and takes its name by rename, so that a killed run, a full disk or an
// exception never leaves something half-written under a name that anyone reads.
//
// Every function throws Error with the path and the system's reason. Paths are plain strings
// (std::filesystem::path converts).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/checksum.h"

namespace cambium {

/// Memory map of a whole file. An empty file gives an empty span. The pages are the system's cache:
/// they are read when touched and given back under pressure. Who owns the map and knows that nobody
/// else reads it may write to it: written pages become its own, the file never changes. A file that
/// another program shortens while it is mapped ends the process (base/map_faults.h).
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  /// Gives the resident pages of a range back to the system: for one pass over a large file.
  void release(size_t offset, size_t size) const;

 private:
  void unmap();

  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// A file read at any place by any number of threads, without a map: what is read lands in the
/// reader's memory alone.
class FileReader {
 public:
  explicit FileReader(std::string path);
  ~FileReader();
  FileReader(FileReader&& other) noexcept;
  FileReader& operator=(FileReader&&) = delete;

  const std::string& path() const { return path_; }
  size_t size() const { return size_; }
  /// Error when the file ends before `out` is full.
  void read(size_t offset, std::span<std::byte> out) const;

 private:
  std::string path_;
  int fd_ = -1;
  size_t size_ = 0;
};

/// The whole file as a string; refuses one of more than `max_bytes`.
std::string read_text_file(const std::string& path, size_t max_bytes = size_t{1} << 30);

/// Writes a file piece by piece; it appears under its name at commit(). Without commit (an
/// exception) the temporary file is removed. Replaces an existing file; of a link, the file that it
/// leads to. A device or a pipe is an Error, never replaced. Directly in the folder of an
/// AtomicDirectory it is synced with the folder, not by itself.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  /// Bytes written so far, and their checksum.
  uint64_t size() const { return size_; }
  uint64_t checksum() const { return checksum_.digest(); }
  /// Writes out, syncs, renames, syncs the folder. Nothing can be written afterwards.
  void commit();

 private:
  void flush();

  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  std::vector<std::byte> buffer_;
  uint64_t size_ = 0;
  Checksum checksum_;
};

void write_file_atomically(const std::string& path, std::string_view text);

/// A folder whose files appear together: fill path(), then commit() moves it to its name. Without
/// commit it is removed with everything in it.
class AtomicDirectory {
 public:
  enum class Existing {
    kRefuse,   ///< the target must be absent or an empty folder
    kReplace,  ///< the target's whole content gives way, at commit
  };
  explicit AtomicDirectory(std::string target, Existing existing = Existing::kRefuse);
  ~AtomicDirectory();
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;

  /// The temporary folder to write into.
  const std::string& path() const { return temporary_; }
  /// Syncs every file. On a thread beside the caller's, who may read the folder meanwhile but
  /// neither write to it nor commit it, this leaves little to wait for at commit().
  void sync();
  /// Syncs every file, moves the folder into place, syncs its parent.
  void commit();

 private:
  std::string target_;
  std::string temporary_;
  int lock_ = -1;
  Existing existing_;
};

/// Removes temporary files and folders that killed runs left directly in `folder`; those of running
/// programs hold a lock and stay. Opening an AtomicFile or AtomicDirectory does this for its own
/// name. Returns how many were removed.
int remove_leftovers(const std::string& folder);

/// Removes a folder with all that is in it; one that is not there is fine. It gets a temporary name
/// first, so that a killed run leaves it whole or as a leftover, never in part.
void remove_folder(const std::string& path);

/// Creates `path` and its parents; one that exists already is fine.
void make_folder(const std::string& path);

/// A log of lines that only grows (JSON lines). Each line is one write, so a killed run loses at
/// most the line it was writing; opening again drops such an unfinished last line.
class LineLog {
 public:
  explicit LineLog(std::string path);
  ~LineLog();
  LineLog(const LineLog&) = delete;
  LineLog& operator=(const LineLog&) = delete;

  /// `line` has no newline in it. A full disk leaves the log as it was before.
  void append(std::string_view line);
  /// Bytes in the log, and going back to an earlier size: a run that resumes from a checkpoint
  /// drops the lines written after it.
  uint64_t size() const { return size_; }
  void truncate(uint64_t size);
  void sync();

 private:
  std::string path_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

}  // namespace cambium
