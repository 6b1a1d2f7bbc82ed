#include <charconv>
#include <cmath>
#include <cstdio>
#include <optional>

#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "hybrid/merge.h"
#include "text/tokenizer.h"

namespace cambium {
namespace {

struct MergeArgs {
  std::vector<std::string> models, weights;
  std::string output;
  StorageOption storage;
  bool replace = false;
};

std::vector<double> parse_weights(const std::vector<std::string>& texts, size_t models) {
  std::vector<double> weights;
  for (const std::string& given : texts) {
    for (const std::string& text : split(given, ',')) {
      double value = 0.0;
      const char* const end = text.data() + text.size();
      const auto [at, error] = std::from_chars(text.data(), end, value);
      expect(error == std::errc{} && at == end && std::isfinite(value) && value >= 0.0,
             "--weights: expected numbers of at least 0, got '{}'", text);
      weights.push_back(value);
    }
  }
  expect(weights.empty() || weights.size() == models,
         "--weights: expected one for each of the {} models, got {}", models, weights.size());
  return weights;
}

// Nothing for a checkpoint without one.
std::optional<uint64_t> tokenizer_of(const std::filesystem::path& dir) {
  if (!std::filesystem::exists(dir / "tokenizer.json")) {
    return std::nullopt;
  }
  return Tokenizer::load(dir.string()).fingerprint();
}

int run(const MergeArgs& args) {
  const StopAnywhere stop("nothing is written");
  expect(args.models.size() >= 2, "expected at least two models, got {}", args.models.size());
  const std::vector<double> weights = parse_weights(args.weights, args.models.size());
  // The folder is made, and refused, before the models are read.
  const std::filesystem::path output = args.output;
  expect(args.replace || !std::filesystem::exists(output) || std::filesystem::is_empty(output),
         "{} exists; choose another output, or --replace", args.output);
  const std::optional<uint64_t> tokenizer = tokenizer_of(args.models[0]);
  SaveOptions save;
  save.tokenizer_from = args.models[0];
  save.storage = args.storage.storage();
  save.replace = args.replace;
  std::vector<LoadedModel> loaded;
  std::vector<Model*> models;
  for (const std::string& dir : args.models) {
    expect(tokenizer_of(dir) == tokenizer,
           "{} and {} have different tokenizers; a mean of their weights means nothing",
           args.models[0], dir);
    loaded.push_back(
        load_model(dir, {.storage = MatrixStorage::kStored, .saved_as = save.storage}));
    models.push_back(loaded.back().model.get());
  }
  const LoadedModel merged = merge_models(models, weights);
  loaded.clear();
  save_model(*merged.model, args.output, save);
  std::printf("%s  the mean of %zu models, in %s\n", layer_map(merged.model->spec()).c_str(),
              models.size(), args.output.c_str());
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<MergeArgs>();
  args.positionals("models", "checkpoints of the same shape", &a->models);
  args.option("output,o", "folder of the merged model", &a->output, true);
  args.option("weights,w", "one for each model: 0.7,0.3 (all alike otherwise)", &a->weights);
  a->storage.declare(args);
  args.flag("replace", "replace the output folder", &a->replace);
  return [a] { return run(*a); };
}

}  // namespace

Command merge_command() {
  return {"merge", "writes the weighted mean of checkpoints of the same shape",
          "  cambium merge H-30-SFT H-30 -o shipped --weights 0.5,0.5\n"
          "  cambium merge out/a/model out/b/model out/c/model -o soup",
          declare};
}

}  // namespace cambium
