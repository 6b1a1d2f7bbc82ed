// Pieces of prompts over pages by cuDNN. It reads keys and values that lie together: those of
// pieces that begin their sequences are the call's own, those of others, with the tokens before
// them, are gathered from the pages. That moves each once and is soon paid: a query head reads
// every key for each of its tokens. Segments of few tokens (decode, ends of prompts) and those
// whose tokens see keys as sinks are left to our own kernels. Which segment goes where depends on
// the segment alone.
//
// A call's pieces go in runs, each one call of the library, that gather no more than a limit at a
// time; of a sequence beyond it the key-value heads go in groups. Plans take long to make, so their
// sizes are few: the number of segments, the most queries and the most keys are rounded up.
// Blocks for queries that are not there end at once.
#include <algorithm>
#include <atomic>
#include <vector>

#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cudnn.h"

namespace cambium::cuda::attention {
namespace {

// Gathered at a time: so many tokens, within these bytes. A call that gathers takes all of it, so
// that what a step takes does not depend on how far its sequences are.
constexpr int64_t kGatheredTokens = 32768;
constexpr int64_t kLeastGathered = int64_t{64} << 20;
constexpr int64_t kMostGathered = int64_t{256} << 20;
constexpr int64_t kMostBatch = 32;
/// Gathered segments begin at multiples of this, with zeros between: the library reads whole tiles
/// of keys, and nothing of one sequence is to reach another, be it only NaN times a probability of
/// 0.
constexpr int64_t kRowPad = 128;

std::atomic<int64_t> limit_for_tests = 0;

int64_t rounded_rows(int64_t keys) {
  return ceil_div(keys, kRowPad) * kRowPad;
}
/// 512, 2,048, 4,096, 8,192, ..
int64_t rounded_queries(int64_t n) {
  int64_t length = n <= 512 ? 512 : 2048;
  while (length < n) {
    length *= 2;
  }
  return length;
}
/// 4,096, 16,384, ..
int64_t rounded_keys(int64_t n) {
  int64_t length = 4096;
  while (length < n) {
    length *= 4;
  }
  return length;
}
int64_t rounded_batch(int64_t n) {
  int64_t batch = 1;
  while (batch < n) {
    batch *= 2;
  }
  return batch;
}

/// Of a key and a value of one head.
int64_t head_bytes(const AttentionShape& shape) {
  return (shape.head_dim + shape.value_dim) * int64_t{sizeof(bf16)};
}
int64_t most_gathered(const AttentionShape& shape) {
  const int64_t limit = limit_for_tests;
  return limit > 0 ? limit
                   : std::clamp(kGatheredTokens * shape.kv_heads * head_bytes(shape),
                                kLeastGathered, kMostGathered);
}

/// What a segment's queries see: keys from position `first` on.
struct Keys {
  int64_t first, count;
};
Keys keys_of(const AttentionShape& shape, int64_t s) {
  const int64_t position = shape.first_position(s);
  const int64_t first = shape.reach(position);
  return {first, position + shape.length(s) - first};
}

/// Segments and key-value heads of one call of the library.
struct Run {
  bool gathers;
  int64_t first_head, kv_heads;
  SdpaShape shape;
  int64_t numbers;  // where its lengths and offsets begin in the plan's memory
  int64_t tiles;    // and its GatherTiles
  int64_t tile_count;
};

/// Rows of the tensors that a call comes with, in elements from token to token.
struct RowSizes {
  int64_t q, k, v, y;
  bool operator==(const RowSizes&) const = default;
};

/// The runs of a call. On the device, for each: tokens (batch) and keys (batch) of its segments,
/// offsets of q, k, v and y (batch + 1) each; its tiles.
struct PrefillPlan {
  struct Key {
    int64_t heads, kv_heads, head_dim, value_dim, window, sinks;
    float scale;
    RowSizes rows;
    int64_t gathered;  // at most
    bool keys_given;   // those of the call's own tokens
    bool operator==(const Key&) const = default;
  };
  Key key;
  std::vector<Run> runs;
  bool gathers = false;
  DeviceArray memory;
};

/// Collects the runs of a plan and what they have on the device.
class Planner {
 public:
  Planner(const AttentionShape& shape, const PrefillPlan::Key& key) : s_(shape), key_(key) {}

  PrefillPlan plan(const Launch& on) {
    std::vector<int64_t> given;
    std::vector<int64_t> gathered;
    int64_t bytes = 0;
    for (int64_t s = 0; s < s_.segments; ++s) {
      if (!is_long_piece(s_, s, key_.gathered)) {
        continue;
      }
      if (key_.keys_given && s_.first_position(s) == 0) {
        add_until_full(given, s, false);
        continue;
      }
      const int64_t more = rounded_rows(keys_of(s_, s).count) * s_.kv_heads * head_bytes(s_);
      if (bytes + more > key_.gathered) {
        add_runs(gathered, true);
        bytes = 0;
      }
      bytes += more;
      add_until_full(gathered, s, true);
      bytes = gathered.empty() ? 0 : bytes;
    }
    add_runs(given, false);
    add_runs(gathered, true);
    PrefillPlan plan{key_, std::move(runs_), gathers_, {}};
    plan.memory =
        DeviceArray(words_.data(), static_cast<int64_t>(words_.size() * sizeof(int32_t)), on);
    return plan;
  }

 private:
  void add_until_full(std::vector<int64_t>& segments, int64_t s, bool gathers) {
    segments.push_back(s);
    if (static_cast<int64_t>(segments.size()) == kMostBatch) {
      add_runs(segments, gathers);
    }
  }

  /// The run of the segments, or one for each group of heads where they exceed the limit together.
  void add_runs(std::vector<int64_t>& segments, bool gathers) {
    if (segments.empty()) {
      return;
    }
    int64_t rows = 0;
    for (const int64_t s : segments) {
      rows += rounded_rows(keys_of(s_, s).count);
    }
    int64_t heads = s_.kv_heads;
    while (gathers && heads > 1 &&
           (s_.kv_heads % heads != 0 || rows * heads * head_bytes(s_) > key_.gathered)) {
      --heads;
    }
    const Run run = make_run(segments, gathers, heads);
    for (int64_t head = 0; head < s_.kv_heads; head += heads) {
      runs_.push_back(run);
      runs_.back().first_head = head;
    }
    segments.clear();
  }

  Run make_run(const std::vector<int64_t>& segments, bool gathers, int64_t heads) {
    const int64_t batch = rounded_batch(static_cast<int64_t>(segments.size()));
    const auto tiles = static_cast<int64_t>(words_.size());
    int64_t tile_count = 0;
    std::vector<int32_t> tokens, keys, first_token, first_key;
    int64_t most_tokens = 0;
    int64_t most_keys = 0;
    int64_t rows = 0;  // gathered
    for (const int64_t s : segments) {
      const Keys seen = keys_of(s_, s);
      most_tokens = std::max(most_tokens, s_.length(s));
      most_keys = std::max(most_keys, seen.count);
      tokens.push_back(narrow(s_.length(s)));
      keys.push_back(narrow(seen.count));
      first_token.push_back(s_.start[s]);
      first_key.push_back(gathers ? narrow(rows) : s_.start[s]);
      if (gathers) {
        tile_count += add_tiles(s, seen, rows);
        rows += rounded_rows(seen.count);
      }
    }
    // The segments that fill up the batch have no tokens and lie at the end.
    const int32_t end = first_token.back() + tokens.back();
    const int32_t key_end = gathers ? narrow(rows) : end;
    tokens.resize(static_cast<size_t>(batch));
    keys.resize(static_cast<size_t>(batch));
    first_token.resize(static_cast<size_t>(batch) + 1, end);
    first_key.resize(static_cast<size_t>(batch) + 1, key_end);
    const RowSizes row = {key_.rows.q, gathers ? heads * s_.head_dim : key_.rows.k,
                          gathers ? heads * s_.value_dim : key_.rows.v, key_.rows.y};
    const auto numbers = static_cast<int64_t>(words_.size());
    words_.insert(words_.end(), tokens.begin(), tokens.end());
    words_.insert(words_.end(), keys.begin(), keys.end());
    add_offsets(first_token, row.q);
    add_offsets(first_key, row.k);
    add_offsets(first_key, row.v);
    add_offsets(first_token, row.y);
    gathers_ = gathers_ || gathers;
    const int64_t length = rounded_queries(most_tokens);
    return {gathers,
            0,
            heads,
            {.backward = false,
             .ragged = true,
             .continues = gathers,
             .stats = false,
             .batch = batch,
             .length = length,
             .key_length = gathers ? rounded_keys(most_keys) : length,
             .heads = heads * s_.group(),
             .kv_heads = heads,
             .head_dim = s_.head_dim,
             .value_dim = s_.value_dim,
             .q_row = row.q,
             .k_row = row.k,
             .v_row = row.v,
             .y_row = row.y,
             .dq_row = 0,
             .dk_row = 0,
             .dv_row = 0,
             .scale = s_.scale,
             .window = s_.window < most_keys ? s_.window : 0},
            numbers,
            tiles,
            tile_count};
  }

  /// Tiles of a segment whose keys go to the rows from `to` on; returns how many.
  int64_t add_tiles(int64_t s, const Keys& seen, int64_t to) {
    const int64_t rows = rounded_rows(seen.count);
    for (int64_t at = 0; at < rows; at += kGatherRows) {
      const int64_t keys = std::clamp<int64_t>(seen.count - at, 0, kGatherRows);
      for (const int64_t number :
           {s, seen.first + at, keys, to + at, std::min<int64_t>(kGatherRows, rows - at)}) {
        words_.push_back(narrow(number));
      }
    }
    static_assert(sizeof(GatherTile) == 5 * sizeof(int32_t));
    return ceil_div(rows, kGatherRows);
  }

  void add_offsets(const std::vector<int32_t>& tokens, int64_t row) {
    for (const int32_t token : tokens) {
      words_.push_back(narrow(token * row));
    }
  }

  static int32_t narrow(int64_t n) { return static_cast<int32_t>(n); }

  const AttentionShape& s_;
  const PrefillPlan::Key& key_;
  std::vector<Run> runs_;
  bool gathers_ = false;
  std::vector<int32_t> words_;
};

bool suits(const Attention<bf16>& a, int64_t gathered) {
  const AttentionShape& s = a.shape;
  if (s.table == nullptr || !dims_suit(s) || bends_softmax(a)) {
    return false;
  }
  bool any = false;
  for (int64_t i = 0; i < s.segments && !any; ++i) {
    any = is_long_piece(s, i, gathered);
  }
  if (!any) {
    return false;
  }
  const auto readable = [](const View<bf16>& x) {
    return !x.defined() || (heads_together(x) && aligned(x, 16));
  };
  // Offsets are 32 bits wide.
  const int64_t widest = std::max({a.q.rows.outer_stride, a.new_k.rows.outer_stride,
                                   a.new_v.rows.outer_stride, a.y.rows.outer_stride});
  return s.start[s.segments] * widest < int64_t{1} << 31 && readable(a.q) && readable(a.k) &&
         readable(a.v) && readable(a.new_k) && readable(a.new_v) && readable(a.y) &&
         (!a.scaled_k.defined() || (aligned(a.scaled_k.rows, 16) && aligned(a.scaled_v.rows, 16)));
}

std::shared_ptr<const PrefillPlan> plan_of(const Attention<bf16>& a, int64_t gathered,
                                           const Launch& on) {
  const AttentionShape& s = a.shape;
  const PrefillPlan::Key key = {s.heads,
                                s.kv_heads,
                                s.head_dim,
                                s.value_dim,
                                s.window,
                                s.sinks,
                                s.scale,
                                {a.q.rows.outer_stride, a.new_k.rows.outer_stride,
                                 a.new_v.rows.outer_stride, a.y.rows.outer_stride},
                                gathered,
                                a.new_k.defined()};
  return plan_for<PrefillPlan>(s.plans, key, [&] { return Planner(s, key).plan(on); });
}

/// The tensors of a run. k, v: of all heads of the call, or where the run's were gathered to.
SdpaTensors tensors_of(const Attention<bf16>& a, const PrefillPlan& plan, const Run& run,
                       const bf16* k, const bf16* v) {
  const AttentionShape& s = a.shape;
  const int64_t head = run.first_head * s.group();
  const int64_t batch = run.shape.batch;
  const int32_t* numbers = plan.memory.as<int32_t>() + run.numbers;
  const SdpaOffsets offsets = numbers + 2 * batch;
  return {.q = a.q.data + head * s.head_dim,
          .k = k,
          .v = v,
          .y = a.y.data + head * s.value_dim,
          .stats = nullptr,
          .lengths = numbers,
          .key_lengths = numbers + batch,
          .q_at = offsets,
          .k_at = offsets + (batch + 1),
          .v_at = offsets + 2 * (batch + 1),
          .y_at = offsets + 3 * (batch + 1)};
}

}  // namespace

void limit_gathered(int64_t bytes) {
  limit_for_tests = bytes;
}

bool is_long_piece(const AttentionShape& shape, int64_t s, int64_t most_gathered) {
  return shape.length(s) >= kFewestTokens &&
         !shape.uses_sinks(shape.first_position(s) + shape.length(s) - 1) &&
         rounded_rows(keys_of(shape, s).count) * head_bytes(shape) <= most_gathered;
}

int64_t prefill_by_cudnn(const Attention<bf16>& a, const Launch& on) {
  const int64_t gathered = most_gathered(a.shape);
  if (!suits(a, gathered)) {
    return 0;
  }
  const auto plan = plan_of(a, gathered, on);
  std::vector<std::shared_ptr<const SdpaPlan>> served;
  int64_t workspace = 0;
  for (const Run& run : plan->runs) {
    served.push_back(sdpa_plan(run.shape));
    if (served.back() == nullptr) {
      return 0;
    }
    workspace = std::max(workspace, sdpa_workspace(*served.back()));
  }
  const AttentionShape& s = a.shape;
  bf16* keys = plan->gathers ? static_cast<bf16*>(on.scratch(gathered)) : nullptr;
  void* work = on.scratch(workspace);
  const DeviceLayout device = layout_of(s, on);
  for (size_t i = 0; i < plan->runs.size(); ++i) {
    const Run& run = plan->runs[i];
    const bf16* k = a.new_k.data;
    const bf16* v = a.new_v.data;
    if (run.gathers) {
      const auto* tiles =
          reinterpret_cast<const GatherTile*>(plan->memory.as<int32_t>() + run.tiles);
      bf16* values = keys + run.tile_count * kGatherRows * run.kv_heads * s.head_dim;
      const auto gather_from = [&]<class E>(const View<E>& from_k, const View<E>& from_v) {
        gather<E>({.layout = device.layout,
                   .tiles = {tiles, run.tile_count},
                   .from = {from_k, from_v},
                   .scales = {a.scaled_k.scales, a.scaled_v.scales},
                   .to = {keys, values},
                   .first_head = static_cast<int32_t>(run.first_head),
                   .heads = static_cast<int32_t>(run.kv_heads)},
                  on);
      };
      if (a.scaled_k.defined()) {
        gather_from(a.scaled_k.rows, a.scaled_v.rows);
      } else {
        gather_from(a.k, a.v);
      }
      k = keys;
      v = values;
    }
    sdpa_run(*served[i], tensors_of(a, *plan, run, k, v), work, on);
  }
  return gathered;
}

}  // namespace cambium::cuda::attention
