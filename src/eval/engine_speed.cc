#include "eval/engine_speed.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/random.h"
#include "base/text.h"
#include "eval/statistics.h"

namespace cambium {
namespace {

using Clock = std::chrono::steady_clock;

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

// What a GPU keeps free for the activations of a step.
constexpr double kWorkspaceShare = 0.06;

int64_t memory_in_use(Device device) {
  if (device.kind == Device::kCuda) {
    const CudaDeviceInfo info = cuda_device_info(device);
    return info.total_bytes - info.free_bytes;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

// Bytes of a whole sequence's pages that it does not need to begin.
int64_t beyond_beginning(const CachePlan& plan, const EngineConfig& engine, int64_t input,
                         int64_t tokens) {
  const int64_t page_size = plan.config().page_size;
  const auto pages = [&](int64_t n) { return (n + page_size - 1) / page_size; };
  const int64_t first = std::min(tokens, input + engine.reserve_tokens);
  return (pages(tokens) - pages(first)) * page_size * plan.lasting_bytes_per_token();
}

// As many sequences as there are requests and as memory holds, and memory for just these.
EngineConfig fitted(const Model& model, const EngineSpeedConfig& config) {
  const int64_t tokens = config.input + config.output - 1;
  EngineConfig engine = completed(config.engine, model.device());
  engine.max_tokens = tokens;
  int64_t memory = engine.memory_bytes;
  if (memory == 0 && model.device().kind == Device::kCuda) {
    const CudaDeviceInfo info = cuda_device_info(model.device());
    memory = info.free_bytes -
             static_cast<int64_t>(kWorkspaceShare * static_cast<double>(info.total_bytes));
  }
  const CachePlan plan(model, cache_config(engine));
  engine.max_sequences = std::min(engine.max_sequences, config.sequences);
  if (memory != 0) {
    const int64_t each = plan.sequence_bytes(tokens);
    expect(memory >= each || each == 0,
           "[throughput] a sequence of {} tokens takes {} of the cache, and there are {}; take "
           "shorter ones, or weights in bf16",
           tokens, human_bytes(static_cast<uint64_t>(each)),
           human_bytes(static_cast<uint64_t>(std::max<int64_t>(memory, 0))));
    // The oldest may need all of its tokens, the others what they begin with.
    const int64_t least = engine.admission == Admission::kWhole
                              ? each
                              : each - beyond_beginning(plan, engine, config.input, tokens);
    const int64_t fit = each == 0 ? 0 : 1 + (memory - each) / least;
    engine.max_sequences = each == 0 ? engine.max_sequences : std::min(engine.max_sequences, fit);
    engine.memory_bytes = std::min(memory, engine.max_sequences * each);
  }
  return engine;
}

struct Step {
  double ms = 0.0;
  int64_t sequences = 0;
  bool decodes_only = false;
  StepCost cost;
};

Measured of_values(const std::vector<double>& values) {
  return {median(values), quantile(values, 0.0), quantile(values, 1.0)};
}

}  // namespace

EngineSpeed measure_engine(Model& model, const EngineSpeedConfig& config,
                           const MachineLimits& limits) {
  expect(config.input > 0 && config.output > 0 && config.sequences > 0,
         "[throughput] expected input, output and sequences above 0, got {}, {} and {}",
         config.input, config.output, config.sequences);
  Engine engine(model, fitted(model, config));
  const StepCosts costs(model, config.engine.cache_values);
  const auto request = [&](int64_t stream, int64_t output) {
    GenerationRequest made;
    Rng random(config.seed, static_cast<uint64_t>(stream));
    for (int64_t i = 0; i < config.input; ++i) {
      made.prompt.push_back(static_cast<int32_t>(random.below(model.spec().vocab)));
    }
    made.max_new_tokens = output;
    made.stream = static_cast<uint64_t>(stream);
    return made;
  };
  // What is done once (memory of a step, plans of products) is not part of the speed.
  engine.generate({request(config.sequences, std::min<int64_t>(config.output, 4))});

  std::vector<std::vector<Clock::time_point>> times(static_cast<size_t>(config.sequences));
  std::vector<Engine::Ticket> tickets;
  const Clock::time_point start = Clock::now();
  for (int64_t s = 0; s < config.sequences; ++s) {
    GenerationRequest made = request(s, config.output);
    made.on_token = [&of = times[static_cast<size_t>(s)]](int32_t) {
      of.push_back(Clock::now());
      return true;
    };
    tickets.push_back(engine.submit(std::move(made)));
  }
  std::vector<Step> steps;
  Clock::time_point before = Clock::now();
  while (engine.step()) {
    const Clock::time_point now = Clock::now();
    const Segments segments = engine.batch().segments();
    steps.push_back({.ms = ms_between(before, now),
                     .sequences = segments.count(),
                     .decodes_only = segments.count() == engine.batch().size(),
                     .cost = costs.of(segments, engine.chosen())});
    before = now;
  }

  EngineSpeed speed;
  std::vector<double> first, first_admitted, gaps;
  for (size_t s = 0; s < tickets.size(); ++s) {
    const GenerationResult result = engine.take(tickets[s]);
    speed.input_tokens += result.prompt_tokens;
    speed.preemptions += result.preemptions;
    speed.recomputed_tokens += result.recomputed_tokens;
    speed.output_tokens += static_cast<int64_t>(result.tokens.size());
    speed.finite = speed.finite &&
                   std::all_of(result.log_probabilities.begin(), result.log_probabilities.end(),
                               [](float p) { return std::isfinite(p); });
    first.push_back(ms_between(start, times[s].front()));
    first_admitted.push_back(1e3 * result.prefill_seconds);
    for (size_t t = 1; t < times[s].size(); ++t) {
      gaps.push_back(ms_between(times[s][t - 1], times[s][t]));
    }
    speed.seconds = std::max(speed.seconds, 1e-3 * ms_between(start, times[s].back()));
  }
  speed.first_token = of_values(first);
  speed.first_token_admitted = of_values(first_admitted);
  if (!gaps.empty()) {
    speed.token_median = median(gaps);
    speed.token_p99 = quantile(gaps, 0.99);
  }
  speed.steps = static_cast<int64_t>(steps.size());
  speed.output_rate = static_cast<double>(speed.output_tokens) / speed.seconds;
  StepCost all;
  double ms = 0.0;
  double least = 0.0;
  for (const Step& step : steps) {
    speed.largest_batch = std::max(speed.largest_batch, step.sequences);
    all += step.cost;
    ms += step.ms;
    least += limits.seconds(step.cost);
  }
  speed.step_bytes = all.bytes / static_cast<double>(speed.steps);
  speed.step_flops = all.flops / static_cast<double>(speed.steps);
  speed.share = 1e3 * least / ms;
  double steady_ms = 0.0;
  double steady_least = 0.0;
  int64_t steady_tokens = 0;
  for (const Step& step : steps) {
    if (step.decodes_only && step.sequences == speed.largest_batch) {
      steady_ms += step.ms;
      steady_tokens += step.sequences;
      steady_least += limits.seconds(step.cost);
    }
  }
  if (steady_tokens > 0) {
    speed.steady_rate = 1e3 * static_cast<double>(steady_tokens) / steady_ms;
    speed.steady_share = 1e3 * steady_least / steady_ms;
  }
  speed.cache_bytes = engine.cache().bytes();
  speed.peak_bytes = memory_in_use(model.device());
  return speed;
}

}  // namespace cambium
