#include <cstdio>
#include <filesystem>

#include "base/error.h"
#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "model/gguf/gguf_export.h"
#include "model/kept_tensors.h"
#include "model/weights.h"

namespace cambium {
namespace {

struct ExportArgs {
  std::string model, transformers, gguf, pre, storage = "stored", type = "f16";
  PresetOption preset;
  bool replace = false;
};

int run_gguf(const ExportArgs& args) {
  expect(args.preset.name.empty() && args.storage == ExportArgs().storage,
         "--preset and --storage belong to --transformers; --type says how GGUF keeps matrices");
  expect(args.replace || !std::filesystem::exists(args.gguf),
         "{}: is there already; --replace replaces it", args.gguf);
  const uint64_t bytes = export_gguf(args.model, args.gguf, {parse_gguf_type(args.type), args.pre});
  if (const std::string kept = describe_kept(read_spec(args.model)); !kept.empty()) {
    note("{}: not in the file", kept);
  }
  fmt::print("{} in {}\n", human_bytes(bytes), args.gguf);
  return 0;
}

int run(const ExportArgs& args) {
  expect(args.transformers.empty() != args.gguf.empty(),
         "[export] expected --transformers FOLDER or --gguf FILE, got {}",
         args.gguf.empty() ? "neither" : "both");
  const StopAnywhere stop("nothing is written");
  if (!args.gguf.empty()) {
    return run_gguf(args);
  }
  expect(args.pre.empty() && args.type == ExportArgs().type,
         "--pre and --type belong to --gguf; --storage says how matrices are kept");
  SaveOptions save;
  save.tokenizer_from = args.model;
  save.storage = parse_storage(args.storage);
  // What is packed in fp8 or NVFP4 is rounded where bf16 is asked for alone.
  const MatrixStorage packed =
      save.storage == MatrixStorage::kStored ? MatrixStorage::kF32 : save.storage;
  LoadedModel loaded = load_model(
      args.model,
      {.storage = MatrixStorage::kStored, .saved_as = packed, .preset = args.preset.name});
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
  args.choice("storage", "of matrices there; stored is as in the model (fp8 and NVFP4 as f32)",
              {"f32", "bf16", "stored"}, &a->storage);
  args.option("gguf", "file that llama.cpp runs (docs/export.md lists the families)", &a->gguf);
  args.choice("type", "of matrices in GGUF", {"f32", "f16", "bf16", "q8_0"}, &a->type);
  args.option("pre", "GGUF: llama.cpp's name of how text is cut, where none fits exactly", &a->pre);
  a->preset.declare(args);
  args.flag("replace", "replace what is there", &a->replace);
  return [a] { return run(*a); };
}

}  // namespace

Command export_command() {
  return {"export", "writes a checkpoint for other programs",
          "  cambium export out/demo/model --transformers out/hf --storage bf16\n"
          "  cambium export SUPERNET --preset fast --transformers out/fast\n"
          "  cambium export models/teacher --gguf out/teacher.gguf --type q8_0 --pre qwen2",
          declare};
}

}  // namespace cambium
