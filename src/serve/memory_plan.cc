#include "serve/memory_plan.h"

#include <unistd.h>

#include <algorithm>

#include "base/progress.h"
#include "base/text.h"

namespace cambium {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
// Of the device, for what the driver takes beside our buffers.
constexpr int64_t kReserveShare = 64;
constexpr int64_t kReserveLeast = 256 * kMiB;
// Added to what was measured: other divisions of a step than those that were run.
constexpr int64_t kOtherShare = 64;
constexpr int64_t kOtherLeast = 16 * kMiB;
// Added to what was counted: scratch of kernels and of the matrix library.
constexpr int64_t kKernelShare = 4;
constexpr int64_t kKernelLeast = 48 * kMiB;

std::string human(int64_t bytes) {
  return human_bytes(static_cast<uint64_t>(std::max<int64_t>(bytes, 0)));
}

int64_t memory_of_host() {
  return static_cast<int64_t>(::sysconf(_SC_PHYS_PAGES)) *
         static_cast<int64_t>(::sysconf(_SC_PAGESIZE));
}

// Layers run one after the other in the same memory: one of each kind takes what all take.
ModelSpec one_of_each(ModelSpec spec) {
  std::vector<LayerSpec> kinds;
  for (const LayerSpec& layer : spec.layers) {
    if (std::find(kinds.begin(), kinds.end(), layer) == kinds.end()) {
      kinds.push_back(layer);
    }
  }
  spec.layers = std::move(kinds);
  return spec;
}

// Such a model with weights of zeros.
struct Dummy {
  Dummy(const ModelSpec& spec, bool narrow, Device device) : model(one_of_each(spec)) {
    weights.allocate(model, nullptr, narrow ? MatrixStorage::kBF16 : MatrixStorage::kF32,
                     Dtype::kF32, device);
    if (narrow && device.kind != Device::kCpu) {
      model.set_activations(Dtype::kBF16);
    }
  }
  Model model;
  Weights weights;
};

// Tokens of a piece of prompt, how many such pieces a step has, and tokens of the longest sequence.
struct Pieces {
  int64_t tokens = 0, count = 0, longest = 0;
};

Pieces largest_pieces(const Model& model, const EngineConfig& config) {
  const int64_t longest =
      config.max_tokens > 0 ? config.max_tokens : std::max<int64_t>(model.spec().max_positions, 1);
  const int64_t tokens = std::min(config.prefill_chunk, longest);
  return {tokens, std::clamp<int64_t>(config.prefill_tokens / tokens, 1, config.max_sequences),
          longest};
}

GenerationRequest request_of(int64_t prompt, int64_t number) {
  GenerationRequest request;
  request.prompt.assign(static_cast<size_t>(prompt), 0);
  request.max_new_tokens = 8;
  if (number % 2 == 1) {  // every way of sampling has scratch of its own
    request.sampling.temperature = 1.0F;
    request.sampling.top_k = 50;
    request.sampling.top_p = 0.9F;
  }
  return request;
}

// Steps of an engine: as many sequences as there may be begin at once, and pieces of prompt as
// large as they come run beside all the others, every row giving a token.
WorkspaceBytes run_engine(Model& model, const EngineConfig& settings) {
  const Pieces pieces = largest_pieces(model, settings);
  Engine engine(model, settings);
  const int64_t sequences = settings.max_sequences;
  const int64_t shortest =
      std::clamp<int64_t>(settings.prefill_tokens / sequences, 1, pieces.tokens);
  std::vector<Engine::Ticket> tickets;
  for (int64_t i = 0; i < sequences; ++i) {
    tickets.push_back(engine.submit(request_of(shortest, i)));
  }
  engine.step();
  for (int64_t i = 0; i < pieces.count; ++i) {
    if (!engine.finished(tickets[static_cast<size_t>(i)])) {
      engine.cancel(tickets[static_cast<size_t>(i)]);
    }
    engine.submit(request_of(pieces.tokens, i));
  }
  engine.step();
  engine.step();
  return engine.workspace_peak();
}

// State of sequences with many tokens behind them, in few pages: all but the last, which a step
// writes, are the same ones again and again.
class Borrowed {
 public:
  Borrowed(const Model& model, const CacheConfig& config, int64_t tokens)
      : plan_(model, config),
        written_((config.piece_tokens + plan_.config().page_size - 1) / plan_.config().page_size +
                 1) {
    const int64_t sequences = config.max_sequences;
    const int64_t page_size = plan_.config().page_size;
    pages_per_segment_ = (tokens + page_size - 1) / page_size;
    const int64_t pages = kShared + sequences * written_;
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t i = 0; i < pages_per_segment_; ++i) {
        const int64_t from_end = pages_per_segment_ - 1 - i;
        table_.push_back(static_cast<int32_t>(
            from_end < written_ ? kShared + s * written_ + from_end : i % kShared));
      }
    }
    for (const StateLayout& layout : plan_.layouts()) {
      Unit& unit = units_.emplace_back();
      for (const Part& part : layout.pages) {
        unit.add(unit.pages, part, {pages, page_size}, model.device());
      }
      for (const Part& part : layout.slots) {
        unit.add(unit.slots, part, {sequences}, model.device());
      }
    }
    for (const Unit& unit : units_) {
      states_.push_back({unit.pages, unit.slots, table_, pages_per_segment_});
    }
  }

  std::span<const UnitState> states() const { return states_; }

 private:
  static constexpr int64_t kShared = 64;

  struct Unit {
    void add(std::vector<Tensor>& to, const Part& part, std::vector<int64_t> shape, Device device) {
      shape.insert(shape.end(), part.shape.begin(), part.shape.end());
      owned.emplace_back(part.dtype, shape, false, device);
      to.push_back(owned.back().view);
    }
    std::vector<OwnedTensor> owned;
    std::vector<Tensor> pages, slots;
  };

  CachePlan plan_;
  int64_t written_;  // pages of its own that a sequence has at its end
  int64_t pages_per_segment_ = 0;
  std::vector<int32_t> table_;
  std::vector<Unit> units_;
  std::vector<UnitState> states_;
};

// The largest pieces of prompt beside tokens of all other sequences, each with `behind` tokens
// before it: attention cuts long sequences into parts whose results take scratch, and gathers keys
// of pieces that do not begin their sequences.
WorkspaceBytes run_behind(Model& model, const EngineConfig& settings, int64_t behind) {
  const Pieces pieces = largest_pieces(model, settings);
  const int64_t end = std::max(behind, std::min(pieces.tokens + 1, pieces.longest));
  const Borrowed state(model, cache_config(settings), end);
  const std::vector<int32_t> tokens(static_cast<size_t>(pieces.tokens));
  Batch batch;
  for (int64_t i = 0; i < settings.max_sequences; ++i) {
    const int64_t length = i < pieces.count ? pieces.tokens : 1;
    batch.add(std::span(tokens).first(static_cast<size_t>(length)), end - length, i, end);
  }
  Workspace workspace(model.device());
  {
    const WorkspaceScope scope(workspace);
    Context ctx = context_for(model, workspace);
    ctx.batch_invariant = settings.deterministic;
    model.forward(ctx, batch, {.states = state.states()});
  }
  return workspace.peak_bytes();
}

// Tokens that each of all sequences can have at once, if nothing but the cache were beside the
// weights.
int64_t most_behind(const MemoryRequest& request, const EngineConfig& settings, int64_t free) {
  const CachePlan cache(Model(*request.spec), cache_config(settings));
  const int64_t token = std::max<int64_t>(cache.lasting_bytes_per_token(), 1);
  const int64_t each = (free - request.weights.bytes) / settings.max_sequences / token;
  return std::clamp<int64_t>(each, 1, cache.config().max_tokens);
}

int64_t device_bytes(const MemoryPlan& plan) {
  return plan.taken + plan.weights + plan.workspace.device + plan.reserve;
}

// Total and what is taken of it.
void ask_device(const MemoryRequest& request, MemoryPlan& plan) {
  const Device device = request.device;
  plan.device = device.describe();
  if (device.kind == Device::kCuda) {
    const CudaDeviceInfo info = cuda_device_info(device);
    plan.device += ", " + info.name;
    plan.total = info.total_bytes;
    plan.taken = info.total_bytes - info.free_bytes;
  } else if (device.kind == Device::kCpu) {
    plan.total = memory_of_host();
  } else {
    plan.device = "a GPU";
    expect(request.total_bytes > 0,
           "[memory] there is no GPU to ask for its memory; say how much one has "
           "(--memory-total 80GB), or take --device cpu");
  }
  if (request.total_bytes > 0) {
    plan.total = request.total_bytes;
    plan.taken = 0;
  }
}

void divide(const MemoryRequest& request, const Model& model, MemoryPlan& plan) {
  CacheConfig config = cache_config(plan.engine);
  const int64_t room = plan.total - device_bytes(plan);
  const CachePlan whole(model, config);
  const int64_t least = whole.least_bytes();
  expect(room >= least,
         "[memory] {} of {} ({}) leave {} for the cache, and a sequence takes at least {}; take "
         "weights in bf16 (--storage bf16), fewer sequences, or a device with more memory",
         plan.parts(), human(plan.total), plan.device, human(room), human(least));
  const int64_t wanted = request.engine.memory_bytes;
  expect(wanted <= room,
         "[memory] {} of cache were asked for, but {} of {} ({}) leave {}; ask for less cache",
         human(wanted), plan.parts(), human(plan.total), plan.device, human(room));
  config.memory_bytes = wanted > 0 ? wanted : std::max<int64_t>(room, 1);
  const CachePlan limited(model, config);
  plan.cache = limited.sizes();
  plan.longest = limited.longest_in(plan.cache.bytes, limited.config().max_tokens);
  plan.engine.memory_bytes = std::max<int64_t>(plan.cache.bytes, 1);
  plan.engine.max_sequences = plan.cache.sequences;
  plan.engine.page_size = limited.config().page_size;
}

}  // namespace

std::string MemoryPlan::parts() const {
  std::string text;
  if (taken > 0) {
    text = human(taken) + " in use already, ";
  }
  text += fmt::format("weights {}, workspace {}{}", human(weights), measured ? "" : "about ",
                      human(workspace.device));
  if (cache.bytes > 0) {
    text += fmt::format(", cache {}", human(cache.bytes));
  }
  return text + fmt::format(", reserve {}", human(reserve));
}

std::string MemoryPlan::line() const {
  const int64_t tokens = cache.pages * engine.page_size;
  return fmt::format("memory of {}, {}: {}; {} left; {} sequences at once{}, the longest of {}",
                     device, human(total), parts(), human(left()), cache.sequences,
                     tokens > 0 ? fmt::format(" of {} tokens in all", tokens) : "", longest);
}

WorkspaceBytes measure_workspace(const ModelSpec& spec, bool narrow, const EngineConfig& config,
                                 Device device, int64_t behind) {
  Dummy dummy(spec, narrow, device);
  EngineConfig settings = completed(config, device);
  settings.memory_bytes = 0;
  settings.reserve = false;
  const WorkspaceBytes engine = run_engine(dummy.model, settings);
  const WorkspaceBytes deep = run_behind(dummy.model, settings, behind);
  WorkspaceBytes bytes{std::max(engine.device, deep.device), std::max(engine.host, deep.host)};
  bytes.device += std::max(bytes.device / kOtherShare, kOtherLeast);
  bytes.host += std::max(bytes.host / kOtherShare, kMiB);
  return bytes;
}

WorkspaceBytes count_workspace(const ModelSpec& spec, bool narrow, const EngineConfig& config) {
  const Device meta{Device::kMeta};
  Dummy dummy(spec, narrow, meta);
  const EngineConfig settings = completed(config, meta);
  const Pieces pieces = largest_pieces(dummy.model, settings);
  CacheConfig cache_settings = cache_config(settings);
  cache_settings.max_tokens = pieces.tokens;
  cache_settings.memory_bytes = 0;
  cache_settings.reserve = false;
  Cache cache(dummy.model, cache_settings);
  const std::vector<int32_t> tokens(static_cast<size_t>(pieces.tokens));
  Batch batch;
  for (int64_t i = 0; i < settings.max_sequences; ++i) {
    const int64_t length = i < pieces.count ? pieces.tokens : 1;
    batch.add(std::span(tokens).first(static_cast<size_t>(length)), 0, cache.open(length));
  }
  Workspace workspace(meta);
  {
    const WorkspaceScope scope(workspace);
    Context ctx = context_for(dummy.model, workspace);
    const Tensor hidden = dummy.model.forward(ctx, batch, {.states = cache.prepare(batch)});
    const Tensor rows =
        ctx.arena->empty(hidden.dtype, {settings.max_sequences, dummy.model.spec().width});
    dummy.model.logits(ctx, rows);
  }
  return workspace.peak_bytes();
}

MemoryPlan plan_memory(const MemoryRequest& request) {
  const Device device = request.device;
  MemoryPlan plan;
  plan.weights = request.weights.bytes;
  plan.engine = completed(request.engine, device);
  if (device.kind == Device::kCuda) {
    ask_device(request, plan);
    plan.measured = true;
    plan.workspace = measure_workspace(*request.spec, request.weights.narrow, plan.engine, device,
                                       most_behind(request, plan.engine, plan.total - plan.taken));
  } else {
    plan.workspace = count_workspace(
        *request.spec, request.weights.narrow && device.kind != Device::kCpu, plan.engine);
    plan.workspace.device += std::max(plan.workspace.device / kKernelShare, kKernelLeast);
  }
  ask_device(request, plan);  // after that, when the driver has loaded what it will
  plan.reserve = std::max(plan.total / kReserveShare, kReserveLeast);
  plan.engine.workspace = plan.workspace;
  plan.engine.reserve = true;
  divide(request, Model(*request.spec), plan);
  return plan;
}

EngineConfig planned_engine(const std::filesystem::path& dir, MatrixStorage storage, Device device,
                            const EngineConfig& config, const std::string& preset) {
  if (device.kind != Device::kCuda) {
    return config;
  }
  const ModelSpec spec = read_spec(dir, preset);
  const MemoryPlan plan =
      plan_memory({&spec, weight_sizes(dir, storage, preset), config, device, 0});
  say("{}", plan.line());
  set_memory_note(plan.parts());
  return plan.engine;
}

}  // namespace cambium
