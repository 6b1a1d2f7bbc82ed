#include "eval/op_profile.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <tuple>

#include "base/checked.h"
#include "base/signals.h"
#include "base/text.h"
#include "eval/statistics.h"
#include "eval/step_cost.h"
#include "ops/device_clock.h"
#include "ops/optimizer/optimizer.h"
#include "ops/sampling/sampling.h"
#include "serve/cache.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Which parameter an address lies in, by its name without the number of its layer.
class WeightNames {
 public:
  explicit WeightNames(Model& model) {
    model.visit([&](const std::string& name, Parameter& p) {
      const auto* begin = static_cast<const std::byte*>(p.tensor.data);
      parameters_[begin] = {begin + p.tensor.bytes(), short_name(name)};
    });
  }
  std::string of(const std::vector<const void*>& weights) const {
    std::vector<std::string> names;
    for (const void* weight : weights) {
      const auto* at = static_cast<const std::byte*>(weight);
      auto found = parameters_.upper_bound(at);
      if (at != nullptr && found != parameters_.begin() && at < (--found)->second.end) {
        names.push_back(found->second.name);
      }
    }
    return join(names, " + ");
  }

 private:
  struct Range {
    const std::byte* end;
    std::string name;
  };
  static std::string short_name(std::string name) {
    constexpr std::string_view kLayers = "layers.";
    constexpr std::string_view kWeight = ".weight";
    if (name.starts_with(kLayers)) {
      name.erase(0, name.find('.', kLayers.size()) + 1);
    }
    if (name.ends_with(kWeight)) {
      name.resize(name.size() - kWeight.size());
    }
    return name;
  }
  std::map<const std::byte*, Range> parameters_;
};

/// Keeps what a first step calls, and times the same calls of those that follow.
class StepTimer : public OpTimer {
 public:
  enum class Mode { kDescribe, kEnds, kEach };
  struct Call {
    const char* kernel;
    OpWork work;
  };

  explicit StepTimer(Device device)
      : clock_(DeviceClock::on(device)), stream_(compute_stream(device)) {}
  void start(Mode mode) {
    mode_ = mode;
    at_ = 0;
    marks_.clear();
    clock_->clear();
  }
  void begin(const OpCall& call) override {
    if (mode_ == Mode::kDescribe) {
      calls_.push_back({call.kernel, work_of(call)});
    }
    CAMBIUM_CHECK(at_ < calls_.size() && calls_[at_].kernel == call.kernel,
                  "a step called other kernels than the one before: {}", call.kernel);
    if (mode_ == Mode::kEach || (mode_ == Mode::kEnds && at_ == 0)) {
      marks_.push_back(clock_->mark(call.stream));
    }
  }
  void end(const OpCall& call) override {
    ++at_;
    if (mode_ == Mode::kEach || (mode_ == Mode::kEnds && at_ == calls_.size())) {
      marks_.push_back(clock_->mark(call.stream));
    }
  }
  const std::vector<Call>& calls() const { return calls_; }
  /// Between the marks of each pair since start(), once the device is done.
  std::vector<double> seconds() const {
    std::vector<double> all;
    for (size_t i = 0; i + 1 < marks_.size(); i += 2) {
      all.push_back(clock_->seconds(marks_[i], marks_[i + 1]));
    }
    return all;
  }
  /// Marks with nothing between the two of a pair.
  void mark_nothing(int pairs) {
    for (int i = 0; i < 2 * pairs; ++i) {
      marks_.push_back(clock_->mark(stream_));
    }
  }

 private:
  std::unique_ptr<DeviceClock> clock_;
  CUstream_st* stream_;
  Mode mode_ = Mode::kDescribe;
  std::vector<Call> calls_;
  size_t at_ = 0;
  std::vector<int64_t> marks_;
};

/// Keeps a GPU busy with copies; nothing on the CPU.
class Busy {
 public:
  Busy(Device device, const MachineLimits& limits) : device_(device) {
    if (device.kind == Device::kCuda) {
      from_ = Buffer(kBytes, device);
      to_ = Buffer(kBytes, device);
      copy_seconds_ = 2.0 * static_cast<double>(kBytes) / limits.bytes_per_second;
    }
  }
  void queue(double seconds) const {
    for (double queued = 0.0; from_.bytes() > 0 && queued < seconds; queued += copy_seconds_) {
      copy_memory(to_.data(), device_, from_.data(), device_, kBytes);
    }
  }

 private:
  static constexpr int64_t kBytes = int64_t{1} << 27;
  Device device_;
  Buffer from_, to_;
  double copy_seconds_ = 0.0;
};

/// Sequences of a model in a cache of its own, and the call that a batch of them is.
class Steps {
 public:
  Steps(Model& model, const CacheConfig& config)
      : model_(model),
        cache_(model, config),
        workspace_(model.device()),
        tokens_(static_cast<size_t>(config.max_sequences)),
        configs_(tokens_.size()),
        uniforms_(tokens_.size(), 0.5),
        log_probabilities_(tokens_.size()) {
    for (int64_t s = 0; s < config.max_sequences; ++s) {
      slots_.push_back(cache_.open(config.max_tokens));
      CAMBIUM_CHECK(slots_.back() >= 0);
    }
  }
  /// From here on a call gives each sequence the tokens of positions [position, position + count).
  void set_piece(int64_t position, int64_t count) {
    position_ = position;
    count_ = count;
  }
  /// What sequences have behind them becomes zeros.
  void clear() { cache_.clear(); }
  /// Runs it, and gives the seconds that the host took until all but the choice was queued.
  double call(OpTimer* timer, bool sample) {
    const auto start = Clock::now();
    const WorkspaceScope scope(workspace_);
    Context ctx = context_for(model_, workspace_);
    ctx.timer = timer;
    const Tensor logits = forward(ctx);
    const double queued = seconds_since(start);
    if (sample) {
      sample_tokens(ctx, logits, configs_, uniforms_, tokens_, log_probabilities_);
    }
    return queued;
  }
  /// The same, to see whether its logits are numbers.
  bool finite() {
    const WorkspaceScope scope(workspace_);
    Context ctx = context_for(model_, workspace_);
    return all_finite(ctx, forward(ctx));
  }

 private:
  Tensor forward(Context& ctx) {
    batch_.clear();  // and what operations worked out of it: every step does so anew
    for (size_t s = 0; s < slots_.size(); ++s) {
      piece_.clear();
      for (int64_t p = position_; p < position_ + count_; ++p) {
        piece_.push_back(measured_token(static_cast<int64_t>(s), p, model_.spec().vocab));
      }
      batch_.add(piece_, position_, slots_[s]);
    }
    const Tensor hidden = model_.forward(ctx, batch_, {.states = cache_.prepare(batch_)});
    const Tensor last =
        ctx.arena->empty(hidden.dtype, {static_cast<int64_t>(slots_.size()), hidden.dim(1)});
    std::vector<int64_t> rows;
    for (int64_t s = 0; s < last.dim(0); ++s) {
      rows.push_back(batch_.last_row(s));
    }
    gather_rows(last, hidden, rows);
    return model_.logits(ctx, last);
  }

  Model& model_;
  Cache cache_;
  Workspace workspace_;
  Batch batch_;
  std::vector<int64_t> slots_;
  std::vector<int32_t> piece_;
  int64_t position_ = 0;
  int64_t count_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<SamplingConfig> configs_;
  std::vector<double> uniforms_;
  std::vector<float> log_probabilities_;
};

/// What was measured of one step: seconds of each call in each repeat, and of the whole.
struct Measurements {
  std::vector<std::vector<double>> each;
  std::vector<double> step, wall;
};

constexpr int kPairs = 64;             // of marks with nothing between them
constexpr double kHostSlack = 1e-3;    // that the device is kept busy beside the host's own time
constexpr double kMarkedSlower = 3.0;  // than the host queues a step without marks

Measurements measure(Steps& steps, StepTimer& timer, const Busy& busy, Device device, bool sample,
                     int64_t repeats) {
  steps.call(&timer, sample);  // describes; what is done once is done here and in the next
  const double host = steps.call(nullptr, sample);
  const double ahead = kMarkedSlower * host + kHostSlack;
  timer.start(StepTimer::Mode::kEach);
  busy.queue(ahead);
  timer.mark_nothing(kPairs);
  wait_for(device);
  const double nothing = median(timer.seconds());
  const auto taken = [&](StepTimer::Mode mode) {
    timer.start(mode);
    busy.queue(ahead);
    steps.call(&timer, sample);
    std::vector<double> seconds = timer.seconds();
    for (double& s : seconds) {
      s = std::max(0.0, s - nothing);
    }
    return seconds;
  };
  Measurements found;
  for (int64_t i = 0; i < repeats; ++i) {
    stop_point();
    const auto start = Clock::now();
    steps.call(nullptr, sample);
    found.wall.push_back(seconds_since(start));
    found.step.push_back(taken(StepTimer::Mode::kEnds).at(0));
    found.each.push_back(taken(StepTimer::Mode::kEach));
  }
  return found;
}

std::string short_kernel(std::string_view name) {
  constexpr std::string_view kForward = "_forward";
  return std::string(name.ends_with(kForward) ? name.substr(0, name.size() - kForward.size())
                                              : name);
}

// Calls of one kernel, shape and weights become one line.
std::vector<OpLine> lines_of(const std::vector<StepTimer::Call>& calls, const Measurements& found,
                             const WeightNames& names, const MachineLimits& limits) {
  struct Line {
    OpLine line;
    std::vector<double> calls, steps;  // seconds of each call, and of all of them in a repeat
  };
  std::map<std::tuple<std::string, std::string, std::string>, Line> lines;
  for (size_t i = 0; i < calls.size(); ++i) {
    const OpWork& work = calls[i].work;
    const std::string kernel = short_kernel(calls[i].kernel);
    std::string weights = names.of(work.weights);
    if (kernel == "matmul" && weights == "embed") {
      weights = "head";  // they are tied
    }
    Line& line = lines[{kernel, weights, work.shape}];
    line.line.kernel = kernel;
    line.line.weights = weights;
    line.line.shape = work.shape;
    line.line.cost = work.cost;
    ++line.line.calls;
    line.steps.resize(found.each.size());
    for (size_t r = 0; r < found.each.size(); ++r) {
      line.calls.push_back(found.each[r].at(i));
      line.steps[r] += found.each[r][i];
    }
  }
  std::vector<OpLine> out;
  for (auto& [key, line] : lines) {
    line.line.call_seconds = median(line.calls);
    line.line.step_seconds = median(line.steps);
    const double least = limits.seconds(line.line.cost);
    line.line.share = line.line.call_seconds > 0.0 ? least / line.line.call_seconds : 0.0;
    out.push_back(line.line);
  }
  std::stable_sort(out.begin(), out.end(), [](const OpLine& a, const OpLine& b) {
    return a.step_seconds > b.step_seconds;
  });
  return out;
}

StepProfile profile(Model& model, Steps& steps, const MachineLimits& limits, int64_t repeats) {
  const Device device = model.device();
  StepTimer timer(device);
  StepProfile out;
  out.finite = steps.finite();
  const Measurements found =
      measure(steps, timer, Busy(device, limits), device, out.finite, repeats);
  out.ops = lines_of(timer.calls(), found, WeightNames(model), limits);
  out.ops_seconds =
      std::accumulate(out.ops.begin(), out.ops.end(), 0.0,
                      [](double sum, const OpLine& line) { return sum + line.step_seconds; });
  out.step_seconds = median(found.step);
  out.wall_seconds = median(found.wall);
  return out;
}

void check(const OpProfileConfig& config) {
  expect(config.sequences > 0 && config.context >= 0 && config.tokens > 0 && config.repeats > 0,
         "[op profile] expected sequences, tokens and repeats above 0 and a context from 0, got "
         "{}, {}, {} and {}",
         config.sequences, config.tokens, config.repeats, config.context);
  in_range("[op profile]", "context", config.context, 0, kMaxPositions - 1);
  in_range("[op profile]", "tokens", config.tokens, 1, kMaxPositions);
}

}  // namespace

StepProfile profile_decode(Model& model, const OpProfileConfig& config,
                           const MachineLimits& limits) {
  check(config);
  CacheConfig cache;
  cache.piece_tokens = 1;
  cache.max_sequences = config.sequences;
  cache.max_tokens = config.context + 1;
  cache.values = config.cache_values;
  cache.page_size = config.page_size;
  Steps steps(model, cache);
  steps.set_piece(config.context, 1);
  steps.call(nullptr, false);  // takes all pages; its own results are of no use
  steps.clear();
  StepProfile out = profile(model, steps, limits, config.repeats);
  out.decode = true;
  out.sequences = config.sequences;
  out.context = config.context;
  out.tokens = config.sequences;
  return out;
}

StepProfile profile_prefill(Model& model, const OpProfileConfig& config,
                            const MachineLimits& limits) {
  check(config);
  CacheConfig cache;
  cache.max_sequences = 1;
  cache.max_tokens = config.tokens;
  cache.piece_tokens = config.tokens;
  cache.values = config.cache_values;
  cache.page_size = config.page_size;
  Steps steps(model, cache);
  steps.set_piece(0, config.tokens);
  StepProfile out = profile(model, steps, limits, config.repeats);
  out.sequences = 1;
  out.tokens = config.tokens;
  return out;
}

}  // namespace cambium
