#include "base/resumable_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/signals.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBufferBytes = size_t{1} << 20;

[[noreturn]] void fail_at(const char* what, const std::string& path) {
  fail("cannot {} {}: {}", what, path, std::strerror(errno));
}

/// At `offset`, so that what failed halfway may be written again.
void write_all(int fd, std::span<const std::byte> bytes, uint64_t offset, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno != EINTR) {
      fail_at("write", path);
    }
    const auto written = static_cast<size_t>(std::max<ssize_t>(n, 0));
    bytes = bytes.subspan(written);
    offset += written;
  }
}

struct Closed {
  int fd;
  ~Closed() { ::close(fd); }
};

}  // namespace

ResumableFile::ResumableFile(std::string path, std::string_view begin) : path_(std::move(path)) {
  expect(!fs::path(path_).filename().empty(), "cannot write '{}': a file name is missing", path_);
  expect(!fs::exists(path_) || fs::is_regular_file(path_),
         "cannot write {}: it is no file that could be replaced", path_);
  path_ = fs::exists(path_) ? fs::canonical(path_).string() : path_;
  part_ = path_ + ".part";
  mark_ = part_ + ".kept";
  fd_ = ::open(part_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    fail_at("write", part_);
  }
  try {
    expect(::flock(fd_, LOCK_EX | LOCK_NB) == 0, "{} is being written by another process", part_);
    // A mark whose file has got its name means nothing.
    if (fs::exists(mark_) && fs::file_size(part_) > 0) {
      take_kept(begin);
    } else {
      if (::ftruncate(fd_, 0) != 0) {
        fail_at("write", part_);
      }
      write(std::as_bytes(std::span(begin)));
      keep();
    }
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

ResumableFile::~ResumableFile() {
  if (fd_ < 0) {
    return;
  }
  try {
    keep();
  } catch (const Error&) {
    // The place that was kept before stands.
  }
  ::close(fd_);
}

void ResumableFile::take_kept(std::string_view begin) {
  const std::string mark = read_text_file(mark_);
  const size_t space = mark.find(' ');
  expect(space > 0 && space < 20 && mark.find_first_not_of("0123456789") == space,
         "{}: expected a number of bytes and their checksum; remove it and {} to begin anew", mark_,
         part_);
  const uint64_t kept = std::stoull(mark);
  {
    const MappedFile file(part_);
    const std::span<const std::byte> bytes = file.bytes();
    expect(
        bytes.size() >= kept && begin.size() <= kept &&
            std::memcmp(bytes.data(), begin.data(), begin.size()) == 0,
        "{} is what another run left half-made, of other data, another teacher or other options; "
        "give it what it began with, or remove it and {} to begin anew",
        part_, mark_);
    constexpr size_t kPiece = size_t{1} << 24;
    for (size_t at = 0; at < kept; at += kPiece) {
      stop_point();
      checksum_.update(bytes.subspan(at, std::min<size_t>(kPiece, kept - at)));
    }
  }
  expect(mark.substr(space + 1) == checksum_text(checksum_.digest()) + "\n",
         "{} is not what was written: it was damaged or edited; remove it and {} to begin anew",
         part_, mark_);
  size_ = kept;
  if (::ftruncate(fd_, static_cast<off_t>(kept)) != 0) {
    fail_at("write", part_);
  }
}

void ResumableFile::write(std::span<const std::byte> bytes) {
  CAMBIUM_CHECK(fd_ >= 0, "write after commit to {}", path_);
  checksum_.update(bytes);
  size_ += bytes.size();
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  if (buffer_.size() > kBufferBytes) {
    flush();
  }
}

void ResumableFile::flush() {
  write_all(fd_, buffer_, size_ - buffer_.size(), part_);
  buffer_.clear();
}

// Also on the way out of a process that is to stop, where an AtomicFile would not write any more.
void ResumableFile::keep() {
  flush();
  if (::fdatasync(fd_) != 0) {
    fail_at("sync", part_);
  }
  const std::string mark = fmt::format("{} {}\n", size_, checksum_text(checksum()));
  const std::string next = mark_ + ".new";
  const int fd = ::open(next.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) {
    fail_at("write", next);
  }
  const Closed closed{fd};
  write_all(fd, std::as_bytes(std::span(mark)), 0, next);
  if (::fdatasync(fd) != 0 || ::rename(next.c_str(), mark_.c_str()) != 0) {
    fail_at("write", mark_);
  }
}

void ResumableFile::commit() {
  CAMBIUM_CHECK(fd_ >= 0, "second commit of {}", path_);
  keep();
  if (::rename(part_.c_str(), path_.c_str()) != 0) {
    fail_at("write", path_);
  }
  ::close(std::exchange(fd_, -1));
  // A file without its mark is a whole one; a mark without its file begins nothing.
  fs::remove(mark_);
}

}  // namespace cambium
