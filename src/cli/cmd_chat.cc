// chat: a conversation in the terminal, with the presets of a supernet to switch among.
#include <unistd.h>

#include <csignal>
#include <iostream>
#include <memory>
#include <optional>

#include "base/progress.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "cli/generation.h"
#include "model/supernet.h"
#include "serve/memory_plan.h"

namespace cambium {
namespace {

struct ChatArgs : AnsweringModel {
  std::string system;
};

constexpr const char* kHelp =
    "/reset forgets the conversation, /presets lists a supernet's presets, /preset NAME goes on "
    "with "
    "another, /quit ends it.";

/// The model that answers, and how it is made of a supernet: each preset is a hybrid of views and
/// an engine of its own, so nothing is loaded again, and no state of one is seen by another.
class Speaker {
 public:
  explicit Speaker(const ChatArgs& args) : args_(args) {
    const ModelSpec spec = read_spec(args.model);
    if (!is_supernet(spec)) {
      const EngineConfig config = args.planned(1);
      loaded_ = load_model(args.model, args.load_options());
      engine_ = std::make_unique<Engine>(*loaded_.model, config);
      return;
    }
    LoadOptions whole = args.load_options();
    whole.preset.clear();
    const ActiveUnits active = args.preset.name.empty()
                                   ? active_units(spec)
                                   : find_preset(spec, args.preset.name, args.model).active;
    loaded_ = load_model(args.model, whole);
    speak_as(active);
  }

  /// A turn of the conversation, streamed; its text.
  std::string answer(const Tokenizer& tokenizer, const std::string& prompt) {
    return stream_answer(*engine_, tokenizer,
                         args_.request(tokenizer, spec(), tokenizer.encode(prompt, false)), false);
  }
  /// Error, with the presets that there are, where there is none of this name.
  void switch_to(const std::string& preset) {
    speak_as(find_preset(loaded_.model->spec(), preset, args_.model).active);
  }
  /// A line each, the one that speaks with a star.
  std::string presets() const {
    const ModelSpec& whole = loaded_.model->spec();
    std::string text;
    for (const Preset& preset : whole.presets) {
      text += fmt::format("{} {:<16} {}\n", preset.active == active_ ? "*" : " ", preset.name,
                          layer_map(unwrapped(whole, preset.active)));
    }
    return !text.empty()        ? text
           : is_supernet(whole) ? args_.model + ": has no presets\n"
                                : args_.model + ": is no supernet and has no presets\n";
  }
  const ModelSpec& spec() const { return engine_->model().spec(); }

 private:
  void speak_as(const ActiveUnits& active) {
    if (engine_ != nullptr && active == active_) {
      return;
    }
    engine_.reset();  // its cache goes first: a device may have no room for two
    view_ = view_hybrid(*loaded_.model, active);
    EngineConfig config = args_.config(1);
    if (view_.model->device().kind == Device::kCuda) {
      // The weights are there: among what the device has taken.
      config = plan_memory({&view_.model->spec(), {}, config, view_.model->device(), 0}).engine;
    }
    engine_ = std::make_unique<Engine>(*view_.model, config);
    active_ = active;
  }

  const ChatArgs& args_;
  LoadedModel loaded_;  // all of a supernet
  LoadedModel view_;    // of it, what speaks
  ActiveUnits active_;
  std::unique_ptr<Engine> engine_;
};

/// What is said, from line to line.
class Conversation {
 public:
  Conversation(const ChatArgs& args, Speaker& speaker, const Tokenizer& tokenizer)
      : args_(args), speaker_(speaker), tokenizer_(tokenizer) {
    reset();
  }

  void take(const std::string& line) {
    if (line == "/reset") {
      reset();
    } else if (line == "/presets" || line == "/preset") {
      print(speaker_.presets());
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
      messages_.push_back(
          {"assistant", speaker_.answer(tokenizer_, tokenizer_.apply_chat_template(messages_))});
    } catch (...) {
      messages_.pop_back();
      throw;
    }
  }

  const ChatArgs& args_;
  Speaker& speaker_;
  const Tokenizer& tokenizer_;
  std::vector<ChatMessage> messages_;
};

int run_chat(const ChatArgs& a) {
  a.sampling.config();
  std::optional<StopAnywhere> stop("the conversation has not begun");
  const Tokenizer tokenizer = Tokenizer::load(a.model);
  tokenizer.expect_chat(a.model, "use cambium generate", a.system);
  Speaker speaker(a);
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
