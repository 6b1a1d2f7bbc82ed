#include "base/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "base/map_faults.h"
#include "base/signals.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBufferBytes = size_t{256} << 10;
constexpr int kMostLinks = 40;
constexpr std::string_view kTemporaryMark = ".cambium-tmp-";

[[noreturn]] void fail_errno(std::string_view doing, std::string_view path, int error = errno) {
  const char* advice = "";
  if (error == ENOSPC || error == EDQUOT) {
    advice = "; free some space and run again";
  }
  if (error == EFBIG) {
    advice = "; the file size limit (ulimit -f) is reached";
  }
  fail("cannot {} {}: {}{}", doing, path, std::generic_category().message(error), advice);
}

/// A descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) {
      ::close(fd_);
    }
  }
  Descriptor(Descriptor&& other) noexcept : fd_(other.take()) {}
  Descriptor& operator=(Descriptor&&) = delete;
  int get() const { return fd_; }
  int take() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

int open_retry(const std::string& path, int flags, mode_t mode = 0) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

/// Opens a regular file for reading and tells its size.
Descriptor open_regular(const std::string& path, size_t* size) {
  // Not blocking: opening a pipe nobody writes to would wait for ever.
  Descriptor file(open_retry(path, O_RDONLY | O_NONBLOCK));
  if (file.get() < 0) {
    fail_errno("open", path);
  }
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) {
    fail_errno("read", path);
  }
  if (S_ISDIR(status.st_mode)) {
    fail("cannot read {}: it is a folder, expected a file", path);
  }
  if (!S_ISREG(status.st_mode)) {
    fail("cannot read {}: it is not a regular file", path);
  }
  *size = static_cast<size_t>(status.st_size);
  return Descriptor(file.take());
}

/// A file that meets the process's size limit should be an error like a full disk, not the end of
/// the process with its temporary files left behind.
void turn_size_signal_into_error() {
  static const bool once = [] {
    struct sigaction now {};
    if (::sigaction(SIGXFSZ, nullptr, &now) == 0 && now.sa_handler == SIG_DFL) {
      ::signal(SIGXFSZ, SIG_IGN);
    }
    return true;
  }();
  (void)once;
}

/// Returns the errno of a failed write, or 0.
int write_all(int fd, const std::byte* data, size_t size) {
  while (size > 0) {
    const ssize_t n = ::write(fd, data, size);
    if (n < 0) {
      if (errno == EINTR) {
        continue;
      }
      return errno;
    }
    data += n;
    size -= static_cast<size_t>(n);
  }
  return 0;
}

void sync_path(const std::string& path) {
  Descriptor file(open_retry(path, O_RDONLY));
  if (file.get() < 0) {
    fail_errno("open", path);
  }
  // Some file systems cannot sync a folder and say EINVAL; there is nothing more to be done there.
  if (::fsync(file.get()) != 0 && errno != EINVAL) {
    fail_errno("sync", path);
  }
}

std::string parent_of(const std::string& path) {
  const fs::path parent = fs::path(path).parent_path();
  return parent.empty() ? "." : parent.string();
}

/// "out/run/" names the folder "out/run".
std::string without_trailing_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') {
    path.pop_back();
  }
  return path;
}

std::string temporary_prefix(const std::string& target) {
  return "." + fs::path(target).filename().string() + std::string(kTemporaryMark);
}

std::string temporary_name(const std::string& target) {
  static std::atomic<unsigned> counter{0};
  return (fs::path(parent_of(target)) /
          fmt::format("{}{}-{}", temporary_prefix(target), ::getpid(), counter++))
      .string();
}

/// The file that writing to `path` means: where a link leads, or the path itself. A device, a pipe
/// or a folder there is an Error: it would be replaced with a file.
std::string file_to_write(const std::string& path) {
  std::error_code error;
  std::string target = path;
  for (int links = 0; fs::is_symlink(target, error) && links < kMostLinks; ++links) {
    const fs::path next = fs::read_symlink(target, error);
    expect(!error, "cannot write {}: the link cannot be followed: {}", path, error.message());
    target = (fs::path(parent_of(target)) / next).string();
  }
  const fs::file_status status = fs::symlink_status(target, error);
  expect(!fs::exists(status) || fs::is_regular_file(status),
         "cannot write {}: it is {}, expected a file", path,
         fs::is_directory(status) ? "a folder" : "a device, a pipe or a link without end");
  return target;
}

/// Whoever writes a temporary holds its lock; a free lock means its writer is gone.
bool lock_is_free(const std::string& path) {
  Descriptor file(open_retry(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
  return file.get() >= 0 && ::flock(file.get(), LOCK_EX | LOCK_NB) == 0;
}

template <class Predicate>
int remove_temporaries(const std::string& folder, Predicate wanted) {
  int removed = 0;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (!wanted(name) || !lock_is_free(entry.path().string())) {
      continue;
    }
    std::error_code ignored;
    if (fs::remove_all(entry.path(), ignored) > 0) {
      ++removed;
    }
  }
  return removed;
}

void remove_leftovers_of(const std::string& target) {
  const std::string prefix = temporary_prefix(target);
  remove_temporaries(parent_of(target),
                     [&](const std::string& name) { return name.starts_with(prefix); });
}

/// True when `fd` still is what `path` names: a cleaner may have been faster than our lock.
bool same_inode(int fd, const std::string& path) {
  struct stat ours {};
  struct stat theirs {};
  return ::fstat(fd, &ours) == 0 && ::lstat(path.c_str(), &theirs) == 0 &&
         ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev;
}

/// The folders that AtomicDirectories are filling, and what was written directly into them and is
/// not synced: it stays open until then, for the system may forget an error of a closed file.
class OpenFolders {
 public:
  struct Unsynced {
    std::string path;
    Descriptor file;
  };

  void open(const std::string& folder) {
    const std::lock_guard guard(mutex_);
    files_[folder];
  }
  void close(const std::string& folder) {
    const std::lock_guard guard(mutex_);
    files_.erase(folder);
  }
  bool has(const std::string& folder) {
    const std::lock_guard guard(mutex_);
    return files_.contains(folder);
  }
  void add(Unsynced file) {
    const std::lock_guard guard(mutex_);
    files_[parent_of(file.path)].push_back(std::move(file));
  }
  std::vector<Unsynced> take(const std::string& folder) {
    const std::lock_guard guard(mutex_);
    return std::exchange(files_[folder], {});
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::vector<Unsynced>> files_;
};

OpenFolders& open_folders() {
  static OpenFolders folders;
  return folders;
}

void sync_file(int fd, const std::string& path) {
  if (::fsync(fd) != 0) {
    fail_errno("sync", path);
  }
}

bool lock(int fd, const std::string& path) {
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    return false;
  }
  return same_inode(fd, path);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor file = open_regular(path, &size_);
  if (size_ == 0) {
    return;
  }
  void* memory = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.get(), 0);
  if (memory == MAP_FAILED) {
    fail_errno("map", path);
  }
  data_ = static_cast<const std::byte*>(memory);
  add_map(memory, size_, path_);
}

MappedFile::~MappedFile() {
  unmap();
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    unmap();
    path_ = std::move(other.path_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void MappedFile::unmap() {
  if (data_ != nullptr) {
    remove_map(data_);
    ::munmap(const_cast<std::byte*>(data_), size_);
  }
  data_ = nullptr;
}

void MappedFile::release(size_t offset, size_t size) const {
  CAMBIUM_CHECK(offset <= size_ && size <= size_ - offset);
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t begin = (offset + page - 1) / page * page;
  const size_t end = (offset + size) / page * page;
  if (begin < end) {
    ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_DONTNEED);
  }
}

FileReader::FileReader(std::string path) : path_(std::move(path)) {
  fd_ = open_regular(path_, &size_).take();
  ::posix_fadvise(fd_, 0, 0, POSIX_FADV_SEQUENTIAL);
}

FileReader::~FileReader() {
  if (fd_ >= 0) {
    ::close(fd_);
  }
}

FileReader::FileReader(FileReader&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(std::exchange(other.size_, 0)) {}

void FileReader::read(size_t offset, std::span<std::byte> out) const {
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t n =
        ::pread(fd_, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0) {
      fail_errno("read", path_);
    }
    expect(n > 0, "cannot read {}: it ends after {} of {} bytes: it was changed meanwhile", path_,
           offset + done, size_);
    done += static_cast<size_t>(n);
  }
}

std::string read_text_file(const std::string& path, size_t max_bytes) {
  size_t size = 0;
  const Descriptor file = open_regular(path, &size);
  expect(size <= max_bytes, "cannot read {}: it has {} bytes, expected at most {}", path, size,
         max_bytes);
  std::string text(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t n = ::read(file.get(), text.data() + done, size - done);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0) {
      fail_errno("read", path);
    }
    expect(n > 0, "cannot read {}: it ended after {} of {} bytes", path, done, size);
    done += static_cast<size_t>(n);
  }
  return text;
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  turn_size_signal_into_error();
  expect(!fs::path(path_).filename().empty(), "cannot write '{}': a file name is missing", path_);
  path_ = file_to_write(path_);
  remove_leftovers_of(path_);
  while (fd_ < 0) {
    temporary_ = temporary_name(path_);
    Descriptor file(open_retry(temporary_, O_WRONLY | O_CREAT | O_EXCL, 0666));
    if (file.get() < 0 && errno == EEXIST) {
      continue;
    }
    if (file.get() < 0) {
      fail_errno("write", path_);
    }
    if (lock(file.get(), temporary_)) {
      fd_ = file.take();
    }
  }
  buffer_.reserve(kBufferBytes);
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) {
    return;
  }
  ::unlink(temporary_.c_str());
  ::close(fd_);
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  CAMBIUM_CHECK(fd_ >= 0, "write after commit to {}", path_);
  checksum_.update(bytes);
  size_ += bytes.size();
  if (buffer_.size() + bytes.size() > kBufferBytes) {
    flush();
  }
  if (bytes.size() > kBufferBytes) {
    if (const int error = write_all(fd_, bytes.data(), bytes.size())) {
      fail_errno("write", path_, error);
    }
  } else {
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  }
}

void AtomicFile::flush() {
  stop_point();
  if (const int error = write_all(fd_, buffer_.data(), buffer_.size())) {
    fail_errno("write", path_, error);
  }
  buffer_.clear();
}

void AtomicFile::commit() {
  CAMBIUM_CHECK(fd_ >= 0, "second commit of {}", path_);
  flush();
  const bool alone = !open_folders().has(parent_of(path_));
  if (alone) {
    sync_file(fd_, path_);
  }
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail_errno("write", path_);
  }
  Descriptor file(std::exchange(fd_, -1));
  if (alone) {
    sync_path(parent_of(path_));
  } else {
    open_folders().add({path_, std::move(file)});
  }
}

void write_file_atomically(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

AtomicDirectory::AtomicDirectory(std::string target, Existing existing)
    : target_(without_trailing_slash(std::move(target))), existing_(existing) {
  turn_size_signal_into_error();
  expect(!fs::path(target_).filename().empty(), "cannot write '{}': a folder name is missing",
         target_);
  std::error_code error;
  const fs::file_status status = fs::status(target_, error);
  if (fs::exists(status)) {
    expect(fs::is_directory(status), "cannot write the folder {}: it is a file", target_);
    expect(existing == Existing::kReplace || fs::is_empty(target_, error),
           "cannot write the folder {}: it exists and is not empty; choose another name or remove "
           "it first",
           target_);
  }
  make_folder(parent_of(target_));
  remove_leftovers_of(target_);
  while (lock_ < 0) {
    temporary_ = temporary_name(target_);
    if (::mkdir(temporary_.c_str(), 0777) != 0) {
      if (errno == EEXIST) {
        continue;
      }
      fail_errno("write the folder", target_);
    }
    Descriptor folder(open_retry(temporary_, O_RDONLY | O_DIRECTORY));
    if (folder.get() < 0 && errno != ENOENT) {
      fail_errno("write the folder", target_);
    }
    if (folder.get() >= 0 && lock(folder.get(), temporary_)) {
      lock_ = folder.take();
    }
  }
  open_folders().open(temporary_);
}

AtomicDirectory::~AtomicDirectory() {
  if (lock_ < 0) {
    return;
  }
  open_folders().close(temporary_);
  std::error_code ignored;
  fs::remove_all(temporary_, ignored);
  ::close(lock_);
}

void AtomicDirectory::sync() {
  CAMBIUM_CHECK(lock_ >= 0, "sync after commit of {}", target_);
  for (const OpenFolders::Unsynced& written : open_folders().take(temporary_)) {
    sync_file(written.file.get(), written.path);
  }
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(temporary_)) {
    sync_path(entry.path().string());
  }
  sync_path(temporary_);
}

void AtomicDirectory::commit() {
  sync();
  const std::string parent = parent_of(target_);
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    if ((errno != ENOTEMPTY && errno != EEXIST) || existing_ == Existing::kRefuse) {
      fail_errno("write the folder", target_);
    }
    // The old folder steps aside under a name that no clean-up touches: were we killed between the
    // two renames, it would still be there.
    const std::string aside =
        (fs::path(parent) /
         fmt::format("{}.replaced-{}", fs::path(target_).filename().string(), ::getpid()))
            .string();
    if (::rename(target_.c_str(), aside.c_str()) != 0) {
      fail_errno("replace", target_);
    }
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
      const int error = errno;
      (void)::rename(aside.c_str(), target_.c_str());
      fail_errno("write the folder", target_, error);
    }
    std::error_code ignored;
    fs::remove_all(aside, ignored);
  }
  open_folders().close(temporary_);
  ::close(std::exchange(lock_, -1));
  sync_path(parent);
}

int remove_leftovers(const std::string& folder) {
  return remove_temporaries(folder, [](const std::string& name) {
    return name.starts_with(".") && name.find(kTemporaryMark) != std::string::npos;
  });
}

void remove_folder(const std::string& path) {
  remove_leftovers_of(path);
  const std::string leaving = temporary_name(path);
  if (::rename(path.c_str(), leaving.c_str()) != 0) {
    if (errno == ENOENT) {
      return;
    }
    fail_errno("remove the folder", path);
  }
  std::error_code error;
  fs::remove_all(leaving, error);
  if (error) {
    fail_errno("remove the folder", path, error.value());
  }
}

void make_folder(const std::string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) {
    fail_errno("create the folder", path, error.value());
  }
  expect(fs::is_directory(path, error), "cannot create the folder {}: it is a file", path);
}

LineLog::LineLog(std::string path) : path_(std::move(path)) {
  turn_size_signal_into_error();
  Descriptor file(open_retry(path_, O_RDWR | O_CREAT | O_APPEND, 0666));
  if (file.get() < 0) {
    fail_errno("write", path_);
  }
  const off_t end = ::lseek(file.get(), 0, SEEK_END);
  if (end < 0) {
    fail_errno("write", path_);
  }
  // Walk back to the last newline.
  char block[4096];
  off_t keep = end;
  bool found = end == 0;
  while (!found && keep > 0) {
    const off_t begin = std::max<off_t>(0, keep - static_cast<off_t>(sizeof block));
    const ssize_t n = ::pread(file.get(), block, static_cast<size_t>(keep - begin), begin);
    if (n != keep - begin) {
      fail_errno("read", path_);
    }
    const std::string_view text(block, static_cast<size_t>(n));
    const size_t newline = text.rfind('\n');
    found = newline != std::string_view::npos;
    keep = found ? begin + static_cast<off_t>(newline) + 1 : begin;
  }
  fd_ = file.take();
  if (keep != end) {
    truncate(static_cast<uint64_t>(keep));
  } else {
    size_ = static_cast<uint64_t>(end);
  }
}

LineLog::~LineLog() {
  ::close(fd_);
}

void LineLog::append(std::string_view line) {
  CAMBIUM_CHECK(line.find('\n') == std::string_view::npos, "a line of {} has a newline", path_);
  std::string text(line);
  text += '\n';
  const auto bytes = std::as_bytes(std::span(text));
  if (const int error = write_all(fd_, bytes.data(), bytes.size())) {
    (void)!::ftruncate(fd_, static_cast<off_t>(size_));
    fail_errno("write", path_, error);
  }
  size_ += bytes.size();
}

void LineLog::truncate(uint64_t size) {
  if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) {
    fail_errno("shorten", path_);
  }
  size_ = size;
}

void LineLog::sync() {
  sync_file(fd_, path_);
  expect(same_inode(fd_, path_), "{} was removed or replaced while it was being written", path_);
}

}  // namespace cambium
