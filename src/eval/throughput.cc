#include "eval/throughput.h"

#include <algorithm>
#include <chrono>
#include <ctime>

#include "base/checked.h"
#include "base/progress.h"
#include "eval/statistics.h"
#include "eval/step_cost.h"
#include "ops/optimizer/optimizer.h"
#include "serve/cache.h"
#include "serve/step_queue.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

struct Sample {
  double prefill = 0.0;  // tokens/s
  double decode = 0.0;
  double prefill_cpu = 0.0;  // milliseconds a token
  double decode_cpu = 0.0;
  bool finite = true;
};

/// Time by the clock on the wall and by what all threads of this process computed.
class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  double cpu_seconds() const {
    return static_cast<double>(std::clock() - cpu_start_) / CLOCKS_PER_SEC;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::clock_t cpu_start_ = std::clock();
};

/// Tokens of a sequence in one call: some 8,192 of all sequences on a GPU.
int64_t chunk_of(const Model& model, const ThroughputConfig& config) {
  if (config.prefill_chunk != 0) {
    return config.prefill_chunk;
  }
  return model.device().kind == Device::kCpu ? 256
                                             : std::max<int64_t>(64, 8192 / config.batch / 64 * 64);
}

enum class Run {
  kWarm,  // of the context only calls of every size: a GPU chooses the algorithms of each then
  kTimed,
  kLook  // timed, then one step more, to see whether its logits are numbers
};

Sample run_once(Model& model, int64_t context, const ThroughputConfig& config, Run how) {
  const int64_t chunk = chunk_of(model, config);
  CacheConfig cache_config;
  cache_config.max_sequences = config.batch;
  cache_config.max_tokens = context + config.decode_tokens + 1;
  cache_config.piece_tokens = chunk;
  cache_config.values = config.cache_values;
  cache_config.page_size = config.page_size;
  Cache cache(model, cache_config);
  StepQueue queue(model, cache.table_entries());
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < config.batch; ++i) {
    slots.push_back(cache.open(cache_config.max_tokens));
    CAMBIUM_CHECK(slots.back() >= 0);
  }
  std::vector<int32_t> piece;
  Batch batch;
  const auto call = [&](bool look) {
    const ForwardOptions options{.states = cache.prepare(batch)};
    const bool decodes = batch.size() == config.batch;
    bool finite = true;
    queue.run(batch, decodes && !look, [&](Context& ctx) {
      const Tensor hidden = model.forward(ctx, batch, options);
      Tensor last = hidden;
      if (!decodes) {
        last = ctx.arena->empty(hidden.dtype, {config.batch, hidden.dim(1)});
        std::vector<int64_t> rows;
        for (int64_t s = 0; s < config.batch; ++s) {
          rows.push_back(batch.last_row(s));
        }
        gather_rows(last, hidden, rows);
      }
      const Tensor logits = model.logits(ctx, last);
      finite = !look || all_finite(ctx, logits);
    });
    return finite;
  };
  Sample sample;
  const auto prefilled = static_cast<double>(config.batch * context);
  const auto decoded = static_cast<double>(config.batch * config.decode_tokens);
  const Stopwatch prefill;
  const auto step = [&](int64_t position, bool look) {
    batch.clear();
    for (int64_t s = 0; s < config.batch; ++s) {
      const int32_t next = measured_token(s, position, model.spec().vocab);
      batch.add(std::span(&next, 1), position, slots[static_cast<size_t>(s)]);
    }
    return call(look);
  };
  if (config.prefill) {
    for_each_call(model, config, context, false, [&](int64_t at, int64_t count) {
      if (how == Run::kWarm && at > 0 && at + count < context) {
        return;
      }
      batch.clear();
      for (int64_t s = 0; s < config.batch; ++s) {
        piece.clear();
        for (int64_t p = at; p < at + count; ++p) {
          piece.push_back(measured_token(s, p, model.spec().vocab));
        }
        batch.add(piece, at, slots[static_cast<size_t>(s)]);
      }
      call(false);
    });
  } else {
    // All pages are taken by the first step, whose own results are of no use.
    for (int64_t position = std::max<int64_t>(context - 3, 0); position < context; ++position) {
      step(position, false);
      if (position == std::max<int64_t>(context - 3, 0)) {
        queue.wait(0);
        cache.clear();
      }
    }
  }
  queue.wait(0);
  sample.prefill_cpu = 1e3 * prefill.cpu_seconds() / prefilled;
  sample.prefill = prefilled / prefill.seconds();
  const Stopwatch decode;
  for (int64_t i = 0; i < config.decode_tokens; ++i) {
    step(context + i, false);
  }
  queue.wait(0);
  sample.decode_cpu = 1e3 * decode.cpu_seconds() / decoded;
  sample.decode = decoded / decode.seconds();
  sample.finite = how != Run::kLook || step(context + config.decode_tokens, true);
  return sample;
}

Measured summarise(const std::vector<Sample>& samples, double Sample::*value) {
  std::vector<double> values;
  for (const Sample& sample : samples) {
    values.push_back(sample.*value);
  }
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  return {median(values), *low, *high};
}

}  // namespace

void for_each_call(const Model& model, const ThroughputConfig& config, int64_t context, bool decode,
                   const std::function<void(int64_t, int64_t)>& f) {
  if (decode) {
    f(context + config.decode_tokens / 2, 1);
    return;
  }
  const int64_t chunk = chunk_of(model, config);
  for (int64_t at = 0; at < context; at += chunk) {
    f(at, std::min(context - at, chunk));
  }
}

std::vector<std::vector<SpeedSummary>> measure_throughput(const std::vector<Model*>& models,
                                                          const ThroughputConfig& config) {
  expect(config.batch > 0 && config.repeats > 0 && config.decode_tokens > 0,
         "[throughput] expected batch, repeats and decode tokens above 0");
  const auto warms = [&](const Model& model) {
    return config.prefill && model.device().kind != Device::kCpu;
  };
  const auto rounds = static_cast<size_t>(config.repeats) * models.size() +
                      static_cast<size_t>(std::count_if(models.begin(), models.end(),
                                                        [&](const Model* m) { return warms(*m); }));
  Progress progress("speed", rounds * config.contexts.size(), {.unit = "runs"});
  const auto run = [&](Model& model, int64_t context, Run how) {
    const Sample sample = run_once(model, context, config, how);
    progress.advance(1);
    return sample;
  };
  std::vector<std::vector<SpeedSummary>> out(models.size());
  for (const int64_t context : config.contexts) {
    expect(context > 0, "[throughput] expected a context above 0 tokens, got {}", context);
    in_range("[throughput]", "context", context, 1, kMaxPositions);
    std::vector<std::vector<Sample>> samples(models.size());
    for (Model* model : models) {
      if (warms(*model)) {
        run(*model, context, Run::kWarm);
      }
    }
    for (int64_t repeat = 0; repeat < config.repeats; ++repeat) {
      for (size_t m = 0; m < models.size(); ++m) {
        samples[m].push_back(run(*models[m], context, repeat == 0 ? Run::kLook : Run::kTimed));
      }
    }
    for (size_t m = 0; m < models.size(); ++m) {
      const auto of = [&](double Sample::*value) { return summarise(samples[m], value); };
      out[m].push_back({context, config.batch, of(&Sample::prefill), of(&Sample::decode),
                        of(&Sample::prefill_cpu), of(&Sample::decode_cpu),
                        samples[m].front().finite});
    }
  }
  progress.finish();
  return out;
}

}  // namespace cambium
