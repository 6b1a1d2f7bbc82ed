// bench: how fast models run, beside what the machine can do.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/bench_models.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/engine_speed.h"
#include "eval/throughput.h"
#include "serve/memory_plan.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

Json measured_json(const Measured& m) {
  return {m.value, m.low, m.high};
}

// --- bench, bench prefill, bench decode: calls of one shape.
enum class Shown { kBoth, kPrefill, kDecode };

struct SpeedArgs {
  ModelsOption models;
  std::vector<int64_t> contexts;
  int64_t batch = 1, piece = 0, decode = 32, repeats = 5;
};

void print_both(const std::vector<std::string>& names,
                const std::vector<std::vector<SpeedSummary>>& speeds, bool as_json) {
  Json json = Json::array();
  if (!as_json) {
    fmt::print("{:<28} {:>8} {:>6} {:>24} {:>24} {:>14} {:>14}\n", "model", "context", "batch",
               "prefill tok/s [range]", "decode tok/s [range]", "CPU ms prefill", "a token decode");
  }
  for (size_t i = 0; i < names.size(); ++i) {
    for (const SpeedSummary& s : speeds[i]) {
      if (as_json) {
        json.push_back({{"model", names[i]},
                        {"context", s.context},
                        {"batch", s.batch},
                        {"prefill", measured_json(s.prefill)},
                        {"decode", measured_json(s.decode)},
                        {"prefill_cpu_ms", measured_json(s.prefill_cpu)},
                        {"decode_cpu_ms", measured_json(s.decode_cpu)},
                        {"finite", s.finite}});
      } else {
        fmt::print(
            "{:<28} {:>8} {:>6} {:>24} {:>24} {:>14.3f} {:>14.3f}\n", names[i], s.context, s.batch,
            fmt::format("{:.0f} [{:.0f}, {:.0f}]", s.prefill.value, s.prefill.low, s.prefill.high),
            fmt::format("{:.1f} [{:.1f}, {:.1f}]", s.decode.value, s.decode.low, s.decode.high),
            s.prefill_cpu.value, s.decode_cpu.value);
      }
    }
  }
  if (as_json) {
    fmt::print("{}\n", json.dump(1));
  }
}

// The calls of one kind beside the least time that the machine's limits allow them.
void print_one(const std::vector<std::string>& names, const std::vector<Model*>& models,
               const std::vector<MachineLimits>& all_limits,
               const std::vector<std::vector<SpeedSummary>>& speeds, const ThroughputConfig& config,
               Shown shown, bool as_json) {
  const bool decode = shown == Shown::kDecode;
  Json json = Json::array();
  for (size_t i = 0; i < names.size(); ++i) {
    const MachineLimits& limits = all_limits[i];
    const StepCosts costs(*models[i], config.cache_values);
    if (!as_json) {
      print_limits(names[i], limits);
      fmt::print("{:>8} {:>6} {:>26} {:>10} {:>10} {:>10} {:>10} {:>9}\n", "context", "batch",
                 decode ? "decode tok/s [range]" : "prefill tok/s [range]",
                 decode ? "ms a step" : "ms", "GB", "TFLOP", "least ms", "of limit");
    }
    for (const SpeedSummary& s : speeds[i]) {
      const Measured& rate = decode ? s.decode : s.prefill;
      const double tokens = static_cast<double>(s.batch * (decode ? 1 : s.context));
      const double ms = 1e3 * tokens / rate.value;
      StepCost cost;
      double least = 0.0;
      for_each_call(*models[i], config, s.context, decode, [&](int64_t position, int64_t length) {
        const StepCost call = costs.of(s.batch, position, length);
        cost += call;
        least += 1e3 * limits.seconds(call);
      });
      if (as_json) {
        json.push_back({{"model", names[i]},
                        {"context", s.context},
                        {"batch", s.batch},
                        {decode ? "decode" : "prefill", measured_json(rate)},
                        {"ms", ms},
                        {"bytes", cost.bytes},
                        {"flops", cost.flops},
                        {"least_ms", least},
                        {"share", least / ms},
                        {"finite", s.finite},
                        {"limits", limits_json(limits)}});
      } else {
        fmt::print("{:>8} {:>6} {:>26} {:>10.3f} {:>10.4f} {:>10.4f} {:>10.3f} {:>8.1f}%\n",
                   s.context, s.batch,
                   fmt::format("{:.1f} [{:.1f}, {:.1f}]", rate.value, rate.low, rate.high), ms,
                   1e-9 * cost.bytes, 1e-12 * cost.flops, least, 100.0 * least / ms);
      }
    }
  }
  if (as_json) {
    fmt::print("{}\n", json.dump(1));
  }
}

int run_speed(const SpeedArgs& a, Shown shown) {
  const size_t count = a.models.count();
  const StopAnywhere stop("nothing is measured to its end");
  std::vector<LoadedModel> loaded;
  std::vector<Model*> models;
  std::vector<std::string> names;
  for (size_t i = 0; i < count; ++i) {
    loaded.push_back(a.models.load(i));
    models.push_back(loaded.back().model.get());
    names.push_back(a.models.name(i));
  }
  ThroughputConfig config;
  config.contexts = a.contexts.empty() ? std::vector<int64_t>{512, 4096} : a.contexts;
  config.batch = a.batch;
  config.decode_tokens = shown == Shown::kPrefill ? 1 : a.decode;
  config.repeats = a.repeats;
  config.cache_values = a.models.cache.values();
  config.page_size = a.models.cache.page_size;
  config.prefill = shown != Shown::kDecode;
  config.prefill_chunk = a.piece;
  // Before: a copy measured just after 75 GB of a GPU were given back took 17 % longer.
  std::vector<MachineLimits> limits;
  for (const Model* model : models) {
    if (shown != Shown::kBoth) {
      limits.push_back(measure_limits(*model));
    }
  }
  const auto speeds = measure_throughput(models, config);
  for (size_t i = 0; i < count; ++i) {
    note_unless_finite(names[i], std::all_of(speeds[i].begin(), speeds[i].end(),
                                             [](const SpeedSummary& s) { return s.finite; }));
  }
  if (shown == Shown::kBoth) {
    print_both(names, speeds, a.models.json);
  } else {
    print_one(names, models, limits, speeds, config, shown, a.models.json);
  }
  return 0;
}

template <Shown kShown>
Action declare_speed(Args& args) {
  auto a = std::make_shared<SpeedArgs>();
  a->models.declare(args);
  args.option("contexts",
              kShown == Shown::kPrefill ? "tokens of a prompt (512,4096)"
                                        : "tokens before the measured ones (512,4096)",
              &a->contexts, {1});
  args.option("batch", "sequences at once", &a->batch, {1, 4096});
  if constexpr (kShown != Shown::kDecode) {
    args.option("piece", "tokens of a prompt in one call (0 = by the device)", &a->piece,
                {0, kMaxPositions});
  }
  if constexpr (kShown != Shown::kPrefill) {
    args.option("decode", "tokens decoded", &a->decode, {1, kMaxPositions});
  }
  args.option("repeats", "rounds; the median and the range are printed", &a->repeats, {1, 10'000});
  return [a] { return run_speed(*a, kShown); };
}

// --- bench throughput: many requests through the engine.
struct ThroughputArgs {
  ModelsOption models;
  int64_t input = 1024, output = 128, sequences = 32, batch = 4096, prefill = 0, seed = 1;
  EngineOptions engine;
};

Json engine_json(const std::string& model, const ThroughputArgs& a, const EngineSpeed& s,
                 const MachineLimits& limits) {
  return {
      {"model", model},
      {"input", a.input},
      {"output", a.output},
      {"sequences", a.sequences},
      {"largest_batch", s.largest_batch},
      {"steps", s.steps},
      {"preemptions", s.preemptions},
      {"recomputed_tokens", s.recomputed_tokens},
      {"seconds", s.seconds},
      {"output_tokens_per_second", s.output_rate},
      {"all_tokens_per_second", static_cast<double>(s.input_tokens + s.output_tokens) / s.seconds},
      {"steady_decode_tokens_per_second", s.steady_rate},
      {"first_token_ms", measured_json(s.first_token)},
      {"first_token_admitted_ms", measured_json(s.first_token_admitted)},
      {"token_ms", {{"median", s.token_median}, {"p99", s.token_p99}}},
      {"step_bytes", s.step_bytes},
      {"step_flops", s.step_flops},
      {"share", s.share},
      {"steady_share", s.steady_share},
      {"finite", s.finite},
      {"cache_bytes", s.cache_bytes},
      {"peak_bytes", s.peak_bytes},
      {"limits", limits_json(limits)}};
}

void print_engine(const std::string& model, const ThroughputArgs& a, const EngineSpeed& s,
                  const MachineLimits& limits) {
  const auto line = [](const char* what, const std::string& value) {
    fmt::print("  {:<36} {}\n", what, value);
  };
  const auto range = [](const Measured& m) {
    return fmt::format("{:.1f} ms [{:.1f}, {:.1f}]", m.value, m.low, m.high);
  };
  const auto bytes = [](int64_t n) { return human_bytes(static_cast<uint64_t>(n)); };
  print_limits(model, limits);
  line("requests", fmt::format("{} of {} tokens in and {} out", a.sequences, a.input, a.output));
  line("largest batch",
       fmt::format("{} ({} steps, {:.2f} s)", s.largest_batch, s.steps, s.seconds));
  line("output", fmt::format("{:.1f} tokens/s ({:.1f} with the input)", s.output_rate,
                             static_cast<double>(s.input_tokens + s.output_tokens) / s.seconds));
  line("decode of the largest batch", fmt::format("{:.1f} tokens/s, {:.1f} % of the limit",
                                                  s.steady_rate, 100.0 * s.steady_share));
  line("first token, from submission", range(s.first_token));
  line("first token, from being admitted", range(s.first_token_admitted));
  line("a token", fmt::format("{:.2f} ms, p99 {:.2f} ms", s.token_median, s.token_p99));
  line("a mean step",
       fmt::format("{:.4f} GB, {:.4f} TFLOP", 1e-9 * s.step_bytes, 1e-12 * s.step_flops));
  line("all steps", fmt::format("{:.1f} % of the limit", 100.0 * s.share));
  line("sent back to wait",
       fmt::format("{} times, {} tokens computed again", s.preemptions, s.recomputed_tokens));
  line("memory",
       fmt::format("{} at most, {} of it the cache's", bytes(s.peak_bytes), bytes(s.cache_bytes)));
}

int run_throughput(const ThroughputArgs& a) {
  const size_t count = a.models.count();
  EngineSpeedConfig config;
  config.input = a.input;
  config.output = a.output;
  config.sequences = a.sequences;
  config.seed = static_cast<uint64_t>(a.seed);
  EngineConfig engine;
  engine.max_sequences = std::min(a.batch, a.sequences);
  engine.max_tokens = a.input + a.output - 1;
  a.engine.apply(engine);
  engine.cache_values = a.models.cache.values();
  engine.page_size = a.models.cache.page_size;
  engine.prefill_tokens = a.prefill;
  const StopAnywhere stop("nothing is measured to its end");
  Json json = Json::array();
  for (size_t i = 0; i < count; ++i) {
    config.engine = planned_engine(a.models.path(i), parse_storage(a.models.storage),
                                   a.models.device.device(), engine, a.models.preset(i));
    const LoadedModel loaded = a.models.load(i);  // alone: it has all memory
    const MachineLimits limits = measure_limits(*loaded.model);
    const EngineSpeed speed = measure_engine(*loaded.model, config, limits);
    note_unless_finite(a.models.name(i), speed.finite);
    if (a.models.json) {
      json.push_back(engine_json(a.models.name(i), a, speed, limits));
    } else {
      print_engine(a.models.name(i), a, speed, limits);
    }
  }
  if (a.models.json) {
    fmt::print("{}\n", json.dump(1));
  }
  return 0;
}

Action declare_throughput(Args& args) {
  auto a = std::make_shared<ThroughputArgs>();
  a->models.declare(args);
  args.option("input", "tokens of a prompt, random", &a->input, {1, kMaxPositions});
  args.option("output", "tokens of an answer", &a->output, {1, kMaxPositions});
  args.option("sequences", "requests, all there from the beginning", &a->sequences, {1, 1'000'000});
  args.option("batch", "sequences at once at most; fewer where memory holds fewer", &a->batch,
              {1, 4096});
  a->engine.declare(args);
  args.option("prefill", "tokens of prompts in a step at most (0 = by the device)", &a->prefill,
              {0, kMaxPositions});
  args.option("seed", "of the prompts", &a->seed);
  return [a] { return run_throughput(*a); };
}

}  // namespace

Command bench_command() {
  return {"bench",
          "prefill and decode speed of one or more models, side by side",
          "  cambium bench models/teacher out/demo/stages/60/model --contexts 512,8192\n"
          "  cambium bench --random-weights plans/apriel-15b --storage bf16 --contexts 16\n"
          "  cambium bench throughput models/teacher --input 256 --output 64 --sequences 64",
          declare_speed<Shown::kBoth>,
          {{"throughput", "many requests at once through the engine",
            "  cambium bench throughput models/teacher --input 256 --output 64 --sequences 64\n"
            "  cambium bench throughput --random-weights plans/apriel-15b --storage bf16 --input "
            "4096 --output 1024 --sequences 128",
            declare_throughput},
           {"prefill", "reading prompts, beside the machine's limits",
            "  cambium bench prefill models/teacher --contexts 512,4096 --batch 4",
            declare_speed<Shown::kPrefill>},
           {"decode", "one token after the other behind zeros, beside the machine's limits",
            "  cambium bench decode models/teacher --contexts 16,4096 --batch 1",
            declare_speed<Shown::kDecode>},
           bench_train_command(),
           bench_ops_command()}};
}

}  // namespace cambium
