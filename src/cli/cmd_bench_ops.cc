// bench ops: where the time of a model's step goes, operation by operation.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/signals.h"
#include "cli/bench_models.h"
#include "cli/commands.h"
#include "eval/op_profile.h"
#include "serve/cache_plan.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

struct OpsArgs {
  ModelsOption models;
  std::string step = "both";
  int64_t sequences = 1, context = 1024, tokens = 512, repeats = 10;
};

double per_second(double amount, const OpLine& line) {
  return line.call_seconds > 0.0 ? amount / line.call_seconds : 0.0;
}

// A part of a step; nothing of one that took no time.
double part(double seconds, const StepProfile& step) {
  return step.step_seconds > 0.0 ? seconds / step.step_seconds : 0.0;
}

Json step_json(const StepProfile& step) {
  Json ops = Json::array();
  for (const OpLine& line : step.ops) {
    ops.push_back({{"operation", line.kernel},
                   {"weights", line.weights},
                   {"shape", line.shape},
                   {"calls", line.calls},
                   {"us", 1e6 * line.call_seconds},
                   {"bytes", line.cost.bytes},
                   {"flops", line.cost.flops},
                   {"bytes_per_second", per_second(line.cost.bytes, line)},
                   {"flops_per_second", per_second(line.cost.flops, line)},
                   {"share_of_limit", line.share},
                   {"ms_a_step", 1e3 * line.step_seconds},
                   {"share_of_step", part(line.step_seconds, step)}});
  }
  return {{"step", step.decode ? "decode" : "prefill"},
          {"sequences", step.sequences},
          {"context", step.context},
          {"tokens", step.tokens},
          {"step_ms", 1e3 * step.step_seconds},
          {"wall_ms", 1e3 * step.wall_seconds},
          {"operations_ms", 1e3 * step.ops_seconds},
          {"finite", step.finite},
          {"operations", ops}};
}

std::string number(const char* format, double value) {
  return value == 0.0 ? "-" : fmt::format(fmt::runtime(format), value);
}

void print_step(const StepProfile& step) {
  if (step.decode) {
    fmt::print("decode, {} sequences at {} tokens\n", step.sequences, step.context);
  } else {
    fmt::print("prefill, {} tokens\n", step.tokens);
  }
  fmt::print("{:>8} {:>6} {:>6} {:>10} {:>8} {:>8} {:>9}  {}\n", "ms", "step", "calls", "us a call",
             "GB/s", "TFLOP/s", "of limit", "operation, shape, weights");
  for (const OpLine& line : step.ops) {
    fmt::print("{:>8.3f} {:>5.1f}% {:>6} {:>10.2f} {:>8} {:>8} {:>9}  {} {}{}\n",
               1e3 * line.step_seconds, 100.0 * part(line.step_seconds, step), line.calls,
               1e6 * line.call_seconds, number("{:.1f}", 1e-9 * per_second(line.cost.bytes, line)),
               number("{:.3f}", 1e-12 * per_second(line.cost.flops, line)),
               number("{:.1f}%", 100.0 * line.share), line.kernel, line.shape,
               line.weights.empty() ? "" : "  " + line.weights);
  }
  fmt::print("{:>8.3f} {:>5.1f}% all operations\n", 1e3 * step.ops_seconds,
             100.0 * part(step.ops_seconds, step));
  fmt::print("{:>8.3f}        the step with nothing timed inside; {:.3f} by the host's clock\n",
             1e3 * step.step_seconds, 1e3 * step.wall_seconds);
}

int run_ops(const OpsArgs& a) {
  const size_t count = a.models.count();
  OpProfileConfig config;
  config.sequences = a.sequences;
  config.context = a.context;
  config.tokens = a.tokens;
  config.repeats = a.repeats;
  config.cache_values = a.models.cache.values();
  config.page_size = a.models.cache.page_size;
  const StopAnywhere stop("nothing is measured to its end");
  Json json = Json::array();
  for (size_t i = 0; i < count; ++i) {
    const LoadedModel loaded = a.models.load(i);  // alone: it has all memory
    Model& model = *loaded.model;
    const std::string name = a.models.name(i);
    const MachineLimits limits = measure_limits(model);
    std::vector<StepProfile> steps;
    if (a.step != "prefill") {
      steps.push_back(profile_decode(model, config, limits));
    }
    if (a.step != "decode") {
      steps.push_back(profile_prefill(model, config, limits));
    }
    if (!a.models.json) {
      print_limits(name, limits);
    }
    note_unless_finite(name, std::all_of(steps.begin(), steps.end(),
                                         [](const StepProfile& step) { return step.finite; }));
    Json of_steps = Json::array();
    for (const StepProfile& step : steps) {
      if (a.models.json) {
        of_steps.push_back(step_json(step));
      } else {
        print_step(step);
      }
    }
    json.push_back({{"model", name},
                    {"device", model.device().describe()},
                    {"activations", dtype_name(model.activations())},
                    {"limits", limits_json(limits)},
                    {"steps", of_steps}});
  }
  if (a.models.json) {
    fmt::print("{}\n", json.dump(1));
  }
  return 0;
}

Action declare_ops(Args& args) {
  auto a = std::make_shared<OpsArgs>();
  a->models.declare(args);
  args.choice("step", "which is taken apart", {"both", "decode", "prefill"}, &a->step);
  args.option("sequences", "that decode at once", &a->sequences, {1, 4096});
  args.option("context", "tokens before the one that is decoded", &a->context,
              {0, kMaxPositions - 1});
  args.option("tokens", "of the prompt of a prefill", &a->tokens, {1, kMaxPositions});
  args.option("repeats", "steps of each measurement; medians are printed", &a->repeats,
              {1, 10'000});
  return [a] { return run_ops(*a); };
}

}  // namespace

Command bench_ops_command() {
  return {"ops", "each operation of a step of decoding and of a prefill, beside the limits",
          "  cambium bench ops models/teacher --sequences 4 --context 2048\n"
          "  cambium bench ops --random-weights plans/apriel-15b --storage bf16 --step decode "
          "--sequences 128 --context 1024",
          declare_ops};
}

}  // namespace cambium
