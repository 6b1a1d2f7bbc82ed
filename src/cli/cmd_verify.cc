#include <cstdio>
#include <filesystem>
#include <utility>

#include "base/error.h"
#include "cli/commands.h"
#include "eval/verify.h"
#include "eval/verify_values.h"
#include "files/checksums.h"
#include "model/weights.h"
#include "text/tokenizer_verify.h"

namespace cambium {
namespace {

struct VerifyArgs {
  std::string model, tokenizer, reference;
  bool accept = false;
};

int run_tokenizer(const VerifyArgs& args) {
  const TokenizerReport report = verify_tokenizer(
      args.tokenizer, args.reference.empty()
                          ? (std::filesystem::path(args.tokenizer) / "reference.json").string()
                          : args.reference);
  for (const auto& [name, check] : {std::pair{"encode", report.encode},
                                    {"encode with special tokens", report.encode_special},
                                    {"decode", report.decode},
                                    {"chat template", report.chat}}) {
    std::printf("%-28s %6zu checked %6zu wrong\n", name, check.total, check.failed);
  }
  for (const std::string& mismatch : report.mismatches) {
    std::printf("%s\n", mismatch.c_str());
  }
  if (!report.note.empty()) {
    std::printf("%s\n", report.note.c_str());
  }
  std::printf("%s\n", report.ok()          ? "the tokenizer does what the reference says"
                      : report.total() > 0 ? "the tokenizer does NOT do what the reference says"
                                           : "the reference holds nothing to check");
  return report.ok() ? 0 : 1;
}

int run_values(Model& model, const std::string& reference) {
  std::printf("%-40s %8s %12s %12s %10s\n", "text", "tokens", "NLL error", "logit error", "greedy");
  bool ok = true;
  for (const ValuesRow& row : verify_values(model, reference)) {
    std::printf("%-40s %8lld %12.2e %12.2e %5lld/%-4lld %s\n", row.text.c_str(),
                static_cast<long long>(row.tokens), row.nll_error, row.logit_error,
                static_cast<long long>(row.greedy_same), static_cast<long long>(row.greedy_tokens),
                row.ok ? "ok" : "FAILED");
    ok = ok && row.ok;
  }
  std::printf("%s\n", ok ? "the model computes what the reference says"
                         : "the model does NOT compute what the reference says");
  return ok ? 0 : 1;
}

// Without a reference: is the folder what was written?
int run_folder(const VerifyArgs& args) {
  if (args.accept) {
    // What the model computes now is the golden prompt's answer from here on.
    write_checksums(args.model);  // first, or the changed folder could not be loaded
    add_golden(args.model);
    write_checksums(args.model);
    std::printf("%s: checksums.json and golden.safetensors are of the folder as it is\n",
                args.model.c_str());
    return 0;
  }
  const size_t files = verify_checksums(args.model);
  const bool golden =
      std::filesystem::exists(std::filesystem::path(args.model) / "golden.safetensors");
  load_model(args.model);
  std::printf("%s\n", files > 0 ? fmt::format("{} files are as they were written", files).c_str()
                                : "there is no checksums.json: no file could be checked");
  std::printf("%s\n", golden ? "the golden prompt's logits agree"
                             : "there is no golden.safetensors: no logits could be checked");
  return files > 0 && golden ? 0 : 1;
}

int run(const VerifyArgs& args) {
  expect(args.model.empty() != args.tokenizer.empty(),
         "[verify] expected a checkpoint folder or --tokenizer DIR, {}",
         args.model.empty() ? "got neither" : "got both");
  if (!args.tokenizer.empty()) {
    return run_tokenizer(args);
  }
  const std::filesystem::path dir(args.model);
  if (args.reference.empty() && !std::filesystem::exists(dir / "reference.safetensors")) {
    return run_folder(args);
  }
  expect(!args.accept, "--accept belongs to the check of a folder, without a reference");
  const std::string reference =
      args.reference.empty()
          ? (std::filesystem::path(args.model) / "reference.safetensors").string()
          : args.reference;
  LoadedModel loaded = load_model(args.model);
  if (reference.ends_with(".json")) {
    return run_values(*loaded.model, reference);
  }
  const VerifyReport report = verify_model(*loaded.model, reference);
  std::printf("%-18s %8s %8s %12s %12s %12s %10s\n", "way", "prompts", "tokens", "error/std",
              "KL/token", "same choice", "greedy");
  for (const VerifyRow& row : report.rows) {
    std::printf("%-18s %8lld %8lld %12.2e %12.2e %6lld/%-5lld %4lld/%-4lld %s\n", row.way.c_str(),
                static_cast<long long>(row.prompts), static_cast<long long>(row.tokens), row.error,
                row.kl, static_cast<long long>(row.same_choice), static_cast<long long>(row.tokens),
                static_cast<long long>(row.greedy_same), static_cast<long long>(row.greedy_tokens),
                row.ok ? "ok" : "FAILED");
  }
  std::printf("%s\n", report.ok() ? "the model computes what the reference says"
                                  : "the model does NOT compute what the reference says");
  return report.ok() ? 0 : 1;
}

Action declare(Args& args) {
  auto a = std::make_shared<VerifyArgs>();
  args.positional("model", "checkpoint folder", &a->model, false);
  args.flag("accept", "a changed folder is as it should be: write its checksums and golden prompt",
            &a->accept);
  args.option("tokenizer", "folder of a tokenizer to verify in place of a model", &a->tokenizer);
  args.option("reference",
              "file with tokens.K, logits.K, greedy.K (MODEL/reference.safetensors), or of texts, "
              "ids and chats (DIR/reference.json)",
              &a->reference);
  return [a] { return run(*a); };
}

}  // namespace

Command verify_command() {
  return {"verify",
          "compares a model with reference logits, by every way through it; or a tokenizer",
          "  cambium verify tests/fixtures/llama\n"
          "  cambium verify DIR            # without a reference: files and golden prompt\n"
          "  cambium verify --tokenizer DIR --reference reference.json",
          declare};
}

}  // namespace cambium
