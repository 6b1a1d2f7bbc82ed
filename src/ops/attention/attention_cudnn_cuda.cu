// When cuDNN computes attention without pages, and how a call becomes calls of it: whole sequences
// in bf16 (training, and scoring without a cache), where they are long enough to pay. Over pages
// see attention_prefill_cuda.cu.
//
// Its plans are made for fixed sizes and take half a second each, so sizes are few: segments of one
// length that is a multiple of kEvenLength are taken as they are; others are packed in its ragged
// layout with the length and the number of segments rounded up. The backward pass that gives the
// same bits every time keeps all of dP, (H, length, length) for each segment, so it goes in runs of
// segments, and within a long segment in runs of heads, that fit in kGradWorkspace.
//
// What is kept between the passes is what our own kernels keep, so either pass may be either's.
#include <algorithm>
#include <vector>

#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cudnn.h"

namespace cambium::cuda::attention {
namespace {

constexpr int64_t kEvenLength = 128;
constexpr int64_t kStatsWorkspace = int64_t{256} << 20;
constexpr int64_t kGradWorkspace = int64_t{1} << 30;
constexpr int64_t kMostGradWorkspace = int64_t{4} << 30;  // where one group of heads takes more
constexpr float kLn2 = 0.693147180559945309F;

/// Segments [first, first + count) that one plan serves.
struct Run {
  int64_t first, count;
  int64_t batch;    // of the plan: count, or more with segments of length 0
  int64_t length;   // of the plan
  int64_t numbers;  // where its lengths and offsets begin in the plan's memory, if ragged
};

/// Rows of all tensors, in elements from token to token.
struct RowSizes {
  int64_t q, k, v, y, dq, dk, dv;
  bool operator==(const RowSizes&) const = default;
};

/// How the segments of a forward call are cut into runs; on the device, for each ragged run: start
/// (batch), length (batch), then for each row size the offsets (batch + 1).
struct RunPlan {
  struct Key {
    bool backward;
    int64_t heads;
    RowSizes rows;
    bool operator==(const Key&) const = default;
  };
  Key key;
  bool ragged;
  std::vector<Run> runs;
  DeviceArray memory;
};

/// n rounded up to 2^i or 3 * 2^(i - 1).
int64_t rounded_length(int64_t n) {
  int64_t power = kFewestTokens;
  while (power < n) {
    power *= 2;
  }
  return power > kFewestTokens && power / 4 * 3 >= n ? power / 4 * 3 : power;
}
int64_t rounded_batch(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

/// The bytes that grow with the run: dP, or what is kept of the softmax.
int64_t run_bytes(bool backward, int64_t heads, int64_t batch, int64_t length) {
  return batch * heads * length *
         (backward ? length * int64_t{sizeof(bf16)} : int64_t{sizeof(float)});
}
int64_t run_limit(bool backward) {
  return backward ? kGradWorkspace : kStatsWorkspace;
}

std::vector<Run> even_runs(const AttentionShape& shape, bool backward) {
  const int64_t length = shape.length(0);
  int64_t count = std::clamp<int64_t>(
      run_limit(backward) / run_bytes(backward, shape.heads, 1, length), 1, shape.segments);
  while (shape.segments % count != 0) {
    --count;
  }
  std::vector<Run> runs;
  for (int64_t s = 0; s < shape.segments; s += count) {
    runs.push_back({s, count, count, length, 0});
  }
  return runs;
}

std::vector<Run> ragged_runs(const AttentionShape& shape, bool backward) {
  std::vector<Run> runs;
  for (int64_t s = 0; s < shape.segments; ++s) {
    const int64_t length = rounded_length(shape.length(s));
    if (!runs.empty()) {
      Run& last = runs.back();
      const int64_t longer = std::max(last.length, length);
      const int64_t batch = rounded_batch(last.count + 1);
      if (run_bytes(backward, shape.heads, batch, longer) <= run_limit(backward)) {
        last = {last.first, last.count + 1, batch, longer, 0};
        continue;
      }
    }
    runs.push_back({s, 1, 1, length, 0});
  }
  return runs;
}

bool even(const AttentionShape& shape) {
  if (shape.length(0) % kEvenLength != 0) {
    return false;
  }
  for (int64_t s = 1; s < shape.segments; ++s) {
    if (shape.length(s) != shape.length(0)) {
      return false;
    }
  }
  return true;
}

RunPlan make_runs(const AttentionShape& shape, const RunPlan::Key& key, const Launch& on) {
  RunPlan plan{key, !even(shape), {}, {}};
  if (!plan.ragged) {
    plan.runs = even_runs(shape, key.backward);
    return plan;
  }
  plan.runs = ragged_runs(shape, key.backward);
  std::vector<int32_t> numbers;
  for (Run& run : plan.runs) {
    run.numbers = static_cast<int64_t>(numbers.size());
    // The segments that fill up the batch have no tokens and lie at the end.
    const auto start = [&](int64_t i) { return shape.start[run.first + std::min(i, run.count)]; };
    for (int64_t i = 0; i < run.batch; ++i) {
      numbers.push_back(start(i));
    }
    for (int64_t i = 0; i < run.batch; ++i) {
      numbers.push_back(start(i + 1) - start(i));
    }
    const RowSizes& rows = key.rows;
    for (const int64_t row : {rows.q, rows.k, rows.v, rows.y, rows.dq, rows.dk, rows.dv}) {
      for (int64_t i = 0; i <= run.batch; ++i) {
        numbers.push_back(static_cast<int32_t>(start(i) * row));
      }
    }
  }
  plan.memory =
      DeviceArray(numbers.data(), static_cast<int64_t>(numbers.size() * sizeof(int32_t)), on);
  return plan;
}

bool suits(const Attention<bf16>& a) {
  const AttentionShape& s = a.shape;
  if (s.table != nullptr || s.segments == 0 || bends_softmax(a)) {
    return false;
  }
  int64_t longest = 0;
  for (int64_t i = 0; i < s.segments; ++i) {
    longest = std::max(longest, s.length(i));
  }
  // Its bands have no sinks.
  if (longest < kFewestTokens || !dims_suit(s) || s.uses_sinks(longest - 1)) {
    return false;
  }
  // Offsets are 32 bits wide.
  const int64_t widest =
      std::max({a.q.rows.outer_stride, a.k.rows.outer_stride, a.v.rows.outer_stride,
                a.y.rows.outer_stride, s.heads * s.head_dim});
  return s.start[s.segments] * widest < int64_t{1} << 31 && heads_together(a.q) &&
         heads_together(a.k) && heads_together(a.v) && aligned(a.q, 16) && aligned(a.k, 16) &&
         aligned(a.v, 16) && aligned(a.y, 16);
}

RowSizes row_sizes(const Attention<bf16>& a) {
  const AttentionShape& s = a.shape;
  return {a.q.rows.outer_stride,   a.k.rows.outer_stride, a.v.rows.outer_stride,
          a.y.rows.outer_stride,   s.heads * s.head_dim,  s.kv_heads * s.head_dim,
          s.kv_heads * s.value_dim};
}

std::shared_ptr<const RunPlan> runs_of(const Attention<bf16>& a, bool backward, const Launch& on) {
  const RunPlan::Key key = {backward, a.shape.heads, row_sizes(a)};
  return plan_for<RunPlan>(a.shape.plans, key, [&] { return make_runs(a.shape, key, on); });
}

/// The plan of the library for a run over kv_heads key-value heads.
SdpaShape shape_of(const Attention<bf16>& a, const RunPlan& plan, const Run& run,
                   int64_t kv_heads) {
  const RowSizes& rows = plan.key.rows;
  const AttentionShape& s = a.shape;
  SdpaShape shape{.backward = plan.key.backward,
                  .ragged = plan.ragged,
                  .continues = false,
                  .stats = true,
                  .batch = run.batch,
                  .length = run.length,
                  .key_length = run.length,
                  .heads = kv_heads * s.group(),
                  .kv_heads = kv_heads,
                  .head_dim = s.head_dim,
                  .value_dim = s.value_dim,
                  .q_row = rows.q,
                  .k_row = rows.k,
                  .v_row = rows.v,
                  .y_row = rows.y,
                  .dq_row = 0,
                  .dk_row = 0,
                  .dv_row = 0,
                  .scale = s.scale,
                  .window = s.window < run.length ? s.window : 0};
  if (shape.backward) {
    shape.dq_row = rows.dq;
    shape.dk_row = rows.dk;
    shape.dv_row = rows.dv;
  }
  return shape;
}

/// The tensors of a run from key-value head `kv_head` on. `t` has them from the first token and
/// head on, and the statistics of the run.
SdpaTensors tensors_of(const Attention<bf16>& a, const RunPlan& plan, const Run& run,
                       int64_t kv_head, SdpaTensors t) {
  const AttentionShape& s = a.shape;
  const RowSizes& rows = plan.key.rows;
  const int64_t head = kv_head * s.group();
  const int64_t token = plan.ragged ? 0 : s.start[run.first];
  t.q += token * rows.q + head * s.head_dim;
  t.k += token * rows.k + kv_head * s.head_dim;
  t.v += token * rows.v + kv_head * s.value_dim;
  t.y += token * rows.y + head * s.value_dim;
  t.stats += head * run.length;
  if (plan.key.backward) {
    t.dy += token * rows.y + head * s.value_dim;
    t.dq += token * rows.dq + head * s.head_dim;
    t.dk += token * rows.dk + kv_head * s.head_dim;
    t.dv += token * rows.dv + kv_head * s.value_dim;
  }
  if (plan.ragged) {
    const int32_t* numbers = plan.memory.as<int32_t>() + run.numbers;
    t.lengths = numbers + run.batch;
    t.key_lengths = t.lengths;
    const SdpaOffsets offsets = numbers + 2 * run.batch;
    const int64_t each = run.batch + 1;
    t.q_at = offsets;
    t.k_at = offsets + each;
    t.v_at = offsets + 2 * each;
    t.y_at = offsets + 3 * each;
    t.dq_at = offsets + 4 * each;
    t.dk_at = offsets + 5 * each;
    t.dv_at = offsets + 6 * each;
  }
  return t;
}

/// Where the tokens of a run's statistics (batch, H, length) are.
struct RunTokens {
  const int32_t* start;    // (batch), null: `length` tokens each from `first` on
  const int32_t* lengths;  // (batch)
  int64_t first;
  int64_t length;
  int64_t heads;
  int64_t count;  // batch * heads * length

  /// The place of number i in (T, H), or -1 where the segment has ended.
  __device__ int64_t kept_at(int64_t i) const {
    const int64_t position = i % length;
    const int64_t head = i / length % heads;
    const int64_t segment = i / length / heads;
    if (start == nullptr) {
      return (first + segment * length + position) * heads + head;
    }
    return position < lengths[segment] ? (start[segment] + position) * heads + head : -1;
  }
};

RunTokens run_tokens(const Attention<bf16>& a, const RunPlan& plan, const Run& run) {
  const int32_t* numbers = plan.ragged ? plan.memory.as<int32_t>() + run.numbers : nullptr;
  return {numbers,
          plan.ragged ? numbers + run.batch : nullptr,
          a.shape.start[run.first],
          run.length,
          a.shape.heads,
          run.batch * a.shape.heads * run.length};
}

/// What our kernels keep from the library's statistics, log(sum of exp(score)): with that as the
/// largest score the sum is 1.
__global__ void __launch_bounds__(kThreads)
    keep_kernel(const RunTokens tokens, const float* stats, float* largest, float* inverse_sum) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t at = i < tokens.count ? tokens.kept_at(i) : -1;
  if (at >= 0) {
    largest[at] = stats[i] * kLog2E;
    inverse_sum[at] = 1.0F;
  }
}

/// The other way round.
__global__ void __launch_bounds__(kThreads)
    stats_kernel(const RunTokens tokens, const float* largest, const float* inverse_sum,
                 float* stats) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < tokens.count) {
    const int64_t at = tokens.kept_at(i);
    stats[i] = at < 0 ? 0.0F : (largest[at] - log2f(inverse_sum[at])) * kLn2;
  }
}

dim3 blocks_for(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div(count, kThreads)));
}

/// Adds rows (T, heads, dim) that lie together to a gradient, 8 elements a thread.
__global__ void __launch_bounds__(kThreads)
    add_kernel(const bf16* from, const View<bf16> to, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) {
    return;
  }
  const int64_t chunks = to.channels / 8;
  bf16* at = to.grad_row(i / chunks) + i % chunks * 8;
  float sum[8];
  float x[8];
  load_n<8>(at, sum);
  load_n<8>(from + i * 8, x);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    sum[e] += x[e];
  }
  store_n<8>(at, sum);
}

/// Where the library writes a gradient, which it does not add to: its place, if it is to be set.
bf16* gradient_of(const View<bf16>& x, bool set, const Launch& on) {
  return set ? x.grad : scratch<bf16>(on, x.count() * x.channels);
}

void add_gradient(const bf16* from, const View<bf16>& to, const Launch& on) {
  if (to.grad == nullptr || to.grad == from) {
    return;
  }
  const int64_t count = to.count() * (to.channels / 8);
  launch(on, "attention backward", add_kernel, blocks_for(count), dim3(kThreads), 0, from, to,
         count);
}

/// Key-value heads of a run that go together in the backward pass: all, or a divisor of them.
int64_t heads_together_in(const Run& run, const AttentionShape& s) {
  int64_t kv_heads = s.kv_heads;
  while (run.batch == 1 && kv_heads > 1 &&
         (s.kv_heads % kv_heads != 0 ||
          run_bytes(true, kv_heads * s.group(), 1, run.length) > kGradWorkspace)) {
    --kv_heads;
  }
  return kv_heads;
}

/// What serves the runs of a call, and the memory they work in one after the other.
struct Served {
  std::vector<std::shared_ptr<const SdpaPlan>> plans;  // empty where one of them is refused
  void* workspace = nullptr;
  float* stats = nullptr;
};

Served serve(const Attention<bf16>& a, const RunPlan& plan, const Launch& on) {
  Served served;
  int64_t workspace = 0;
  int64_t stats = 0;
  for (const Run& run : plan.runs) {
    const int64_t kv_heads = plan.key.backward ? heads_together_in(run, a.shape) : a.shape.kv_heads;
    const int64_t heads = kv_heads * a.shape.group();
    if (plan.key.backward && run_bytes(true, heads, run.batch, run.length) > kMostGradWorkspace) {
      return {};
    }
    auto found = sdpa_plan(shape_of(a, plan, run, kv_heads));
    if (found == nullptr) {
      return {};
    }
    workspace = std::max(workspace, sdpa_workspace(*found));
    stats = std::max(stats, run_tokens(a, plan, run).count);
    served.plans.push_back(std::move(found));
  }
  served.stats = scratch<float>(on, stats);
  served.workspace = scratch<char>(on, workspace);
  return served;
}

}  // namespace

bool forward_by_cudnn(const Attention<bf16>& a, const Launch& on) {
  if (!suits(a)) {
    return false;
  }
  const auto plan = runs_of(a, false, on);
  const Served served = serve(a, *plan, on);
  const SdpaTensors all = {
      .q = a.q.data, .k = a.k.data, .v = a.v.data, .y = a.y.data, .stats = served.stats};
  for (size_t i = 0; i < served.plans.size(); ++i) {
    const Run& run = plan->runs[i];
    sdpa_run(*served.plans[i], tensors_of(a, *plan, run, 0, all), served.workspace, on);
    if (a.largest != nullptr) {
      const RunTokens tokens = run_tokens(a, *plan, run);
      launch(on, "attention", keep_kernel, blocks_for(tokens.count), dim3(kThreads), 0, tokens,
             static_cast<const float*>(served.stats), a.largest, a.inverse_sum);
    }
  }
  return !served.plans.empty();
}

bool backward_by_cudnn(const Attention<bf16>& a, const Launch& on) {
  if (!suits(a)) {
    return false;
  }
  const auto plan = runs_of(a, true, on);
  const Served served = serve(a, *plan, on);
  if (served.plans.empty()) {
    return false;
  }
  const AttentionShape& s = a.shape;
  const SdpaTensors all = {.q = a.q.data,
                           .k = a.k.data,
                           .v = a.v.data,
                           .y = a.y.data,
                           .stats = served.stats,
                           .dy = a.y.grad,
                           .dq = gradient_of(a.q, a.set_q, on),
                           .dk = gradient_of(a.k, a.set_k, on),
                           .dv = gradient_of(a.v, a.set_v, on)};
  for (size_t i = 0; i < served.plans.size(); ++i) {
    const Run& run = plan->runs[i];
    const RunTokens tokens = run_tokens(a, *plan, run);
    launch(on, "attention backward", stats_kernel, blocks_for(tokens.count), dim3(kThreads), 0,
           tokens, static_cast<const float*>(a.largest), static_cast<const float*>(a.inverse_sum),
           served.stats);
    const int64_t step = heads_together_in(run, s);
    for (int64_t kv_head = 0; kv_head < s.kv_heads; kv_head += step) {
      sdpa_run(*served.plans[i], tensors_of(a, *plan, run, kv_head, all), served.workspace, on);
    }
  }
  // One after the other, after those that were set: q, k and v may be the same memory.
  add_gradient(all.dq, a.q, on);
  add_gradient(all.dk, a.k, on);
  add_gradient(all.dv, a.v, on);
  return true;
}

}  // namespace cambium::cuda::attention
