// Progress of long work, on standard error: on a terminal one line that is redrawn, elsewhere (a
// file, a pipe) a plain line now and then. Either says what is done, how fast, and how long it
// still takes.
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

namespace cambium {

/// A line for people on standard error, whatever --quiet says. One that cannot be written is lost;
/// the work does not depend on it. What a terminal would obey is shown as text.
void say_text(const std::string& text);
template <class... Args>
void say(fmt::format_string<Args...> format, Args&&... args) {
  say_text(fmt::format(format, std::forward<Args>(args)...));
}

/// What they should know although the work goes on: "cambium: note: ...".
void note_text(const std::string& text);
template <class... Args>
void note(fmt::format_string<Args...> format, Args&&... args) {
  note_text(fmt::format(format, std::forward<Args>(args)...));
}

class Progress {
 public:
  enum class Mode { kTerminal, kPlain, kSilent };
  struct Options {
    std::string unit = "";  ///< "tokens", "steps": stands behind the numbers
    bool bytes = false;     ///< numbers are bytes
    Mode mode = default_mode();
    /// Where text goes, and the time in seconds; tests bring their own.
    std::function<void(std::string_view)> write = {};
    std::function<double()> now = {};
  };

  /// `total` 0: the end is not known.
  Progress(std::string label, uint64_t total, Options options);
  Progress(std::string label, uint64_t total) : Progress(std::move(label), total, Options()) {}
  /// Ends the line if finish() was not reached, so that an error message starts on its own line.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void advance(uint64_t amount) { update(done_ + amount); }
  /// `note` is shown at the end of the line: "loss 1.234".
  void update(uint64_t done, std::string_view note = {});
  /// Prints the final line with the time it took.
  void finish(std::string_view note = {});

  /// kTerminal when standard error is one that can redraw a line, else kPlain; kSilent after
  /// silence(true).
  static Mode default_mode();
  /// For --quiet: every Progress made afterwards prints nothing.
  static void silence(bool silent);

 private:
  std::string line(double elapsed, bool final) const;
  void draw(double now, bool final);

  std::string label_;
  uint64_t total_;
  Options options_;
  uint64_t done_ = 0;
  std::string note_;
  double started_;
  double drawn_;      // when the last line was printed
  size_t width_ = 0;  // of the line that is on the terminal
  bool finished_ = false;
};

}  // namespace cambium
