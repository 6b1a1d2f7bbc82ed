// What generate and chat share: the options of a model that answers, and text that is streamed.
#pragma once

#include <string>
#include <vector>

#include "cli/options.h"
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

/// Generates with the text streamed to standard output; returns it. With `speed` it is said how
/// fast that was.
std::string stream_answer(Engine& engine, const Tokenizer& tokenizer, GenerationRequest request,
                          bool speed);

}  // namespace cambium
