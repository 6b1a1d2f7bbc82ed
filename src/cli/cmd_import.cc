#include <cstdio>
#include <memory>

#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "model/gguf/gguf_import.h"
#include "model/weights.h"

namespace cambium {
namespace {

struct ImportArgs {
  std::string file, folder;
  bool float32 = false, replace = false;
};

int run(const ImportArgs& args) {
  const StopAnywhere stop("nothing is written");
  GgufImportOptions options;
  options.float32 = args.float32;
  options.replace = args.replace;
  std::unique_ptr<Progress> progress;
  options.progress = [&](uint64_t done, uint64_t total) {
    if (!progress) {
      progress = std::make_unique<Progress>("writing", total, Progress::Options{.bytes = true});
    }
    progress->update(done);
  };
  options.finish = [](const std::string& folder) { add_golden(folder); };
  const GgufImportSummary summary = import_gguf(args.file, args.folder, options);
  progress.reset();
  std::printf("%lld layers, %s parameters, %s written to %s\n",
              static_cast<long long>(summary.layers),
              human_count(static_cast<double>(summary.parameters)).c_str(),
              human_bytes(summary.bytes).c_str(), args.folder.c_str());
  for (const std::string& note : summary.notes) {
    std::printf("note: %s\n", note.c_str());
  }
  std::fflush(stdout);
  for (const std::string& warning : summary.warnings) {
    std::fprintf(stderr, "warning: %s\n", warning.c_str());
  }
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<ImportArgs>();
  args.positional("file", "a .gguf file (docs/export.md lists the architectures)", &a->file);
  args.positional("folder", "where the checkpoint goes", &a->folder);
  args.flag("f32", "store fp32 instead of bf16", &a->float32);
  args.flag("replace", "replace the folder", &a->replace);
  return [a] { return run(*a); };
}

}  // namespace

Command import_command() {
  return {"import", "turns a GGUF file into a checkpoint folder, tokenizer included",
          "  cambium import SmolLM2-135M-Instruct.Q4_1.gguf smollm2", declare};
}

}  // namespace cambium
