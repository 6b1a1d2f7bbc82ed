#include <cstdio>
#include <filesystem>

#include "cli/commands.h"
#include "eval/verify.h"
#include "model/weights.h"

namespace cambium {
namespace {

struct VerifyArgs {
  std::string model, reference;
};

int run(const VerifyArgs& args) {
  const std::string reference =
      args.reference.empty()
          ? (std::filesystem::path(args.model) / "reference.safetensors").string()
          : args.reference;
  LoadedModel loaded = load_model(args.model);
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
  args.positional("model", "checkpoint folder", &a->model);
  args.option("reference", "file with tokens.K, logits.K, greedy.K (MODEL/reference.safetensors)",
              &a->reference);
  return [a] { return run(*a); };
}

}  // namespace

Command verify_command() {
  return {"verify", "compares a model with reference logits, by every way through it",
          "  cambium verify tests/fixtures/llama", declare};
}

}  // namespace cambium
