#include "base/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>
#include <system_error>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxMarkBytes = 4096;

std::string reason(int error) {
  return std::generic_category().message(error);
}

bool is_there(const fs::path& path) {
  std::error_code error;
  // A link that leads nowhere is in the way as well.
  return fs::symlink_status(path, error).type() != fs::file_type::not_found;
}

/// What the mark says: kind of run and process.
nlohmann::json read_mark(const fs::path& mark) {
  nlohmann::json json = try_json<nlohmann::json>(read_text_file(mark.string(), kMaxMarkBytes));
  return json.is_object() ? json : nlohmann::json::object();
}

/// Whether the open file is the one at this path.
bool is_at(int fd, const fs::path& path) {
  struct stat ours {};
  struct stat theirs {};
  return ::fstat(fd, &ours) == 0 && ::lstat(path.c_str(), &theirs) == 0 &&
         ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev;
}

bool holds_only_mark(const fs::path& folder) {
  std::error_code error;
  fs::directory_iterator entry(folder, error);
  const fs::directory_iterator end;
  return !error && entry != end && entry->path().filename() == RunFolder::kMark &&
         entry.increment(error) == end && !error;
}

/// Opens the mark and takes its lock; -1 when another process has it.
int lock_mark(const fs::path& mark) {
  while (true) {
    const int fd = ::open(mark.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0 && errno == EINTR) {
      continue;
    }
    expect(fd >= 0, "cannot write {}: {}", mark.string(), reason(errno));
    if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      ::close(fd);
      if (error == EINTR) {
        continue;
      }
      expect(error == EWOULDBLOCK, "cannot lock {}: {}", mark.string(), reason(error));
      return -1;
    }
    if (is_at(fd, mark)) {
      return fd;
    }
    ::close(fd);  // it was replaced between opening and locking
  }
}

void write_mark(int fd, const fs::path& mark, const std::string& kind) {
  const std::string text =
      nlohmann::ordered_json{{"program", "cambium"}, {"run", kind}, {"process", ::getpid()}}
          .dump() +
      "\n";
  const bool written = ::ftruncate(fd, 0) == 0 && ::pwrite(fd, text.data(), text.size(), 0) ==
                                                      static_cast<ssize_t>(text.size());
  expect(written, "cannot write {}: {}", mark.string(), reason(errno));
}

}  // namespace

RunFolder::RunFolder(fs::path path, const RunFolderUse& use) : path_(std::move(path)) {
  const std::string shown = path_.string();
  const fs::path mark = path_ / kMark;
  const bool marked = is_there(mark);
  std::string found;  // the first of the run's names that is there
  for (const std::string& name : use.names) {
    if (found.empty() && is_there(path_ / name)) {
      found = name;
    }
  }
  const std::string begun =
      fmt::format("{} holds a run already; go on with --resume, or choose another folder", shown);
  if (!marked && !found.empty()) {
    const bool ours = use.looks_ours && use.looks_ours(path_);
    expect(ours,
           "{} is in the way: it was not written by a `{}` run (there is no {} beside it); move it "
           "away or choose another folder",
           (path_ / found).string(), use.kind, kMark);
    expect(use.resume, "{}", begun);
  }
  const bool folder_is_new = !is_there(path_);
  make_folder(shown);
  lock_ = lock_mark(mark);
  try {
    if (lock_ < 0) {
      fail(
          "{} is in use by another run (process {}); wait until it has ended, or choose another "
          "folder",
          shown, read_mark(mark).value("process", nlohmann::json("unknown")).dump());
    }
    if (marked) {
      const nlohmann::json kind = read_mark(mark).value("run", nlohmann::json());
      // A mark that was being written when its process was killed says nothing.
      expect(!kind.is_string() || kind == use.kind,
             "{} holds a run of `{}`, not of `{}`; choose another folder", shown, kind.dump(),
             use.kind);
      expect(use.resume || found.empty(), "{}", begun);
    }
    write_mark(lock_, mark, use.kind);
    mark_is_new_ = !marked;
    folder_is_new_ = folder_is_new;
  } catch (...) {
    if (lock_ >= 0) {
      ::close(lock_);
    }
    throw;
  }
}

RunFolder::~RunFolder() {
  if (mark_is_new_ && holds_only_mark(path_) && is_at(lock_, path_ / kMark)) {
    std::error_code ignored;
    fs::remove(path_ / kMark, ignored);
    if (folder_is_new_) {
      fs::remove(path_, ignored);
    }
  }
  ::close(lock_);
}

void RunFolder::expect_present() const {
  expect(is_at(lock_, path_ / kMark),
         "the run's folder {} was removed, moved or replaced while the run was going, and its log "
         "and checkpoints with it; nothing more is written there",
         path_.string());
}

void RunFolder::expect_room(uint64_t bytes, std::string_view what) const {
  std::error_code unknown;
  const fs::space_info space = fs::space(path_, unknown);
  expect(unknown || space.available >= bytes,
         "{}: {} are needed for {}, and {} are free there; free some space, or give another folder",
         path_.string(), human_bytes(bytes), what, human_bytes(space.available));
}

}  // namespace cambium
