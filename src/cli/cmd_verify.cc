#include <filesystem>
#include <utility>

#include "base/error.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/verify.h"
#include "eval/verify_values.h"
#include "hybrid/folder_check.h"
#include "model/weights.h"
#include "text/tokenizer_verify.h"

namespace cambium {
namespace {

struct VerifyArgs {
  std::string model, tokenizer, reference;
  DeviceOption device;
  PresetOption preset;
  StorageOption storage;
  bool accept = false;
};

int run_tokenizer(const VerifyArgs& args) {
  check_tokenizer_files(args.tokenizer);
  const TokenizerReport report = verify_tokenizer(
      args.tokenizer, args.reference.empty()
                          ? (std::filesystem::path(args.tokenizer) / "reference.json").string()
                          : args.reference);
  for (const auto& [name, check] : {std::pair{"encode", report.encode},
                                    {"encode with special tokens", report.encode_special},
                                    {"decode", report.decode},
                                    {"chat template", report.chat}}) {
    fmt::print("{:<28} {:>6} checked {:>6} wrong\n", name, check.total, check.failed);
  }
  for (const std::string& mismatch : report.mismatches) {
    fmt::print("{}\n", mismatch);
  }
  fmt::print("{}\n", report.ok()          ? "the tokenizer does what the reference says"
                     : report.total() > 0 ? "the tokenizer does NOT do what the reference says"
                                          : "the reference holds nothing to check");
  return report.ok() ? 0 : 1;
}

int run_values(Model& model, const std::string& reference) {
  fmt::print("{:<40} {:>8} {:>12} {:>12} {:>10}\n", "text", "tokens", "NLL error", "logit error",
             "greedy");
  bool ok = true;
  for (const ValuesRow& row : verify_values(model, reference)) {
    fmt::print("{:<40} {:>8} {:>12.2e} {:>12.2e} {:>5}/{:<4} {}\n", row.text, row.tokens,
               row.nll_error, row.logit_error, row.greedy_same, row.greedy_tokens,
               row.ok ? "ok" : "FAILED");
    ok = ok && row.ok;
  }
  fmt::print("{}\n", ok ? "the model computes what the reference says"
                        : "the model does NOT compute what the reference says");
  return ok ? 0 : 1;
}

// The folder against what it says of itself.
int run_folder(const std::string& folder) {
  bool ok = true;
  for (const FolderCheckRow& row : check_folder(folder)) {
    fmt::print("{:<7} {}: {}\n", row.ok ? "ok" : "FAILED", printable(row.path),
               printable(row.text));
    ok = ok && row.ok;
  }
  fmt::print("{}\n", ok ? "the folder is what was written" : "the folder is NOT what was written");
  return ok ? 0 : 1;
}

int run(const VerifyArgs& args) {
  const StopAnywhere stop("what came before it was checked, the rest was not");
  expect(args.model.empty() != args.tokenizer.empty(),
         "[verify] expected a checkpoint folder or --tokenizer DIR, {}",
         args.model.empty() ? "got neither" : "got both");
  if (!args.tokenizer.empty()) {
    expect(!args.accept, "--accept belongs to a checkpoint folder");
    return run_tokenizer(args);
  }
  if (args.accept) {
    expect(args.reference.empty(), "expected --accept or --reference, got both");
    accept_files(args.model);
  }
  if (args.reference.empty() &&
      !std::filesystem::exists(std::filesystem::path(args.model) / "reference.safetensors")) {
    expect(args.preset.name.empty(),
           "--preset belongs to a reference; a folder is checked with all of its presets");
    return run_folder(args.model);
  }
  const std::string reference =
      args.reference.empty()
          ? (std::filesystem::path(args.model) / "reference.safetensors").string()
          : args.reference;
  const bool rounded = args.storage.storage() == MatrixStorage::kBF16;
  const bool of_values = reference.ends_with(".json");
  expect(!rounded || !of_values,
         "--storage bf16 has bounds for a reference of logits (.safetensors) alone, got {}",
         printable(reference));
  LoadedModel loaded = load_model(args.model, {.storage = args.storage.storage(),
                                               .device = args.device.device(),
                                               .preset = args.preset.name,
                                               .check_golden = !rounded});
  if (of_values) {
    return run_values(*loaded.model, reference);
  }
  const VerifyReport report = verify_model(
      *loaded.model, reference, rounded ? bf16_bounds(loaded.model->spec()) : VerifyConfig{});
  fmt::print("{:<18} {:>8} {:>8} {:>12} {:>12} {:>12} {:>10}\n", "way", "prompts", "tokens",
             "error/std", "KL/token", "same choice", "greedy");
  for (const VerifyRow& row : report.rows) {
    fmt::print("{:<18} {:>8} {:>8} {:>12.2e} {:>12.2e} {:>6}/{:<5} {:>4}/{:<4} {}\n", row.way,
               row.prompts, row.tokens, row.error, row.kl, row.same_choice, row.tokens,
               row.greedy_same, row.greedy_tokens, row.ok ? "ok" : "FAILED");
  }
  fmt::print("{}\n", report.ok() ? "the model computes what the reference says"
                                 : "the model does NOT compute what the reference says");
  return report.ok() ? 0 : 1;
}

Action declare(Args& args) {
  auto a = std::make_shared<VerifyArgs>();
  args.positional("model",
                  "checkpoint folder; without a reference it or a run folder is checked for "
                  "damage",
                  &a->model, false);
  args.option("tokenizer", "folder of a tokenizer to verify in place of a model", &a->tokenizer);
  args.option("reference",
              "file with tokens.K, logits.K, greedy.K (MODEL/reference.safetensors), or of texts, "
              "ids and chats (DIR/reference.json)",
              &a->reference);
  a->preset.declare(args);
  a->device.declare(args);
  a->storage.declare(args);
  args.flag("accept", "the files are as they should be: write checksums.json anew", &a->accept);
  return [a] { return run(*a); };
}

}  // namespace

Command verify_command() {
  return {"verify",
          "compares a model with reference logits by every way through it, a tokenizer with its "
          "reference, or a checkpoint or run folder with what was written",
          "  cambium verify tests/fixtures/llama\n"
          "  cambium verify tests/fixtures/llama --device cuda --storage bf16\n"
          "  cambium verify out/demo\n"
          "  cambium verify --tokenizer DIR --reference reference.json",
          declare};
}

}  // namespace cambium
