#include "cli/args.h"

#include <fcntl.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>

#include "base/cpu.h"
#include "base/error.h"
#include "base/map_faults.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"

namespace cambium {
namespace {

constexpr const char* kVersion = "0.1.0";

// "output,o" -> "--output,-o"
std::string dashed(const std::string& name) {
  std::string out;
  for (const std::string& part : split(name, ',')) {
    out += (out.empty() ? "" : ",") + std::string(part.size() == 1 ? "-" : "--") + part;
  }
  return out;
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      names.push_back("--" + name);
    }
  }
  return names;
}

std::string given(const std::string& word) {
  return word.empty() ? "nothing" : word;
}

// The library's own conversion also reads nothing as 0, and hexadecimal past any range.
CLI::Validator in_range(IntRange range) {
  return {[range](const std::string& word) -> std::string {
            int64_t value = 0;
            const char* const end = word.data() + word.size();
            const auto [at, error] = std::from_chars(word.data(), end, value);
            if (error == std::errc{} && at == end && value >= range.low && value <= range.high) {
              return "";
            }
            return range.high == IntRange{}.high
                       ? fmt::format("expected a whole number from {}, got {}", range.low,
                                     given(word))
                       : fmt::format("expected a whole number from {} to {}, got {}", range.low,
                                     range.high, given(word));
          },
          ""};
}

CLI::Validator in_range(RealRange range) {
  return {[range](const std::string& word) -> std::string {
            double value = 0.0;
            const char* const end = word.data() + word.size();
            const auto [at, error] = std::from_chars(word.data(), end, value);
            if (error == std::errc{} && at == end &&
                (range.open_low ? value > range.low : value >= range.low) &&
                (range.open_high ? value < range.high : value <= range.high)) {
              return "";
            }
            return range.high == RealRange{}.high
                       ? fmt::format("expected a number {} {}, got {}",
                                     range.open_low ? "above" : "from", range.low, given(word))
                       : fmt::format("expected a number {} {} to {}, got {}",
                                     range.open_low ? "above" : "from", range.low, range.high,
                                     given(word));
          },
          ""};
}

CLI::Validator one_of(const std::vector<std::string>& choices) {
  return {[choices](const std::string& word) -> std::string {
            if (std::find(choices.begin(), choices.end(), word) != choices.end()) {
              return "";
            }
            return fmt::format("expected {}, got '{}'{}", join(choices, ", "), word,
                               did_you_mean(word, choices));
          },
          ""};
}

std::string help_with(const std::string& help, const std::vector<std::string>& choices) {
  return fmt::format("{}{}{}", help, help.empty() ? "" : ": ", join(choices, ", "));
}

// "cambium bench throughput"
std::string full_name(const CLI::App& app) {
  return app.get_parent() == nullptr ? "cambium"
                                     : full_name(*app.get_parent()) + " " + app.get_name();
}

int usage_error(const CLI::App& app, const std::string& message) {
  say("cambium: {}\nTry '{} --help'.", message, full_name(app));
  return 2;
}

// CLI11 says which words were left over; the nearest known one is our addition.
int left_over(const CLI::App& root, const CLI::App& used) {
  for (const std::string& word : used.remaining(true)) {
    if (word.starts_with("-")) {
      const std::string name = word.substr(0, word.find('='));
      return usage_error(
          used, fmt::format("unknown option '{}'{}", name, did_you_mean(name, option_names(used))));
    }
    if (&used == &root) {
      std::vector<std::string> names;
      for (const CLI::App* sub : root.get_subcommands([](const CLI::App*) { return true; })) {
        names.push_back(sub->get_name());
      }
      return usage_error(root,
                         fmt::format("unknown command '{}'{}", word, did_you_mean(word, names)));
    }
    return usage_error(used, fmt::format("unexpected argument '{}'", word));
  }
  return usage_error(used, "unexpected arguments");
}

// A command's place in the library, and what to do; those under a command come after it.
struct Declared {
  CLI::App* app;
  Action action;
};

struct Common {
  int64_t threads = 0;
  bool quiet = false;
};

void declare(CLI::App& parent, const Command& command, const std::vector<std::string>& words,
             Common& common, std::vector<Declared>& all) {
  CLI::App* app = parent.add_subcommand(command.name, command.summary);
  app->footer(std::string("Examples:\n") + command.examples);
  app->allow_extras();
  app->add_option("--threads", common.threads, "threads to compute with (0 = all cores)")
      ->check(in_range(IntRange{0, 1024}));
  app->add_flag("--quiet", common.quiet, "no progress on standard error");
  Args args(app, words);
  all.push_back({app, command.declare(args)});
  for (const Command& kind : command.kinds) {
    declare(*app, kind, words, common, all);
  }
}

// Were one of them closed, the next file that is opened would get its number, and what is printed
// would go into a checkpoint.
void open_standard_streams() {
  for (int fd = 0; fd <= 2; ++fd) {
    if (::fcntl(fd, F_GETFD) < 0 && ::open("/dev/null", fd == 0 ? O_RDONLY : O_WRONLY) != fd) {
      std::abort();
    }
  }
}

}  // namespace

void Args::positional(const std::string& name, const std::string& help, std::string* target,
                      bool required) {
  app_->add_option(name, *target, help)->required(required);
}
void Args::positionals(const std::string& name, const std::string& help,
                       std::vector<std::string>* target, bool required) {
  app_->add_option(name, *target, help)->required(required);
}
void Args::option(const std::string& name, const std::string& help, std::string* target,
                  bool required) {
  app_->add_option(dashed(name), *target, help)->required(required)->capture_default_str();
}
void Args::option(const std::string& name, const std::string& help, int64_t* target,
                  IntRange range) {
  app_->add_option(dashed(name), *target, help)->check(in_range(range))->capture_default_str();
}
void Args::option(const std::string& name, const std::string& help, double* target,
                  RealRange range) {
  app_->add_option(dashed(name), *target, help)->check(in_range(range))->capture_default_str();
}
void Args::choice(const std::string& name, const std::string& help,
                  const std::vector<std::string>& choices, std::string* target) {
  app_->add_option(dashed(name), *target, help_with(help, choices))
      ->check(one_of(choices))
      ->capture_default_str();
}
void Args::some_of(const std::string& name, const std::string& help,
                   const std::vector<std::string>& choices, std::vector<std::string>* target) {
  app_->add_option(dashed(name), *target, help_with(help, choices))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(one_of(choices))
      ->capture_default_str();
}
void Args::positional_choice(const std::string& name, const std::string& help,
                             const std::vector<std::string>& choices, std::string* target,
                             bool required) {
  app_->add_option(name, *target, help_with(help, choices))
      ->check(one_of(choices))
      ->required(required)
      ->capture_default_str();
}
void Args::option(const std::string& name, const std::string& help, std::vector<int64_t>* target,
                  IntRange range) {
  app_->add_option(dashed(name), *target, help)
      ->delimiter(',')
      ->check(in_range(range))
      ->capture_default_str();
}
void Args::option(const std::string& name, const std::string& help,
                  std::vector<std::string>* target) {
  app_->add_option(dashed(name), *target, help)->allow_extra_args(false);
}
void Args::flag(const std::string& name, const std::string& help, bool* target) {
  app_->add_flag(dashed(name), *target, help);
}

int run_command_line(int argc, char** argv, const std::vector<Command>& commands) {
  open_standard_streams();
  explain_map_faults();
  CLI::App root{
      "Cambium grafts fast token mixers onto a trained language model: score its layers, replace "
      "the attention of those that need it least, heal the hybrid by distillation, measure it and "
      "talk to it."};
  root.name("cambium");
  root.set_version_flag("--version",
                        fmt::format("cambium {} ({})", kVersion, cpu_isa_name(cpu_isa())));
  root.footer("Each command explains itself: cambium COMMAND --help");
  root.allow_extras();
  Common common;
  std::vector<Declared> declared;
  for (const Command& command : commands) {
    declare(root, command, {argv, argv + argc}, common, declared);
  }
  try {
    root.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return root.exit(e);
  } catch (const CLI::ParseError& e) {
    const CLI::App* used = &root;
    for (const Declared& d : declared) {
      used = d.app->parsed() ? d.app : used;
    }
    if (used->remaining_size(true) > 0) {
      return left_over(root, *used);
    }
    return usage_error(*used, e.what());
  }
  const Declared* used = nullptr;
  for (const Declared& d : declared) {
    if (d.app->parsed()) {
      if (d.app->remaining_size() > 0) {
        return left_over(root, *d.app);
      }
      used = &d;
    }
  }
  if (used != nullptr) {
    try {
      if (common.threads > 0) {
        set_num_threads(static_cast<int>(common.threads));
      }
      Progress::silence(common.quiet);
      const int status = used->action();
      expect(std::fflush(stdout) == 0 && std::ferror(stdout) == 0,
             "cannot write standard output: the disk is full, or nobody reads it");
      return status;
    } catch (const std::bad_alloc&) {
      std::fflush(stdout);
      say("cambium: error: out of memory; `cambium inspect` says what a model takes");
      return 1;
    } catch (const Interrupted& e) {
      std::fflush(stdout);
      say("cambium: {}", e.what());
      return 128 + e.signal();
    } catch (const std::exception& e) {
      std::fflush(stdout);
      say("cambium: error: {}", e.what());
      return 1;
    }
  }
  if (root.remaining_size() > 0) {
    return left_over(root, root);
  }
  fmt::print("{}", root.help());
  return 0;
}

}  // namespace cambium
