#include "eval/step_cost.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>

#include "base/parallel.h"
#include "eval/statistics.h"
#include "ops/matmul/matmul.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

// Seconds of a call, the median of five times as many calls as take 20 ms.
template <class F>
double seconds_of(Device device, const F& call) {
  const auto timed = [&](int64_t calls) {
    wait_for(device);
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; ++i) {
      call();
    }
    wait_for(device);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() /
           static_cast<double>(calls);
  };
  timed(1);
  const auto calls = std::max<int64_t>(1, static_cast<int64_t>(0.02 / timed(1)));
  std::vector<double> samples;
  for (int i = 0; i < 5; ++i) {
    samples.push_back(timed(calls));
  }
  return median(samples);
}

}  // namespace

double experts_met(double tokens, int64_t top, int64_t experts) {
  const auto all = static_cast<double>(experts);
  return all * (1.0 - std::pow(1.0 - static_cast<double>(top) / all, tokens));
}

double keys_seen(int64_t position, int64_t tokens, int64_t window, int64_t sinks) {
  // As many as there are, up to those of the window and all sinks.
  const int64_t most = window + sinks;
  const int64_t growing = window == 0 ? tokens : std::clamp<int64_t>(most - position, 0, tokens);
  const auto p = static_cast<double>(position);
  const auto n = static_cast<double>(growing);
  return n * p + n * (n + 1) / 2 + static_cast<double>((tokens - growing) * most);
}

StepCosts::StepCosts(Model& model, Dtype values) {
  const ModelSpec& spec = model.spec();
  model.visit([&](const std::string& name, Parameter& p) {
    const auto bytes = static_cast<double>(p.tensor.bytes());
    const double flops = p.is_matrix() ? 2.0 * static_cast<double>(p.active()) : 0.0;
    const bool embedding = name == "embed.weight";
    if (embedding) {
      row_bytes_ = bytes / static_cast<double>(spec.vocab);
    }
    if (name == "head.weight" || (embedding && spec.tied_head)) {
      head_bytes_ = bytes;
      head_flops_ = flops;
    } else if (!embedding) {
      weight_bytes_ += p.used > 0 ? 0.0 : bytes;
      if (p.used > 0) {
        experts_.push_back({p.used, p.shape.front(), bytes});
      }
      token_flops_ += flops;
    }
  });
  for (const LayerSpec& layer : spec.layers) {
    for (const BranchSpec& branch : layer.branches) {
      for (size_t u = 0; u < branch.units.size(); ++u) {
        const UnitSpec& unit = branch.units[u];
        if (!branch.runs(u)) {
          continue;
        }
        const auto made = make_unit(unit, spec.width);
        const StateLayout layout = made->state_layout();
        slot_bytes_ += static_cast<double>(layout.bytes_per_sequence());
        if (!layout.pages.empty()) {
          add_pages(unit, layout, made->index(), values);
        }
      }
    }
  }
}

void StepCosts::add_pages(const UnitSpec& unit, const StateLayout& layout, const IndexShape& index,
                          Dtype values) {
  const Options& options = unit.options;
  const auto size = [&](const char* key, int64_t fallback = 0) {
    return options.integer(unit.kind, key, fallback);
  };
  const auto bytes = [&](size_t begin, size_t end) {
    const auto at = [&](size_t i) { return layout.pages.begin() + static_cast<ptrdiff_t>(i); };
    StateLayout some;
    some.pages = {at(begin), at(end)};
    return static_cast<double>(some.kept_in(values).bytes_per_token());
  };
  const int64_t heads = size("heads", 1);
  size_t attended = layout.pages.size();
  int64_t window = layout.window;
  if (index.heads > 0) {
    // Tokens that have an index look at as many keys as in a window, wherever these are.
    window = index.selection.all();
    const double scores = 2.0 * static_cast<double>(index.heads * index.dim);
    pages_.push_back({0, 0, bytes(attended - 1, attended), scores, scores});
    --attended;
  }
  double flops = 0.0;
  double expanded = 0.0;
  if (const int64_t rank = size("kv_rank"), rope = size("rope_dim"); rank > 0) {
    flops = 2.0 * static_cast<double>(heads * (2 * rank + rope));
    expanded = 2.0 * static_cast<double>(heads * (size("nope_dim") + rope + size("value_dim")));
  } else {
    int64_t numbers = 0;
    for (const Part& part : std::span(layout.pages).first(attended)) {
      numbers += part.bytes() / dtype_size(part.dtype);
    }
    const int64_t sharing = heads / size("kv_heads", heads);
    flops = 2.0 * static_cast<double>(numbers * sharing);
    expanded = flops;
  }
  pages_.push_back({window, layout.sinks, bytes(0, attended), flops, expanded});
}

void StepCosts::add_segment(StepCost& cost, int64_t position, int64_t tokens) const {
  const auto count = static_cast<double>(tokens);
  cost.bytes += count * row_bytes_ + 2.0 * slot_bytes_;
  cost.flops += count * token_flops_;
  for (const Pages& pages : pages_) {
    const int64_t first = pages.window == 0 ? 0 : std::max<int64_t>(0, position - pages.window + 1);
    const int64_t before = position - first + std::min(first, pages.sinks);
    cost.bytes += pages.token_bytes * (static_cast<double>(before) + 2.0 * count);
    cost.flops += pages.flops_of(tokens) * keys_seen(position, tokens, pages.window, pages.sinks);
  }
}

double StepCosts::expert_bytes(double tokens) const {
  return std::accumulate(experts_.begin(), experts_.end(), 0.0, [&](double sum, const Experts& e) {
    return sum + e.bytes * experts_met(tokens, e.top, e.experts) / static_cast<double>(e.experts);
  });
}

StepCost StepCosts::of(const Segments& segments, int64_t logit_rows) const {
  StepCost cost{.bytes = weight_bytes_ + (logit_rows > 0 ? head_bytes_ : 0.0),
                .flops = static_cast<double>(logit_rows) * head_flops_};
  cost.bytes += expert_bytes(static_cast<double>(segments.tokens()));
  for (int64_t s = 0; s < segments.count(); ++s) {
    add_segment(cost, segments.position[static_cast<size_t>(s)], segments.length(s));
  }
  return cost;
}

StepCost StepCosts::of(int64_t sequences, int64_t position, int64_t tokens) const {
  StepCost cost{.bytes = weight_bytes_ + head_bytes_,
                .flops = static_cast<double>(sequences) * head_flops_};
  cost.bytes += expert_bytes(static_cast<double>(sequences * tokens));
  for (int64_t s = 0; s < sequences; ++s) {
    add_segment(cost, position, tokens);
  }
  return cost;
}

MachineLimits measure_limits(const Model& model) {
  const Device device = model.device();
  const bool cpu = device.kind == Device::kCpu;
  MachineLimits limits;
  {
    const int64_t bytes = int64_t{1} << (cpu ? 28 : 29);
    const Buffer from(bytes, device);
    const Buffer to(bytes, device);
    const double seconds = seconds_of(device, [&] {
      if (!cpu) {
        copy_memory(to.data(), device, from.data(), device, bytes);
        return;
      }
      parallel_for(bytes, int64_t{4} << 20, [&](int64_t begin, int64_t end) {
        std::memcpy(static_cast<std::byte*>(to.data()) + begin,
                    static_cast<const std::byte*>(from.data()) + begin,
                    static_cast<size_t>(end - begin));
      });
    });
    limits.bytes_per_second = 2.0 * static_cast<double>(bytes) / seconds;
  }
  const Dtype weights = model.head().dtype;
  const int64_t size = cpu ? 1024 : model.activations() == Dtype::kBF16 ? 8192 : 4096;
  const OwnedTensor x(model.activations(), {size, size}, false, device);
  const OwnedTensor w(weights, {size, size}, false, device);
  fill(x.view, 0.5);
  fill(w.view, 0.25);
  Workspace workspace(device);
  const Context ctx = workspace.context(model.activations());
  const double seconds = seconds_of(device, [&] {
    Context call = ctx;
    const ArenaScope scope(*call.arena);
    matmul(call, x.view, w.view);
  });
  limits.flops_per_second = 2.0 * static_cast<double>(size * size * size) / seconds;
  return limits;
}

}  // namespace cambium
