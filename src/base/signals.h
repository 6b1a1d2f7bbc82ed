// SIGINT (Ctrl-C) and SIGTERM as a wish that long work asks about: it ends at the next good place,
// keeps what it has and says how to go on. A second signal ends the process as always.
#pragma once

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

/// The signal that came, or 0.
int stop_signal();
/// "SIGINT" or "SIGTERM".
const char* signal_name(int signal);

/// Work that was stopped by a signal. The program's exit status is 128 + signal().
class Interrupted : public Error {
 public:
  Interrupted(int signal, const std::string& message) : Error(message), signal_(signal) {}
  int signal() const { return signal_; }

 private:
  int signal_;
};

/// Throws Interrupted when a signal came. `kept` says what is kept and how to go on.
void stop_if_asked(std::string_view kept);

}  // namespace cambium
