// What generate and chat share: the options of a model that answers, and text that is streamed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cli/options.h"
#include "model/supernet.h"
#include "model/weights.h"
#include "serve/engine.h"
#include "text/tokenizer.h"

namespace cambium {

struct AnsweringModel {
  std::string model, storage = "stored";
  int64_t max_new_tokens = 256;
  SamplingOptions sampling;
  DeviceOption device;
  PresetOption preset;
  CacheOption cache;
  EngineOptions engine;

  /// All but `model` and `engine`.
  void declare(Args& args);
  /// Of so many sequences, before it is planned for a device.
  EngineConfig config(int64_t sequences) const;
  /// The same, planned for the device before anything is loaded.
  EngineConfig planned(int64_t sequences) const;
  LoadOptions load_options() const;
  GenerationRequest request(const Tokenizer& tokenizer, const ModelSpec& spec,
                            std::vector<int32_t> prompt) const;
};

/// A model that answers. Of a supernet all is loaded where presets are to be switched: each is a
/// hybrid of views with an engine of its own, so that nothing is loaded again and no state of one
/// is seen by another.
class PresetModel {
 public:
  PresetModel(const AnsweringModel& args, int64_t sequences, bool switches);

  /// Goes on as this preset; "" is what it began as. Error, with the presets that there are, where
  /// there is none of this name.
  void switch_to(const std::string& preset);

  Engine& engine() { return *engine_; }
  /// What answers, and all there is.
  const ModelSpec& spec() const { return engine_->model().spec(); }
  const ModelSpec& whole() const { return loaded_.model->spec(); }
  bool answers_as(const Preset& preset) const { return preset.active == active_; }

 private:
  void answer_as(const ActiveUnits& active);

  const AnsweringModel& args_;
  int64_t sequences_;
  LoadedModel loaded_;
  LoadedModel view_;    // of a supernet, what answers
  ActiveUnits active_;  // of it
  ActiveUnits first_;
  std::unique_ptr<Engine> engine_;
};

/// Generates with the text streamed to standard output; returns it. With `speed` it is said how
/// fast that was.
std::string stream_answer(Engine& engine, const Tokenizer& tokenizer, GenerationRequest request,
                          bool speed);

}  // namespace cambium
