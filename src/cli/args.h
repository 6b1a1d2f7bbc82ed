// Command-line arguments, declared in one place and parsed by CLI11 (which only args.cc includes).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/fields.h"

namespace CLI {
class App;
}

namespace cambium {

/// What a command declares. Targets must live until the command has run. Names are without dashes:
/// "threads" becomes --threads; "output,o" also -o.
class Args {
 public:
  Args(CLI::App* app, const std::vector<std::string>& words) : app_(app), words_(words) {}
  /// The words of the command line as typed, the program first.
  const std::vector<std::string>& words() const { return words_; }
  void positional(const std::string& name, const std::string& help, std::string* target,
                  bool required = true);
  void positionals(const std::string& name, const std::string& help,
                   std::vector<std::string>* target, bool required = true);
  void option(const std::string& name, const std::string& help, std::string* target,
              bool required = false);
  /// Numbers are from 0 unless a range says otherwise; outside it they are wrong usage.
  void option(const std::string& name, const std::string& help, int64_t* target,
              IntRange range = ints_from(0));
  void option(const std::string& name, const std::string& help, double* target,
              RealRange range = reals_from(0.0));
  /// One of `choices`; anything else is wrong usage that lists them. The help ends with them.
  void choice(const std::string& name, const std::string& help,
              const std::vector<std::string>& choices, std::string* target);
  /// Some of `choices`, with commas.
  void some_of(const std::string& name, const std::string& help,
               const std::vector<std::string>& choices, std::vector<std::string>* target);
  void positional_choice(const std::string& name, const std::string& help,
                         const std::vector<std::string>& choices, std::string* target,
                         bool required = true);
  /// May be given several times, or once with commas.
  void option(const std::string& name, const std::string& help, std::vector<int64_t>* target,
              IntRange range = ints_from(0));
  void option(const std::string& name, const std::string& help, std::vector<std::string>* target);
  void flag(const std::string& name, const std::string& help, bool* target);

 private:
  CLI::App* app_;
  std::vector<std::string> words_;
};

/// Runs once the arguments are parsed; its value is the exit status.
using Action = std::function<int()>;

struct Command {
  const char* name;
  const char* summary;   // one line
  const char* examples;  // shown under --help, one command a line
  /// Declares the arguments and returns what to do with them.
  Action (*declare)(Args& args);
  /// Commands under it, `cambium NAME KIND`; without one of them it runs itself.
  std::vector<Command> kinds{};
};

/// Parses and runs. 0 done, 1 an Error or a check that did not pass, 2 wrong usage,
/// 130, 143 or 129 stopped by Ctrl-C, SIGTERM or the end of the terminal.
int run_command_line(int argc, char** argv, const std::vector<Command>& commands);

}  // namespace cambium
