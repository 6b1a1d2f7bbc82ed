#include "eval/sandbox.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/test_folder.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

SandboxResult python(const std::string& code, const SandboxLimits& limits = {}) {
  return run_sandboxed({"python3", "-I", "main.py"}, {{"main.py", code}}, limits);
}

SandboxLimits short_time(double seconds) {
  SandboxLimits limits;
  limits.wall_seconds = seconds;
  return limits;
}

TEST(Sandbox, GivesOutputAndStatus) {
  const SandboxResult good = python("import math\nprint(math.sqrt(16))");
  EXPECT_EQ(good.outcome, SandboxOutcome::kExited);
  EXPECT_EQ(good.status, 0);
  EXPECT_EQ(good.output, "4.0\n");
  const SandboxResult bad = python("assert 1 == 2, 'no'");
  EXPECT_EQ(bad.status, 1);
  EXPECT_THAT(bad.output, HasSubstr("AssertionError: no"));
}

TEST(Sandbox, AnEndlessLoopIsStopped) {
  const SandboxResult wall = python("import time\nwhile True: time.sleep(0.1)", short_time(0.6));
  EXPECT_EQ(wall.outcome, SandboxOutcome::kOutOfTime);
  EXPECT_LT(wall.seconds, 5.0);
  SandboxLimits limits;
  limits.cpu_seconds = 1;
  EXPECT_EQ(python("while True: pass", limits).outcome, SandboxOutcome::kOutOfTime);
  EXPECT_THAT(describe(wall, short_time(0.6)), HasSubstr("out of time (0.6 s)"));
}

TEST(Sandbox, AClosedOutputDoesNotHideAProgramThatGoesOn) {
  const SandboxResult result =
      python("import os, time\nos.close(1); os.close(2)\ntime.sleep(60)", short_time(0.6));
  EXPECT_EQ(result.outcome, SandboxOutcome::kOutOfTime);
}

TEST(Sandbox, NoFurtherProcesses) {
  for (const char* code :
       {"import os\nos.fork()", "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing as m\np = m.Process(target=print)\np.start()"}) {
    const SandboxResult result = python(code);
    EXPECT_EQ(result.status, 1) << code;
    EXPECT_THAT(result.output, HasSubstr("PermissionError")) << code;
  }
}

TEST(Sandbox, ThreadsAreAllowed) {
  EXPECT_EQ(python("import threading as t\nx = t.Thread(target=lambda: print('ran'))\n"
                   "x.start(); x.join()")
                .output,
            "ran\n");
}

TEST(Sandbox, NoNetwork) {
  for (const char* family : {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"}) {
    const SandboxResult result = python(std::string("import socket\nsocket.socket(socket.") +
                                        family + ", socket.SOCK_DGRAM)");
    EXPECT_EQ(result.status, 1) << family;
    EXPECT_THAT(result.output, HasSubstr("PermissionError")) << family;
  }
}

TEST(Sandbox, WritesStayInItsFolder) {
  const TestFolder outside;
  const std::string target = (std::filesystem::path(outside.path()) / "file").string();
  { std::ofstream(target) << "precious"; }
  std::filesystem::permissions(target, std::filesystem::perms(0666));
  std::filesystem::permissions(outside.path(), std::filesystem::perms(0777));
  const std::string path = "p = '" + target + "'\nimport os\n";
  for (const char* attempt :
       {"open(p, 'w')", "open(p, 'a')", "os.truncate(p, 0)", "os.remove(p)", "os.chmod(p, 0)",
        "os.utime(p)", "os.rename(p, p + '2')", "os.link(p, p + '3')", "os.symlink(p, p + '4')",
        "os.mkdir(p + '5')", "open(p + '6', 'w')", "os.rename(p, 'here')",
        "open('/tmp/cambium_sandbox_escape', 'w')", "open('/dev/shm/cambium_escape', 'w')",
        "os.kill(os.getppid(), 0)"}) {
    const SandboxResult result = python(path + attempt);
    EXPECT_EQ(result.status, 1) << attempt << "\n" << result.output;
  }
  std::ifstream in(target);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "precious");
  EXPECT_FALSE(std::filesystem::exists("/tmp/cambium_sandbox_escape"));
  EXPECT_EQ(python("open('note', 'w').write('x')\nprint(open('note').read())").output, "x\n");
  EXPECT_EQ(python(path + "print(open(p).read())").output, "precious\n");  // reading is no secret
}

TEST(Sandbox, ItsFolderIsGoneAfterwards) {
  const SandboxResult result =
      python("import os\nos.mkdir('d')\nopen('d/f', 'w')\nprint(os.getcwd())");
  ASSERT_EQ(result.status, 0) << result.output;
  EXPECT_FALSE(std::filesystem::exists(result.output.substr(0, result.output.size() - 1)));
}

TEST(Sandbox, MemoryOutputAndFilesAreLimited) {
  SandboxLimits limits;
  limits.memory_bytes = int64_t{256} << 20;
  EXPECT_THAT(python("x = bytearray(1 << 30)", limits).output, HasSubstr("MemoryError"));
  limits.output_bytes = 1000;
  const SandboxResult loud = python("while True: print('x' * 100)", limits);
  EXPECT_EQ(loud.outcome, SandboxOutcome::kTooMuchOutput);
  EXPECT_EQ(loud.output.size(), 1000U);
  limits.written_bytes = 1 << 20;
  const SandboxResult big = python("open('f', 'wb').write(b'x' * (1 << 22))", limits);
  EXPECT_TRUE(big.outcome == SandboxOutcome::kTooMuchWritten || big.status == 1) << big.output;
  const SandboxResult many = python(
      "import time\nfor i in range(1000): open(f'f{i}', 'wb').write(b'x' * 100000); "
      "time.sleep(.01)",
      limits);
  EXPECT_EQ(many.outcome, SandboxOutcome::kTooMuchWritten);
}

TEST(Sandbox, FoldersNestedWithoutEndOrThatCannotBeListedAreCountedAndRemoved) {
  const TestFolder temporary;
  std::filesystem::permissions(temporary.path(), std::filesystem::perms(0777));
  ::setenv("TMPDIR", temporary.path().c_str(), 1);
  SandboxLimits limits;
  limits.written_bytes = 1 << 20;
  limits.wall_seconds = 20;
  const SandboxResult nested =
      python("import os\nwhile True:\n  os.mkdir('d')\n  os.chdir('d')\n  open('f', 'w')", limits);
  EXPECT_EQ(nested.outcome, SandboxOutcome::kTooMuchWritten) << nested.output;
  const SandboxResult hidden = python(
      "import os, time\nfor i in range(3):\n  os.mkdir('d', 0o300)\n  os.chdir('d')\n"
      "for i in range(100):\n  open(f'f{i}', 'wb').write(b'x' * 100000)\ntime.sleep(30)",
      limits);
  EXPECT_EQ(hidden.outcome, SandboxOutcome::kTooMuchWritten) << hidden.output;
  ::unsetenv("TMPDIR");
  EXPECT_TRUE(std::filesystem::is_empty(temporary.path()));
}

TEST(Sandbox, FilesWithoutANameAreCounted) {
  SandboxLimits limits;
  limits.written_bytes = 1 << 22;
  const SandboxResult result = python(
      "import os, time\nheld = []\nfor i in range(20):\n  f = open('f', 'wb', 0)\n"
      "  os.unlink('f')\n  f.write(b'x' * (1 << 20))\n  held.append(f)\ntime.sleep(30)",
      limits);
  EXPECT_EQ(result.outcome, SandboxOutcome::kTooMuchWritten) << result.output;
  EXPECT_EQ(python("import os\nos.memfd_create('m')").status, 1);
}

// Ways to another process of the same user that need no kill(): limits, the owner of a pipe's
// signals, a parent's death that is not waited for.
TEST(Sandbox, NoWayToOtherProcesses) {
  for (const char* attempt :
       {"import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "import os\nos.sched_setaffinity(os.getppid(), {0})",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)",
        "import ctypes\nassert ctypes.CDLL(None, use_errno=True).prctl(1, 0) == 0",
        "import ctypes\nassert ctypes.CDLL(None, use_errno=True).ioprio_set(1, 0, 0) == 0",
        "import signal, os\nos.kill(1, signal.SIGKILL)",
        "import signal, os\nos.killpg(os.getpgid(os.getppid()), signal.SIGKILL)"}) {
    const SandboxResult result = python(attempt);
    EXPECT_EQ(result.outcome, SandboxOutcome::kExited) << attempt;
    EXPECT_EQ(result.status, 1) << attempt << "\n" << result.output;
  }
  // Of itself a program may ask all of them.
  EXPECT_EQ(python("import resource, os, fcntl\nresource.getrlimit(resource.RLIMIT_CPU)\n"
                   "resource.setrlimit(resource.RLIMIT_CPU, (5, 5))\nos.sched_getaffinity(0)\n"
                   "os.sched_setaffinity(0, os.sched_getaffinity(0))\nr, w = os.pipe()\n"
                   "fcntl.fcntl(r, fcntl.F_GETFL)\nprint('ok')")
                .output,
            "ok\n");
}

TEST(Sandbox, ThreadsWithoutEndAreStopped) {
  const SandboxResult result = python(
      "import threading, time\nwhile True:\n"
      "  threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
      short_time(5));
  EXPECT_NE(result.status, 0);
}

TEST(Sandbox, WhatCannotStartIsNamed) {
  EXPECT_THAT([] { run_sandboxed({"no-such-program"}, {}); },
              ::testing::ThrowsMessage<Error>(HasSubstr("no-such-program is needed")));
  EXPECT_THAT([] { run_sandboxed({"/etc/passwd"}, {}); },
              ::testing::ThrowsMessage<Error>(HasSubstr("starting the program failed")));
}

}  // namespace
}  // namespace cambium
