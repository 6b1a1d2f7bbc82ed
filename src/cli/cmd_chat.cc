// chat: a conversation in the terminal, with the presets of a supernet to switch among.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <iostream>
#include <optional>

#include "base/progress.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "cli/generation.h"
#include "model/supernet.h"

namespace cambium {
namespace {

struct ChatArgs : AnsweringModel {
  std::string system;
};

constexpr const char* kHelp =
    "/reset forgets the conversation, /presets lists a supernet's presets, /preset NAME goes on "
    "with "
    "another, /quit ends it.";

/// A line for each preset, the one that speaks with a star.
std::string presets_of(const PresetModel& speaker, const std::string& where) {
  const ModelSpec& whole = speaker.whole();
  std::string text;
  for (const Preset& preset : whole.presets) {
    text += fmt::format("{} {:<16} {}\n", speaker.answers_as(preset) ? "*" : " ", preset.name,
                        layer_map(unwrapped(whole, preset.active)));
  }
  return !text.empty()        ? text
         : is_supernet(whole) ? where + ": has no presets\n"
                              : where + ": is no supernet and has no presets\n";
}

/// What is said, from line to line.
class Conversation {
 public:
  Conversation(const ChatArgs& args, PresetModel& speaker, const Tokenizer& tokenizer)
      : args_(args), speaker_(speaker), tokenizer_(tokenizer) {
    reset();
  }

  void take(const std::string& line) {
    if (line == "/reset") {
      reset();
    } else if (line == "/presets" || line == "/preset") {
      print(presets_of(speaker_, args_.model));
    } else if (line.starts_with("/preset ")) {
      const size_t name = line.find_first_not_of(' ', 8);
      speaker_.switch_to(name == std::string::npos ? "" : line.substr(name));
    } else if (!line.empty()) {
      answer(line);
    }
  }

 private:
  static void print(const std::string& text) {
    std::fputs(text.c_str(), stdout);
    std::fflush(stdout);
  }
  void reset() {
    messages_.clear();
    if (!args_.system.empty()) {
      messages_.push_back({"system", args_.system});
    }
  }
  void answer(const std::string& line) {
    messages_.push_back({"user", line});
    try {
      const std::vector<int32_t> prompt =
          tokenizer_.encode(tokenizer_.apply_chat_template(messages_), false);
      messages_.push_back(
          {"assistant", stream_answer(speaker_.engine(), tokenizer_,
                                      args_.request(tokenizer_, speaker_.spec(), prompt), false)});
    } catch (...) {
      messages_.pop_back();
      throw;
    }
  }

  const ChatArgs& args_;
  PresetModel& speaker_;
  const Tokenizer& tokenizer_;
  std::vector<ChatMessage> messages_;
};

int run_chat(const ChatArgs& a) {
  a.sampling.config();
  std::optional<StopAnywhere> stop("the conversation has not begun");
  const Tokenizer tokenizer = Tokenizer::load(a.model);
  tokenizer.expect_chat(a.model, "use cambium generate", a.system);
  PresetModel speaker(a, 1, true);
  Conversation conversation(a, speaker, tokenizer);
  stop_point();
  stop.reset();
  const bool terminal = isatty(STDIN_FILENO) != 0;
  if (terminal) {
    fmt::print("{}: {}\n{}\n", a.model, layer_map(speaker.spec()), kHelp);
  }
  std::string line;
  for (;;) {
    if (terminal) {
      std::printf("\n> ");
      std::fflush(stdout);
    }
    if (!std::getline(std::cin, line) || line == "/quit") {
      return 0;
    }
    const StopSignals signals;  // Ctrl-C ends the answer, not the conversation
    try {
      conversation.take(line);
    } catch (const Error& e) {
      if (!terminal) {
        throw;
      }
      // A preset that is not there, or a conversation that outgrew the model: the next need not.
      say("{}\n{}", e.what(), kHelp);
    }
    if (!terminal || stop_signal() == SIGTERM) {
      stop_if_asked("the conversation ends with it");
    }
  }
}

Action declare_chat(Args& args) {
  auto a = std::make_shared<ChatArgs>();
  args.positional("model", "checkpoint folder with a chat template", &a->model);
  args.option("system", "system message", &a->system);
  a->declare(args);
  return [a] { return run_chat(*a); };
}

}  // namespace

Command chat_command() {
  return {"chat",
          "talks to a model in the terminal; in it, /reset, /presets, /preset NAME (a supernet "
          "goes on as another of its hybrids) and /quit",
          "  cambium chat models/teacher\n"
          "  cambium chat SUPERNET --preset fast\n"
          "  echo \"Why is the sky blue?\" | cambium chat DIR --temperature 0.7",
          declare_chat};
}

}  // namespace cambium
