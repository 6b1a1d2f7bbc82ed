// SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone) as a wish that long work asks about:
// it ends at the next good place, keeps what it has and says how to go on. A second signal ends the
// process as always.
//
// Work with good places of its own (a step of training, a layer's score) holds StopSignals and asks
// there. Work whose result appears whole at its end or not at all holds StopAnywhere: the rooms
// below then end at the next piece (a layer of a forward pass, a part of a file) by themselves.
#pragma once

#include <string>
#include <string_view>

#include "base/error.h"

namespace cambium {

/// While one lives, the signals are wishes. They may be nested.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
};

/// StopSignals, and stop_point() throws while it lives: what is being written is dropped, so not
/// around work that keeps something when it is stopped. `kept` ends the message: "nothing is
/// written". One inside another's life gives its own message.
class StopAnywhere {
 public:
  explicit StopAnywhere(std::string kept);
  ~StopAnywhere();
  StopAnywhere(const StopAnywhere&) = delete;
  StopAnywhere& operator=(const StopAnywhere&) = delete;

 private:
  StopSignals signals_;
  std::string kept_;
  const std::string* before_;
};

/// In loops of long work of the lower rooms, on the thread of the command: Interrupted when a
/// signal came while a StopAnywhere lives.
void stop_point();

/// The signal that came, or 0.
int stop_signal();
/// "SIGINT", "SIGTERM" or "SIGHUP".
const char* signal_name(int signal);

/// Work that was stopped by a signal; no Error, so that nobody who makes the best of a damaged file
/// takes it for one. The program's exit status is 128 + signal().
class Interrupted : public std::runtime_error {
 public:
  Interrupted(int signal, const std::string& message)
      : std::runtime_error(message), signal_(signal) {}
  int signal() const { return signal_; }

 private:
  int signal_;
};

/// Throws Interrupted when a signal came. `kept` says what is kept and how to go on.
void stop_if_asked(std::string_view kept);

}  // namespace cambium
