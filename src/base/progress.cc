#include "base/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "base/text.h"

namespace cambium {
namespace {

constexpr double kRedrawSeconds = 0.1;
constexpr double kPlainSeconds = 10;
constexpr uint64_t kBarCells = 24;

std::atomic<bool> silent{false};

void write_to_stderr(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

/// Cells in a line of the terminal, 0 where that is not known.
size_t terminal_columns() {
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Progress::Mode Progress::default_mode() {
  if (silent) {
    return Mode::kSilent;
  }
  const char* terminal = std::getenv("TERM");
  const bool dumb = terminal == nullptr || std::string_view(terminal) == "dumb";
  return ::isatty(STDERR_FILENO) != 0 && !dumb ? Mode::kTerminal : Mode::kPlain;
}

void Progress::silence(bool now_silent) {
  silent = now_silent;
}

void say_text(const std::string& text) {
  std::fprintf(stderr, "%s\n", printable(text).c_str());
}

void note_text(const std::string& text) {
  say_text("cambium: note: " + text);
}

Progress::Progress(std::string label, uint64_t total, Options options)
    : label_(std::move(label)), total_(total), options_(std::move(options)) {
  if (!options_.write) {
    options_.write = write_to_stderr;
  }
  if (!options_.now) {
    options_.now = steady_seconds;
  }
  started_ = drawn_ = options_.now();
  if (options_.mode == Mode::kTerminal) {
    draw(started_, false);
  }
}

Progress::~Progress() {
  if (!finished_ && options_.mode == Mode::kTerminal) {
    options_.write("\n");
  }
}

void Progress::update(uint64_t done, std::string_view note) {
  if (options_.mode == Mode::kSilent || finished_) {
    return;
  }
  done_ = done;
  if (!note.empty()) {
    note_ = note;
  }
  const double now = options_.now();
  const double wait = options_.mode == Mode::kTerminal ? kRedrawSeconds : kPlainSeconds;
  if (now - drawn_ >= wait) {
    draw(now, false);
  }
}

void Progress::finish(std::string_view note) {
  if (options_.mode == Mode::kSilent || finished_) {
    return;
  }
  if (!note.empty()) {
    note_ = note;
  }
  draw(options_.now(), true);
  finished_ = true;
}

std::string Progress::line(double elapsed, bool final) const {
  const auto amount = [&](double n) {
    return options_.bytes ? human_bytes(static_cast<uint64_t>(std::max(0.0, n))) : human_count(n);
  };
  const std::string unit = options_.unit.empty() ? "" : " " + options_.unit;
  const double done = static_cast<double>(done_);
  std::string text = label_ + ": ";
  if (total_ > 0) {
    const double part = std::min(1.0, done / static_cast<double>(total_));
    if (options_.mode == Mode::kTerminal) {
      const auto cells = static_cast<size_t>(part * kBarCells);
      text += "[" + std::string(cells, '#') + std::string(kBarCells - cells, '.') + "] ";
    }
    text += fmt::format("{:3.0f}%  {}/{}{}", std::min(part, final ? 1.0 : 0.99) * 100, amount(done),
                        amount(static_cast<double>(total_)), unit);
  } else {
    text += amount(done) + unit;
  }
  if (elapsed > 0 && done_ > 0) {
    text += fmt::format("  {}/s", amount(done / elapsed));
  }
  if (final) {
    text += fmt::format("  in {}", human_duration(elapsed));
  } else if (total_ > done_ && done_ > 0 && elapsed > 0) {
    const double left = static_cast<double>(total_ - done_) * elapsed / done;
    text += fmt::format("  {} left", human_duration(left));
  }
  if (!note_.empty()) {
    text += "  " + note_;
  }
  return text;
}

void Progress::draw(double now, bool final) {
  std::string text = line(now - started_, final);
  if (options_.mode == Mode::kPlain) {
    options_.write(text + "\n");
  } else {
    // A line that wraps could not be redrawn.
    if (const size_t columns = terminal_columns(); columns > 1 && text.size() >= columns) {
      text.resize(columns - 1);
    }
    const size_t width = text.size();
    if (width < width_) {
      text.append(width_ - width, ' ');  // wipes the end of a longer line
    }
    width_ = width;
    options_.write("\r" + text + (final ? "\n" : ""));
  }
  drawn_ = now;
}

}  // namespace cambium
