#include "eval/sandbox.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>

#include "base/error.h"
#include "eval/scratch_folder.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

constexpr uid_t kNobody = 65534;
constexpr int kMostOpenFiles = 64;

#if defined(__x86_64__)
constexpr uint32_t kArch = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
constexpr uint32_t kArch = AUDIT_ARCH_AARCH64;
#else
constexpr uint32_t kArch = 0;
#endif

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor() { reset(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  void reset(int fd = -1) {
    if (fd_ >= 0) {
      ::close(fd_);
    }
    fd_ = fd;
  }

 private:
  int fd_;
};

// System calls that a program under test has no business with; each gives EPERM.
constexpr auto kRefused = std::to_array<long>({
#ifdef __NR_fork
    __NR_fork,
#endif
#ifdef __NR_vfork
    __NR_vfork,
#endif
#ifdef __NR_chmod
    __NR_chmod,
#endif
#ifdef __NR_chown
    __NR_chown,
#endif
#ifdef __NR_lchown
    __NR_lchown,
#endif
#ifdef __NR_utime
    __NR_utime,
#endif
#ifdef __NR_utimes
    __NR_utimes,
#endif
#ifdef __NR_futimesat
    __NR_futimesat,
#endif
#ifdef __NR_mknod
    __NR_mknod,
#endif
#ifdef __NR_fchmodat2
    __NR_fchmodat2,
#endif
    __NR_socket,
    __NR_memfd_create,  // memory that no limit counts
    __NR_ioprio_set,
    __NR_sched_setparam,
    __NR_process_madvise,
    __NR_move_pages,
    __NR_migrate_pages,
    __NR_io_uring_setup,
    __NR_kill,
    __NR_tkill,
    __NR_pidfd_open,
    __NR_pidfd_send_signal,
    __NR_pidfd_getfd,
    __NR_rt_sigqueueinfo,
    __NR_rt_tgsigqueueinfo,
    __NR_ptrace,
    __NR_process_vm_readv,
    __NR_process_vm_writev,
    __NR_mount,
    __NR_umount2,
    __NR_pivot_root,
    __NR_chroot,
    __NR_unshare,
    __NR_setns,
    __NR_move_mount,
    __NR_open_tree,
    __NR_fsopen,
    __NR_fsmount,
    __NR_mount_setattr,
    __NR_open_by_handle_at,
    __NR_bpf,
    __NR_perf_event_open,
    __NR_userfaultfd,
    __NR_add_key,
    __NR_request_key,
    __NR_keyctl,
    __NR_kexec_load,
    __NR_init_module,
    __NR_finit_module,
    __NR_delete_module,
    __NR_reboot,
    __NR_swapon,
    __NR_swapoff,
    __NR_sethostname,
    __NR_setdomainname,
    __NR_settimeofday,
    __NR_clock_settime,
    __NR_adjtimex,
    __NR_acct,
    __NR_quotactl,
    __NR_syslog,
    __NR_fchmod,
    __NR_fchmodat,
    __NR_fchown,
    __NR_fchownat,
    __NR_utimensat,
    __NR_setxattr,
    __NR_lsetxattr,
    __NR_fsetxattr,
    __NR_removexattr,
    __NR_lremovexattr,
    __NR_fremovexattr,
    __NR_truncate,
    __NR_mknodat,
    __NR_shmget,
    __NR_semget,
    __NR_msgget,
    __NR_mq_open,
    __NR_setpriority,
    __NR_sched_setscheduler,
    __NR_sched_setattr,
});

/// Calls refused for some values of one argument: those by which a program reaches another of the
/// same user, or outlives this one.
struct RefusedArgument {
  long number;
  unsigned argument;
  std::vector<uint32_t> values;  // of its low half
  bool all_but = false;          // every value but these
};

std::vector<RefusedArgument> refused_arguments() {
  return {
      // Limits and processors of others; 0 is the program itself.
      {__NR_prlimit64, 0, {0}, true},
      {__NR_sched_setaffinity, 0, {0}, true},
      // A pipe that signals the process its owner is set to.
      {__NR_fcntl, 1, {F_SETOWN, 15 /* F_SETOWN_EX */, 10 /* F_SETSIG */}},
      {__NR_ioctl, 1, {FIOSETOWN, SIOCSPGRP, TIOCSTI}},
      // Ends with its parent.
      {__NR_prctl, 0, {PR_SET_PDEATHSIG}},
  };
}

/// The filter: the lists above and new processes are refused, threads and the rest are allowed.
std::vector<sock_filter> make_filter() {
  const auto load = [](size_t offset) {
    return sock_filter{BPF_LD | BPF_W | BPF_ABS, 0, 0, static_cast<uint32_t>(offset)};
  };
  const auto give = [](uint32_t action) { return sock_filter{BPF_RET | BPF_K, 0, 0, action}; };
  // Skips the next instruction unless the loaded word equals `value`.
  const auto unless_equal = [](uint32_t value) {
    return sock_filter{BPF_JMP | BPF_JEQ | BPF_K, 0, 1, value};
  };
  const uint32_t refuse = SECCOMP_RET_ERRNO | EPERM;
  std::vector<sock_filter> filter = {
      load(offsetof(seccomp_data, arch)),
      {BPF_JMP | BPF_JEQ | BPF_K, 1, 0, kArch},
      give(SECCOMP_RET_KILL_PROCESS),
      load(offsetof(seccomp_data, nr)),
      // x32 calls carry this bit and would pass by the numbers below.
      {BPF_JMP | BPF_JGE | BPF_K, 0, 1, 0x40000000},
      give(SECCOMP_RET_KILL_PROCESS),
  };
  for (const long number : kRefused) {
    filter.push_back(unless_equal(static_cast<uint32_t>(number)));
    filter.push_back(give(refuse));
  }
  for (const RefusedArgument& call : refused_arguments()) {
    const auto values = static_cast<uint8_t>(call.values.size());
    // Load the argument; a jump a value; what meets none; what meets one.
    filter.push_back({BPF_JMP | BPF_JEQ | BPF_K, 0, static_cast<uint8_t>(values + 3),
                      static_cast<uint32_t>(call.number)});
    filter.push_back(load(offsetof(seccomp_data, args) + 8 * call.argument));
    for (uint8_t i = 0; i < values; ++i) {
      filter.push_back(
          {BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint8_t>(values - i), 0, call.values[i]});
    }
    filter.push_back(give(call.all_but ? refuse : SECCOMP_RET_ALLOW));
    filter.push_back(give(call.all_but ? SECCOMP_RET_ALLOW : refuse));
  }
  // The flags of clone3 are behind a pointer; the C library falls back to clone.
  filter.push_back(unless_equal(__NR_clone3));
  filter.push_back(give(SECCOMP_RET_ERRNO | ENOSYS));
  // A thread signals its own process by tgkill (abort does), but may name another's with it.
  filter.push_back(unless_equal(__NR_tgkill));
  filter.push_back(give(refuse));
  // clone: threads yes, processes no.
  filter.push_back({BPF_JMP | BPF_JEQ | BPF_K, 0, 3, __NR_clone});
  filter.push_back(load(offsetof(seccomp_data, args)));  // the low half of the flags
  filter.push_back({BPF_JMP | BPF_JSET | BPF_K, 1, 0, 0x00010000 /* CLONE_THREAD */});
  filter.push_back(give(refuse));
  filter.push_back(give(SECCOMP_RET_ALLOW));
  return filter;
}

/// A Landlock ruleset: writing anywhere but below `folder` and to /dev/null is refused.
void make_ruleset(Descriptor& ruleset, const fs::path& folder) {
  const long abi =
      ::syscall(__NR_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION);
  expect(abi >= 1,
         "[sandbox] this kernel cannot confine a program's writes (Landlock: {}); programs that a "
         "model wrote are run on Linux 5.13 or newer with Landlock enabled (lsm=landlock,...)",
         std::strerror(errno));
  landlock_ruleset_attr attributes{};
  attributes.handled_access_fs = LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_REMOVE_DIR |
                                 LANDLOCK_ACCESS_FS_REMOVE_FILE | LANDLOCK_ACCESS_FS_MAKE_CHAR |
                                 LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_MAKE_REG |
                                 LANDLOCK_ACCESS_FS_MAKE_SOCK | LANDLOCK_ACCESS_FS_MAKE_FIFO |
                                 LANDLOCK_ACCESS_FS_MAKE_BLOCK | LANDLOCK_ACCESS_FS_MAKE_SYM;
  constexpr uint64_t kRefer = uint64_t{1} << 13;     // ABI 2
  constexpr uint64_t kTruncate = uint64_t{1} << 14;  // ABI 3
  if (abi >= 2) {
    attributes.handled_access_fs |= kRefer;
  }
  if (abi >= 3) {
    attributes.handled_access_fs |= kTruncate;
  }
  ruleset.reset(static_cast<int>(
      ::syscall(__NR_landlock_create_ruleset, &attributes, sizeof(attributes), 0)));
  expect(ruleset.get() >= 0, "[sandbox] cannot make a Landlock ruleset: {}", std::strerror(errno));
  const auto allow = [&](const fs::path& path, uint64_t access) {
    const Descriptor at(::open(path.c_str(), O_PATH | O_CLOEXEC));
    landlock_path_beneath_attr rule{};
    rule.allowed_access = access;
    rule.parent_fd = at.get();
    expect(at.get() >= 0 && ::syscall(__NR_landlock_add_rule, ruleset.get(),
                                      LANDLOCK_RULE_PATH_BENEATH, &rule, 0) == 0,
           "[sandbox] cannot allow writes to {}: {}", path.string(), std::strerror(errno));
  };
  allow(folder, attributes.handled_access_fs);
  const uint64_t file = LANDLOCK_ACCESS_FS_WRITE_FILE | (abi >= 3 ? kTruncate : 0);
  allow("/dev/null", file & attributes.handled_access_fs);
}

std::string find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) {
    return name;
  }
  // What the system brings comes first: a program run as nobody cannot use one in a home folder.
  std::string path = "/usr/bin:/bin:";
  if (const char* set = std::getenv("PATH")) {
    path += set;
  }
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find(':', begin), path.size());
    const std::string file = path.substr(begin, end - begin) + "/" + name;
    if (::access(file.c_str(), X_OK) == 0) {
      return file;
    }
    begin = end + 1;
  }
  fail("[sandbox] {} is needed to run what the model wrote and is not installed (looked in {})",
       name, path);
}

/// Everything the child needs, made before the fork: between fork and exec only calls that are safe
/// in a copy of a threaded process are made.
struct Launch {
  const char* program;
  std::vector<char*> argv, environment;
  const char* folder;
  int ruleset, output, report;
  sock_fprog filter;
  SandboxLimits limits;
};

struct Failure {
  int step;
  int error;
};

const char* step_name(int step) {
  static constexpr std::array<const char*, 8> kNames = {
      "entering its folder",    "redirecting its output",  "setting limits",
      "giving up root",         "refusing new privileges", "confining writes",
      "filtering system calls", "starting the program"};
  return kNames.at(static_cast<size_t>(step));
}

[[noreturn]] void start(const Launch& launch) {
  const auto give_up = [&](int step) {
    const Failure failure{step, errno};
    [[maybe_unused]] const ssize_t written = ::write(launch.report, &failure, sizeof(failure));
    ::_exit(127);
  };
  const auto limit = [&](auto resource, int64_t value) {
    const rlimit r{static_cast<rlim_t>(value), static_cast<rlim_t>(value)};
    if (::setrlimit(resource, &r) != 0) {
      give_up(2);
    }
  };
  ::setsid();
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::chdir(launch.folder) != 0) {
    give_up(0);
  }
  const int null = ::open("/dev/null", O_RDONLY);
  if (null < 0 || ::dup2(null, 0) < 0 || ::dup2(launch.output, 1) < 0 ||
      ::dup2(launch.output, 2) < 0) {
    give_up(1);
  }
  limit(RLIMIT_CORE, 0);
  limit(RLIMIT_CPU, static_cast<int64_t>(std::ceil(launch.limits.cpu_seconds)));
  limit(RLIMIT_AS, launch.limits.memory_bytes);
  limit(RLIMIT_FSIZE, launch.limits.written_bytes);
  limit(RLIMIT_NOFILE, kMostOpenFiles);
  if (::geteuid() == 0 && (::syscall(__NR_setgroups, 0, nullptr) != 0 ||
                           ::syscall(__NR_setresgid, kNobody, kNobody, kNobody) != 0 ||
                           ::syscall(__NR_setresuid, kNobody, kNobody, kNobody) != 0)) {
    give_up(3);
  }
  // The change of user cleared it.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
    give_up(4);
  }
  if (::syscall(__NR_landlock_restrict_self, launch.ruleset, 0) != 0) {
    give_up(5);
  }
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::signal(SIGPIPE, SIG_DFL);
  ::signal(SIGINT, SIG_DFL);
  ::signal(SIGTERM, SIG_DFL);
  // Nothing that this process has open is the program's.
  ::syscall(__NR_close_range, 3U, ~0U, 4U /* CLOSE_RANGE_CLOEXEC */);
  if (::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &launch.filter) != 0) {
    give_up(6);
  }
  ::execve(launch.program, launch.argv.data(), launch.environment.data());
  give_up(7);
  ::_exit(127);
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Reads what the program prints until it ends or passes a limit, and reaps it.
SandboxResult watch(pid_t child, int output, const ScratchFolder& folder,
                    const SandboxLimits& limits) {
  SandboxResult result;
  const auto begin = std::chrono::steady_clock::now();
  std::optional<SandboxOutcome> killed;
  const auto kill_for = [&](SandboxOutcome why) {
    killed = killed.value_or(why);
    ::kill(child, SIGKILL);
  };
  int status = 0;
  for (bool open = true, running = true; running;) {
    if (open) {
      pollfd waiting{output, POLLIN, 0};
      ::poll(&waiting, 1, 20);
      std::array<char, 4096> piece{};
      const ssize_t n = waiting.revents == 0 ? -1 : ::read(output, piece.data(), piece.size());
      open = n != 0;
      if (n > 0) {
        const auto room = static_cast<size_t>(limits.output_bytes) - result.output.size();
        result.output.append(piece.data(), std::min(room, static_cast<size_t>(n)));
        if (static_cast<size_t>(n) > room) {
          kill_for(SandboxOutcome::kTooMuchOutput);
        }
      }
    } else {
      ::usleep(2000);
    }
    if (seconds_since(begin) > limits.wall_seconds) {
      kill_for(SandboxOutcome::kOutOfTime);
    }
    if (folder.bytes(limits.written_bytes) + unnamed_bytes(child) > limits.written_bytes) {
      kill_for(SandboxOutcome::kTooMuchWritten);
    }
    // What is still in the pipe is read before the end is noticed.
    if (!open || killed) {
      running = ::waitpid(child, &status, killed ? 0 : WNOHANG) == 0;
    }
  }
  result.seconds = seconds_since(begin);
  if (killed) {
    result.outcome = *killed;
  } else if (WIFSIGNALED(status)) {
    result.status = WTERMSIG(status);
    const bool time = result.status == SIGXCPU || result.status == SIGKILL;
    result.outcome = time ? SandboxOutcome::kOutOfTime
                          : (result.status == SIGXFSZ ? SandboxOutcome::kTooMuchWritten
                                                      : SandboxOutcome::kSignalled);
  } else {
    result.status = WEXITSTATUS(status);
  }
  return result;
}

std::vector<char*> pointers(std::vector<std::string>& words) {
  std::vector<char*> out;
  out.reserve(words.size() + 1);
  for (std::string& word : words) {
    out.push_back(word.data());
  }
  out.push_back(nullptr);
  return out;
}

}  // namespace

std::string describe(const SandboxResult& result, const SandboxLimits& limits) {
  switch (result.outcome) {
    case SandboxOutcome::kExited:
      return fmt::format("exit status {}", result.status);
    case SandboxOutcome::kSignalled:
      return fmt::format("killed by signal {}", result.status);
    case SandboxOutcome::kOutOfTime:
      return fmt::format("out of time ({} s)", std::min(limits.wall_seconds, limits.cpu_seconds));
    case SandboxOutcome::kTooMuchOutput:
      return fmt::format("more than {} bytes of output", limits.output_bytes);
    case SandboxOutcome::kTooMuchWritten:
      return fmt::format("more than {} bytes written", limits.written_bytes);
  }
  return "";
}

SandboxResult run_sandboxed(const std::vector<std::string>& command,
                            const std::vector<SandboxFile>& files, const SandboxLimits& limits) {
  CAMBIUM_CHECK(!command.empty() && kArch != 0, "sandbox of nothing, or on an unknown machine");
  std::vector<std::string> words = command;
  const std::string program = find_program(command[0]);
  const ScratchFolder folder(kNobody);
  for (const SandboxFile& file : files) {
    const fs::path path = folder.path() / file.name;
    std::ofstream out(path, std::ios::binary);
    out << file.text;
    expect(static_cast<bool>(out.flush()), "[sandbox] cannot write {}", path.string());
    fs::permissions(path, fs::perms(0644));
  }
  std::vector<std::string> environment = {
      "PATH=/usr/bin:/bin", "HOME=" + folder.path().string(), "TMPDIR=" + folder.path().string(),
      "LANG=C.UTF-8",       "PYTHONDONTWRITEBYTECODE=1",      "PYTHONHASHSEED=0"};
  Descriptor ruleset;
  make_ruleset(ruleset, folder.path());
  std::vector<sock_filter> filter = make_filter();
  std::array<int, 2> output{}, report{};
  expect(::pipe2(output.data(), O_CLOEXEC) == 0, "[sandbox] no pipe: {}", std::strerror(errno));
  const Descriptor output_read(output[0]);
  Descriptor output_write(output[1]);
  expect(::pipe2(report.data(), O_CLOEXEC) == 0, "[sandbox] no pipe: {}", std::strerror(errno));
  const Descriptor report_read(report[0]);
  Descriptor report_write(report[1]);
  const Launch launch{program.c_str(),
                      pointers(words),
                      pointers(environment),
                      folder.path().c_str(),
                      ruleset.get(),
                      output_write.get(),
                      report_write.get(),
                      {static_cast<unsigned short>(filter.size()), filter.data()},
                      limits};
  const pid_t child = ::fork();
  expect(child >= 0, "[sandbox] cannot start a process: {}", std::strerror(errno));
  if (child == 0) {
    start(launch);
  }
  output_write.reset();
  report_write.reset();
  Failure failure{};
  // Ends when the program has started (the pipe closes by exec) or could not be.
  const ssize_t told = ::read(report_read.get(), &failure, sizeof(failure));
  if (told == static_cast<ssize_t>(sizeof(failure))) {
    ::waitpid(child, nullptr, 0);
    fail("[sandbox] {} could not be run: {} failed: {}", program, step_name(failure.step),
         std::strerror(failure.error));
  }
  return watch(child, output_read.get(), folder, limits);
}

}  // namespace cambium
