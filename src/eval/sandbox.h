// Running a program that nobody has read, such as the Python a model answered with: no network, no
// writes outside a folder of its own, no further processes, and limits on time, memory and output.
//
// Landlock confines what it can write and a seccomp filter refuses sockets, new processes, signals
// to others and whatever changes the system; both are inherited and cannot be taken off. A root
// caller's program runs as nobody. Non-goals: hiding files it may read, and kernels without
// Landlock (Linux before 5.13), where running is an Error instead of running without protection.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cambium {

struct SandboxLimits {
  double wall_seconds = 10.0;
  double cpu_seconds = 10.0;                 // rounded up to whole seconds
  int64_t memory_bytes = int64_t{1} << 30;   // address space
  int64_t output_bytes = int64_t{1} << 16;   // of standard output and error together
  int64_t written_bytes = int64_t{1} << 26;  // in its folder
};

enum class SandboxOutcome : uint8_t {
  kExited,          // `status` is its exit status
  kSignalled,       // `status` is the signal that ended it
  kOutOfTime,       // wall or CPU
  kTooMuchOutput,   // killed at output_bytes
  kTooMuchWritten,  // killed above written_bytes
};

struct SandboxResult {
  SandboxOutcome outcome = SandboxOutcome::kExited;
  int status = 0;
  std::string output;  // standard output and error as they came, output_bytes at most
  double seconds = 0.0;
};

/// "exit status 1", "killed by signal 11", "out of time (10 s)", ...
std::string describe(const SandboxResult& result, const SandboxLimits& limits);

struct SandboxFile {
  std::string name;  // plain, in the program's folder
  std::string text;
};

/// Runs `command` (its first word a path or found in PATH) in a fresh folder that holds `files` and
/// is removed afterwards. Error where the machine cannot protect itself (it says what is missing)
/// or the program cannot be started. Safe to call from several threads.
SandboxResult run_sandboxed(const std::vector<std::string>& command,
                            const std::vector<SandboxFile>& files,
                            const SandboxLimits& limits = {});

}  // namespace cambium
