#include "cli/generation.h"

#include <algorithm>
#include <cstdio>

#include "base/checked.h"
#include "base/progress.h"
#include "base/signals.h"
#include "serve/memory_plan.h"

namespace cambium {

void AnsweringModel::declare(Args& args) {
  args.option("max-new-tokens,n", "tokens to generate at most", &max_new_tokens,
              {1, kMaxPositions});
  sampling.declare(args);
  cache.declare(args);
  cache.declare_page_size(args);
  args.choice("storage", "how matrices are kept in memory; stored is as in the file",
              {"stored", "f32", "bf16"}, &storage);
  preset.declare(args);
  device.declare(args);
}

EngineConfig AnsweringModel::config(int64_t sequences) const {
  EngineConfig config;
  config.max_sequences = sequences;
  config.cache_values = cache.values();
  config.page_size = cache.page_size;
  engine.apply(config);
  return config;
}

EngineConfig AnsweringModel::planned(int64_t sequences) const {
  return planned_engine(model, parse_storage(storage), device.device(), config(sequences),
                        preset.name);
}

LoadOptions AnsweringModel::load_options() const {
  LoadOptions options;
  options.storage = parse_storage(storage);
  options.device = device.device();
  options.preset = preset.name;
  return options;
}

GenerationRequest AnsweringModel::request(const Tokenizer& tokenizer, const ModelSpec& spec,
                                          std::vector<int32_t> prompt) const {
  GenerationRequest request;
  request.prompt = std::move(prompt);
  request.max_new_tokens = max_new_tokens;
  request.stop_ids = tokenizer.eos_ids();
  for (const int64_t id : spec.eos_ids) {
    request.stop_ids.push_back(static_cast<int32_t>(id));
  }
  request.sampling = sampling.config();
  request.seed = static_cast<uint64_t>(sampling.seed);
  return request;
}

PresetModel::PresetModel(const AnsweringModel& args, int64_t sequences, bool switches)
    : args_(args), sequences_(sequences) {
  const ModelSpec spec = read_spec(args.model);
  if (!switches || !is_supernet(spec)) {
    const EngineConfig config = args.planned(sequences);
    loaded_ = load_model(args.model, args.load_options());
    engine_ = std::make_unique<Engine>(*loaded_.model, config);
    return;
  }
  LoadOptions whole = args.load_options();
  whole.preset.clear();
  first_ = args.preset.name.empty() ? active_units(spec)
                                    : find_preset(spec, args.preset.name, args.model).active;
  loaded_ = load_model(args.model, whole);
  answer_as(first_);
}

void PresetModel::switch_to(const std::string& preset) {
  if (!preset.empty()) {
    answer_as(find_preset(whole(), preset, args_.model).active);
  } else if (view_.model != nullptr) {
    answer_as(first_);
  }
}

void PresetModel::answer_as(const ActiveUnits& active) {
  if (engine_ != nullptr && active == active_) {
    return;
  }
  engine_.reset();  // its cache goes first: a device may have no room for two
  view_ = view_hybrid(*loaded_.model, active);
  EngineConfig config = args_.config(sequences_);
  if (view_.model->device().kind == Device::kCuda) {
    // The weights are there: among what the device has taken.
    config = plan_memory({&view_.model->spec(), {}, config, view_.model->device(), 0}).engine;
  }
  engine_ = std::make_unique<Engine>(*view_.model, config);
  active_ = active;
}

std::string stream_answer(Engine& engine, const Tokenizer& tokenizer, GenerationRequest request,
                          bool speed) {
  StreamDecoder decoder(tokenizer);
  std::string text;
  const auto put = [&](const std::string& piece) {
    text += piece;
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  };
  request.on_token = [&](int32_t token) {
    put(decoder.push(token));
    return stop_signal() == 0;
  };
  std::vector<GenerationRequest> requests;
  requests.push_back(std::move(request));
  GenerationResult result;
  try {
    result = std::move(engine.generate(std::move(requests)).at(0));
    put(decoder.finish() + "\n");
  } catch (const Interrupted&) {
    put("\n");
    throw;
  }
  if (speed) {
    // The prompt's last token gives the first new one.
    const auto decoded = static_cast<double>(result.tokens.size()) - 1.0;
    say("{} prompt tokens, {:.0f} tokens/s; {} new tokens{}", result.prompt_tokens,
        static_cast<double>(result.prompt_tokens) / std::max(result.prefill_seconds, 1e-9),
        result.tokens.size(),
        decoded < 1.0
            ? ""
            : fmt::format(", {:.1f} tokens/s", decoded / std::max(result.decode_seconds, 1e-9)));
  }
  return text;
}

}  // namespace cambium
