#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "hybrid/pipeline.h"
#include "hybrid/stage_files.h"

namespace cambium {
namespace {

struct HybridizeArgs {
  std::string plan, teacher, output;
  std::vector<std::string> set, words;
  double flops = 4e14;
  DeviceOption device;
  bool resume = false;
  bool dry_run = false;
};

void print_table(const RunSummary& run) {
  const bool fitted = std::any_of(run.models.begin(), run.models.end(),
                                  [](const ModelSummary& m) { return m.fit.layers > 0; });
  size_t width = 10;
  for (const ModelSummary& m : run.models) {
    width = std::max(width, m.name.size());
  }
  const int wide = static_cast<int>(width);
  std::printf("\n%-*s %8s %18s %10s %10s %7s %8s %14s %12s%s\n", wide, "model", "layers",
              "accuracy (95 %)", "retrieval", "KL", "tokens", "right/s", "decode tok/s",
              "cache/token", fitted ? "  R^2, fitted" : "");
  for (const ModelSummary& m : run.models) {
    const Measured& a = m.accuracy.accuracy;
    std::string decode;
    for (const SpeedSummary& s : m.speed) {
      decode += fmt::format("{}{:.0f}", decode.empty() ? "" : " / ", s.decode.value);
    }
    const std::string fit =
        m.fit.layers == 0 ? "" : fmt::format("  {:.2f} -> {:.2f}", m.fit.before, m.fit.after);
    const AccuracySummary found = overall_retrieval(m);
    std::printf("%-*s %4lld/%-3zu %6.1f [%.1f, %.1f] %10s %10.4f %7.1f %8.2f %14s %12s%s\n", wide,
                m.name.c_str(), static_cast<long long>(m.converted), layers_of_map(m.map).size(),
                100 * a.value, 100 * a.low, 100 * a.high,
                found.total == 0 ? "-" : fmt::format("{:.1f}%", 100 * found.accuracy.value).c_str(),
                m.reverse_kl, m.answer_tokens, right_answers_per_second(m), decode.c_str(),
                human_bytes(static_cast<uint64_t>(m.cache_bytes_per_token)).c_str(), fit.c_str());
  }
}

int run(const HybridizeArgs& args) {
  const HybridPlan plan = read_hybrid_plan(args.plan, args.teacher, args.set);
  if (args.output.empty()) {
    check_stage_name(plan.name, "the plan's name (or give --output)");
  }
  expect(std::filesystem::exists(plan.teacher),
         "{}: the teacher '{}' is not there; the plan's first lines say where it comes from, and "
         "--teacher names another folder",
         args.plan, plan.teacher.string());
  const std::string output = args.output.empty() ? "out/" + plan.name : args.output;
  if (args.dry_run) {
    const ModelSpec teacher = read_spec(plan.teacher);
    check_plan(plan, teacher);
    std::vector<std::string> missing;
    check_plan_inputs(plan, &missing);
    if (!args.output.empty()) {
      check_run_folder(args.output, plan, args.resume);
    }
    std::printf("%s", describe_plan(plan, teacher, args.flops, args.device.described()).c_str());
    for (const std::string& what : missing) {
      std::printf("missing    %s\n", what.c_str());
    }
    return 0;
  }
  const StopSignals signals;
  PipelineOptions options;
  options.folder = output;
  options.resume = args.resume;
  options.device = args.device.device();
  options.command = join(args.words, " ");
  const RunSummary run = run_pipeline(plan, options);
  print_table(run);
  const ModelSummary& teacher = run.models.front();
  const ModelSummary* best = nullptr;
  for (const ModelSummary& m : run.models) {
    // A supernet's presets are no attempts at anything; its stage is.
    best = m.converted > 0 && m.gate.attempts > 0 && m.gate.passed ? &m : best;
  }
  std::printf("\nreport: %s/report.html\n", options.folder.c_str());
  if (best == nullptr) {
    std::printf("no hybrid passed its gate; the teacher stands\n");
    return 1;
  }
  std::printf("kept: %.1f %% of the teacher's accuracy with %lld of %zu layers converted\n",
              100 * best->accuracy.accuracy.value / std::max(teacher.accuracy.accuracy.value, 1e-9),
              static_cast<long long>(best->converted), layers_of_map(best->map).size());
  if (!best->speed.empty()) {
    std::printf("won: %.2fx the decode speed at %lld tokens, %s of cache a token instead of %s\n",
                best->speed.back().decode.value / teacher.speed.back().decode.value,
                static_cast<long long>(best->speed.back().context),
                human_bytes(static_cast<uint64_t>(best->cache_bytes_per_token)).c_str(),
                human_bytes(static_cast<uint64_t>(teacher.cache_bytes_per_token)).c_str());
  }
  std::printf("talk to it: %s chat %s/%s\n", args.words[0].c_str(), options.folder.c_str(),
              best->dir.c_str());
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<HybridizeArgs>();
  a->words = args.words();
  args.positional("plan", "the plan: a TOML file (docs/distillation.md)", &a->plan);
  args.option("teacher,t", "the full-attention model (the plan's 'teacher' otherwise)",
              &a->teacher);
  args.option("output,o", "run folder (out/NAME otherwise)", &a->output);
  args.option("set", "change a key of the plan: key=value, may be repeated", &a->set);
  args.option("flops", "FLOP/s that training reaches, for the times of --dry-run", &a->flops,
              reals_above(0.0));
  a->device.declare(args);
  args.flag("resume", "go on with a run that was stopped", &a->resume);
  args.flag("dry-run", "say what the plan would do, take and need; load nothing", &a->dry_run);
  return [a] { return run(*a); };
}

}  // namespace

Command hybridize_command() {
  return {"hybridize", "the whole graft by a plan: score, place, convert, heal, measure, report",
          "  cambium hybridize plans/demo.toml -o out/demo\n"
          "  cambium hybridize plans/demo.toml -o out/demo --resume\n"
          "  cambium hybridize plans/apriel-h1.toml --dry-run",
          declare};
}

}  // namespace cambium
