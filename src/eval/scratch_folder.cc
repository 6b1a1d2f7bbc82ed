#include "eval/scratch_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

constexpr int kMostLevels = 32;
constexpr int64_t kLeastBytes = 4096;  // of an entry, however empty

/// The entries of a folder, listable or not: whoever owns it can make it so.
class Listing {
 public:
  Listing(int at, const char* name) {
    constexpr int kFlags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    int fd = ::openat(at, name, kFlags);
    if (fd < 0 && errno == EACCES && ::fchmodat(at, name, 0700, 0) == 0) {
      fd = ::openat(at, name, kFlags);
    }
    folder_ = fd < 0 ? nullptr : ::fdopendir(fd);
    if (folder_ == nullptr && fd >= 0) {
      ::close(fd);
    }
  }
  ~Listing() {
    if (folder_ != nullptr) {
      ::closedir(folder_);
    }
  }
  Listing(const Listing&) = delete;
  Listing& operator=(const Listing&) = delete;
  int fd() const { return folder_ == nullptr ? -1 : ::dirfd(folder_); }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    const dirent* entry = nullptr;
    while (folder_ != nullptr && (entry = ::readdir(folder_)) != nullptr) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") {
        names.push_back(name);
      }
    }
    return names;
  }

 private:
  DIR* folder_ = nullptr;
};

bool is_folder(int at, const std::string& name, struct stat& info) {
  return ::fstatat(at, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(info.st_mode);
}

int64_t measure(int at, const char* name, int level, int64_t enough) {
  if (level > kMostLevels) {
    return enough + 1;
  }
  const Listing listing(at, name);
  int64_t sum = 0;
  for (const std::string& entry : listing.names()) {
    struct stat info {};
    const bool folder = is_folder(listing.fd(), entry, info);
    sum += std::max<int64_t>(info.st_blocks * 512, kLeastBytes);
    if (folder && sum <= enough) {
      sum += measure(listing.fd(), entry.c_str(), level + 1, enough - sum);
    }
    if (sum > enough) {
      break;
    }
  }
  return sum;
}

/// Empties the folder without going deeper than one level: folders in folders are first moved to
/// the top, so that no nesting is too deep for it.
void empty(int top) {
  int64_t number = 0;
  for (bool again = true; again;) {
    again = false;
    const Listing all(top, ".");
    for (const std::string& name : all.names()) {
      struct stat info {};
      if (!is_folder(top, name, info)) {
        again = ::unlinkat(top, name.c_str(), 0) == 0 || again;
        continue;
      }
      {
        const Listing inside(top, name.c_str());
        for (const std::string& entry : inside.names()) {
          if (is_folder(inside.fd(), entry, info)) {
            ::fchmodat(inside.fd(), entry.c_str(), 0700, 0);
            const std::string to = fmt::format(".cambium-{}", number++);
            again = ::renameat(inside.fd(), entry.c_str(), top, to.c_str()) == 0 || again;
          } else {
            ::unlinkat(inside.fd(), entry.c_str(), 0);
          }
        }
      }
      again = ::unlinkat(top, name.c_str(), AT_REMOVEDIR) == 0 || again;
    }
  }
}

}  // namespace

ScratchFolder::ScratchFolder(uint32_t owner) {
  std::string pattern = (fs::temp_directory_path() / "cambium-run-XXXXXX").string();
  expect(::mkdtemp(pattern.data()) != nullptr, "[sandbox] cannot make a folder like {}: {}",
         pattern, std::strerror(errno));
  path_ = pattern;
  if (::geteuid() == 0) {
    expect(::chown(path_.c_str(), owner, owner) == 0, "[sandbox] cannot give {} to user {}: {}",
           path_.string(), owner, std::strerror(errno));
  }
}

ScratchFolder::~ScratchFolder() {
  {
    const Listing folder(AT_FDCWD, path_.c_str());
    if (folder.fd() >= 0) {
      empty(folder.fd());
    }
  }
  ::rmdir(path_.c_str());
}

int64_t ScratchFolder::bytes(int64_t enough) const {
  return measure(AT_FDCWD, path_.c_str(), 0, enough);
}

int64_t unnamed_bytes(int pid) {
  const std::string folder = fmt::format("/proc/{}/fd", pid);
  const Listing listing(AT_FDCWD, folder.c_str());
  int64_t sum = 0;
  for (const std::string& name : listing.names()) {
    struct stat info {};
    if (::fstatat(listing.fd(), name.c_str(), &info, 0) == 0 && S_ISREG(info.st_mode) &&
        info.st_nlink == 0) {
      sum += info.st_blocks * 512;
    }
  }
  return sum;
}

}  // namespace cambium
