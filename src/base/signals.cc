#include "base/signals.h"

#include <array>
#include <csignal>
#include <utility>

namespace cambium {
namespace {

struct Watched {
  int signal;
  const char* name;
  struct sigaction before {};
  bool taken = false;
};

std::array<Watched, 3> g_watched = {{{SIGINT, "SIGINT"}, {SIGTERM, "SIGTERM"}, {SIGHUP, "SIGHUP"}}};
volatile std::sig_atomic_t g_signal = 0;
int g_depth = 0;
const std::string* g_kept = nullptr;  // of the innermost StopAnywhere

void on_signal(int signal) {
  g_signal = signal;
}

}  // namespace

StopSignals::StopSignals() {
  if (g_depth++ > 0) {
    return;
  }
  g_signal = 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  // After the first signal the system's own action is back, so that a second one ends the process.
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  sigemptyset(&action.sa_mask);
  for (Watched& watched : g_watched) {
    ::sigaction(watched.signal, nullptr, &watched.before);
    // Who was started with nohup goes on when the terminal goes.
    watched.taken = watched.signal != SIGHUP || watched.before.sa_handler != SIG_IGN;
    if (watched.taken) {
      ::sigaction(watched.signal, &action, nullptr);
    }
  }
}

StopSignals::~StopSignals() {
  if (--g_depth > 0) {
    return;
  }
  for (const Watched& watched : g_watched) {
    if (watched.taken) {
      ::sigaction(watched.signal, &watched.before, nullptr);
    }
  }
  g_signal = 0;
}

StopAnywhere::StopAnywhere(std::string kept) : kept_(std::move(kept)), before_(g_kept) {
  g_kept = &kept_;
}

StopAnywhere::~StopAnywhere() {
  g_kept = before_;
}

void stop_point() {
  if (g_kept != nullptr && stop_signal() != 0) {
    stop_if_asked(*g_kept);
  }
}

int stop_signal() {
  return g_signal;
}

const char* signal_name(int signal) {
  for (const Watched& watched : g_watched) {
    if (watched.signal == signal) {
      return watched.name;
    }
  }
  return "a signal";
}

void stop_if_asked(std::string_view kept) {
  if (const int signal = stop_signal(); signal != 0) {
    throw Interrupted(signal, fmt::format("stopped by {}; {}", signal_name(signal), kept));
  }
}

}  // namespace cambium
