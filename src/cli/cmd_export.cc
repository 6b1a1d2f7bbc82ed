#include <cstdio>

#include "base/error.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "model/weights.h"

namespace cambium {
namespace {

struct ExportArgs {
  std::string model, transformers, storage = "stored";
  PresetOption preset;
  bool replace = false;
};

int run(const ExportArgs& args) {
  expect(!args.transformers.empty(), "[export] expected --transformers FOLDER");
  const StopAnywhere stop("nothing is written");
  LoadedModel loaded =
      load_model(args.model, {.storage = MatrixStorage::kStored, .preset = args.preset.name});
  SaveOptions save;
  save.tokenizer_from = args.model;
  save.storage = parse_storage(args.storage);
  save.replace = args.replace;
  save_model(*loaded.model, args.transformers, save);
  const ModelSpec& spec = loaded.model->spec();
  fmt::print("{}  a {} checkpoint of {} parameters, in {}\n", layer_map(spec), spec.family,
             human_count(static_cast<double>(loaded.model->parameter_count())), args.transformers);
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<ExportArgs>();
  args.positional("model", "checkpoint folder", &a->model);
  args.option("transformers", "folder that transformers loads", &a->transformers);
  args.choice("storage", "of matrices there; stored is as in the model", {"f32", "bf16", "stored"},
              &a->storage);
  a->preset.declare(args);
  args.flag("replace", "replace what is there", &a->replace);
  return [a] { return run(*a); };
}

}  // namespace

Command export_command() {
  return {"export", "writes a checkpoint for other programs",
          "  cambium export out/demo/model --transformers out/hf --storage bf16\n"
          "  cambium export SUPERNET --preset fast --transformers out/fast",
          declare};
}

}  // namespace cambium
