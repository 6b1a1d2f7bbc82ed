#include "base/map_faults.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>

namespace cambium {
namespace {

constexpr size_t kMostMaps = 256;  // more are mapped all the same, and not named

/// Read by a signal handler: whole once `begin` is set, and only then looked at.
struct Map {
  std::atomic<uintptr_t> begin{0};
  size_t size = 0;
  std::array<char, 512> path{};
};

std::array<Map, kMostMaps> g_maps;
std::mutex g_mutex;  // of those who add and remove

void say(const char* text) {
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text, std::strlen(text));
}

void on_fault(int signal, siginfo_t* info, void* /*context*/) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const Map& map : g_maps) {
    const uintptr_t begin = map.begin.load(std::memory_order_acquire);
    if (begin != 0 && at >= begin && at - begin < map.size) {
      say("cambium: error: ");
      say(map.path.data());
      say(" became shorter, or cannot be read any more, while it was in use: nothing can be made "
          "of "
          "it; copy it again and do not write to it meanwhile\n");
      ::_exit(1);
    }
  }
  ::signal(signal, SIG_DFL);  // the fault comes again, and ends the process
  if (info->si_code <= 0) {
    ::raise(signal);  // unless it was sent
  }
}

}  // namespace

void explain_map_faults() {
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, nullptr);
}

void add_map(const void* memory, size_t size, const std::string& path) {
  const std::lock_guard lock(g_mutex);
  const auto free =
      std::find_if(g_maps.begin(), g_maps.end(), [](const Map& map) { return map.begin == 0; });
  if (free == g_maps.end()) {
    return;
  }
  free->size = size;
  const size_t length = std::min(path.size(), free->path.size() - 1);
  std::transform(
      path.begin(), path.begin() + static_cast<ptrdiff_t>(length), free->path.begin(),
      [](unsigned char c) { return static_cast<char>(c < 0x20 || c == 0x7F ? '?' : c); });
  free->path[length] = '\0';
  free->begin.store(reinterpret_cast<uintptr_t>(memory), std::memory_order_release);
}

void remove_map(const void* memory) {
  const std::lock_guard lock(g_mutex);
  for (Map& map : g_maps) {
    if (map.begin == reinterpret_cast<uintptr_t>(memory)) {
      map.begin = 0;
    }
  }
}

}  // namespace cambium
