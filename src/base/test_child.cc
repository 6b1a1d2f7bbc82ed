#include "base/test_child.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

namespace cambium {
namespace {

constexpr const char* kFolder = "CAMBIUM_TEST_RUN_FOLDER";

}  // namespace

bool run_test_child(const std::string& name, const std::string& folder, long delay) {
  const std::string filter = "--gtest_filter=" + name;
  const pid_t child = ::fork();
  if (child == 0) {
    ::setenv(kFolder, folder.c_str(), 1);
    const int nowhere = ::open("/dev/null", O_WRONLY);
    ::dup2(nowhere, STDOUT_FILENO);
    ::dup2(nowhere, STDERR_FILENO);
    for (const char* of_shards : {"GTEST_TOTAL_SHARDS", "GTEST_SHARD_INDEX"}) {
      ::unsetenv(of_shards);  // its one test may be of another shard
    }
    ::execl("/proc/self/exe", "test", filter.c_str(), "--gtest_also_run_disabled_tests", nullptr);
    ::_exit(127);
  }
  if (delay >= 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(delay));
    ::kill(child, SIGKILL);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

std::string test_child_folder() {
  const char* folder = std::getenv(kFolder);
  return folder == nullptr ? "" : folder;
}

}  // namespace cambium
