// Attention of cuda_bench: whole sequences by cuDNN and by our own kernels, pages, decode.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda_machine.h"
#include "cuda_sections.h"
#include "ops/attention/attention.h"
#if CAMBIUM_CUDA
#include "ops/attention/attention_cudnn.h"
#include "ops/attention/attention_wgmma.h"
#endif

namespace cambium {
namespace {

constexpr int64_t kMostMemory = 40'000'000'000;  // bytes of a cache of keys and values
constexpr int64_t kHeads = 32, kKvHeads = 8, kHeadDim = 128;

/// Heads of queries, of keys and values, and their numbers.
struct Heads {
  int64_t q, kv, dim;

  std::string describe() const { return fmt::format("heads {}/{} of {}", q, kv, dim); }
  AttentionConfig config() const {
    return {.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)))};
  }
};
constexpr Heads kWide{kHeads, kKvHeads, kHeadDim};
constexpr Heads kNarrow{14, 2, 64};  // of a model of 0.5B
constexpr Heads kSmall{32, 8, 64};   // of a model of 1B

// Who computes attention over whole sequences and pieces of prompts: cuDNN where it can, or our own
// kernels alone.
#if CAMBIUM_CUDA
using cuda::attention::allow_cudnn;
using cuda::attention::allow_warpgroups;
using cuda::attention::cudnn_calls;
using cuda::attention::cudnn_status;
#else
void allow_cudnn(bool) {}
void allow_warpgroups(bool) {}
int64_t cudnn_calls() {
  return 0;
}
std::string cudnn_status() {
  return "no cuDNN: this build has no CUDA";
}
#endif

double attention_flops(const Heads& heads, double tokens) {
  return 2.0 * static_cast<double>(heads.q * heads.dim) * tokens * (tokens + 1);
}
double attention_flops(const Heads& heads, const std::vector<int32_t>& lengths) {
  double sum = 0.0;
  for (const int32_t n : lengths) {
    sum += attention_flops(heads, static_cast<double>(n));
  }
  return sum;
}

Packed& packed_lengths(Scene& s, const std::vector<int32_t>& lengths) {
  Packed& p = s.segments.emplace_back();
  for (const int32_t n : lengths) {
    p.start.push_back(p.start.back() + n);
    p.position.push_back(0);
  }
  return p;
}

/// A row by cuDNN, which says where it was not, and one by our own kernels.
template <class Make>
void attention_rows(Bench& bench, const char* name, const std::string& shape, const Make& make) {
  for (const bool cudnn : {true, false}) {
    allow_cudnn(cudnn);
    allow_warpgroups(!cudnn);
    const int64_t before = cudnn_calls();
    bench.row(fmt::format("attention {}, {}", name, cudnn ? "cuDNN" : "own"), shape, make);
    if (cudnn && cudnn_calls() == before) {
      std::printf("  (served by our own kernels: %s)\n", cudnn_status().c_str());
    }
  }
  allow_cudnn(true);
  allow_warpgroups(true);
}

std::string shape_of(const Heads& heads, const std::vector<int32_t>& lengths) {
  const bool even =
      std::all_of(lengths.begin(), lengths.end(), [&](int32_t n) { return n == lengths[0]; });
  return even && lengths.size() > 1
             ? fmt::format("{} x {} tokens, {}", lengths.size(), lengths[0], heads.describe())
             : fmt::format("{} tokens, {}", fmt::join(lengths, " + "), heads.describe());
}

void attention_of_sequences(Bench& bench, const Heads& heads, const std::vector<int32_t>& lengths) {
  attention_rows(bench, "forward", shape_of(heads, lengths), [&](Scene& s) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const Tensor q = s.bf16({2 * tokens, heads.q, heads.dim});
    const Tensor k = s.bf16({2 * tokens, heads.kv, heads.dim});
    const Tensor v = s.bf16({2 * tokens, heads.kv, heads.dim});
    Packed& packed = packed_lengths(s, lengths);
    return Work{
        .flops = attention_flops(heads, lengths), .sets = 2, .call = [=, &s, &packed](int64_t set) {
          attention(s.ctx, part_of(q, set, tokens), part_of(k, set, tokens),
                    part_of(v, set, tokens), packed.view(), heads.config());
        }};
  });
}

// The backward pass alone, counted as five products for the two of the forward pass. Our own
// kernels are those by products of warpgroups where they serve, which take seven.
void attention_backward_of_sequences(Bench& bench, const Heads& heads,
                                     const std::vector<int32_t>& lengths) {
  attention_rows(bench, "backward", shape_of(heads, lengths), [&](Scene& s) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const Leaf q = s.leaf(s.bf16({tokens, heads.q, heads.dim}));
    const Leaf k = s.leaf(s.bf16({tokens, heads.kv, heads.dim}));
    const Leaf v = s.leaf(s.bf16({tokens, heads.kv, heads.dim}));
    Packed& packed = packed_lengths(s, lengths);
    Work work{.flops = 2.5 * attention_flops(heads, lengths),
              .call = [&s](int64_t) { s.tape.backward(s.recorded); }};
    work.prepare = [=, &s, &packed](int64_t) {
      s.set_gradient(
          attention(s.recorded, s.fresh(q), s.fresh(k), s.fresh(v), packed.view(), heads.config()));
    };
    return work;
  });
}

// cuDNN's other algorithm, whose sums have no fixed order: what that order costs.
#if CAMBIUM_CUDA
void attention_backward_any_order(Bench& bench, const Heads& heads, int64_t count, int64_t length) {
  using namespace cuda::attention;  // NOLINT(google-build-using-namespace)
  if (cudnn_status().rfind("cuDNN", 0) != 0) {
    return;
  }
  const std::vector<int32_t> lengths(static_cast<size_t>(count), static_cast<int32_t>(length));
  bench.row("attention backward, any order", shape_of(heads, lengths), [&](Scene& s) {
    const int64_t tokens = count * length;
    const int64_t row = heads.q * heads.dim;
    const int64_t kv_row = heads.kv * heads.dim;
    SdpaShape shape{.backward = false,
                    .ragged = false,
                    .continues = false,
                    .stats = true,
                    .batch = count,
                    .length = length,
                    .key_length = length,
                    .heads = heads.q,
                    .kv_heads = heads.kv,
                    .head_dim = heads.dim,
                    .value_dim = heads.dim,
                    .q_row = row,
                    .k_row = kv_row,
                    .v_row = kv_row,
                    .y_row = row,
                    .dq_row = 0,
                    .dk_row = 0,
                    .dv_row = 0,
                    .scale = heads.config().scale,
                    .window = 0};
    const auto of_queries = [&] { return s.bf16({tokens, row}).ptr<bf16>(); };
    const auto of_keys = [&] { return s.bf16({tokens, kv_row}).ptr<bf16>(); };
    const SdpaTensors tensors{.q = of_queries(),
                              .k = of_keys(),
                              .v = of_keys(),
                              .y = of_queries(),
                              .stats = s.f32({tokens, heads.q}).ptr<float>(),
                              .dy = of_queries(),
                              .dq = of_queries(),
                              .dk = of_keys(),
                              .dv = of_keys()};
    const Launch on{compute_stream(kDevice), &s.results};
    const auto plan_of = [&] {
      auto plan = sdpa_plan(shape);
      expect(plan != nullptr, "{}", cudnn_status());
      return plan;
    };
    const auto forward = plan_of();
    sdpa_run(*forward, tensors, s.inputs.allocate(sdpa_workspace(*forward)), on);
    shape.backward = shape.any_order = true;
    shape.dq_row = row;
    shape.dk_row = shape.dv_row = kv_row;
    const auto plan = plan_of();
    void* workspace = s.inputs.allocate(sdpa_workspace(*plan));
    return Work{.flops = 2.5 * attention_flops(heads, lengths),
                .call = [=](int64_t) { sdpa_run(*plan, tensors, workspace, on); }};
  });
}
#else
void attention_backward_any_order(Bench&, const Heads&, int64_t, int64_t) {}
#endif

/// Keys and values of `sets` times `sequences` in pages that lie in no order; in f8 of any codes.
struct Cache {
  Tensor keys, values, key_scales, value_scales;
  std::vector<int32_t> table;  // (sets, sequences, per_sequence)
  int64_t per_sequence;

  Cache(Scene& s, const Heads& heads, int64_t sets, int64_t sequences, int64_t context,
        int64_t page, Dtype stored)
      : per_sequence((context + page - 1) / page) {
    const int64_t pages = sets * sequences * per_sequence;
    const auto rows = [&] {
      if (stored == Dtype::kBF16) {
        return s.bf16({pages, page, heads.kv, heads.dim});
      }
      const Tensor t = s.bf16({pages, page, heads.kv, heads.dim / 2});
      const int64_t shape[] = {pages, page, heads.kv, heads.dim};
      return Tensor::of(stored, t.device, shape, t.data);
    };
    keys = rows();
    values = rows();
    if (stored == Dtype::kF8E4M3) {
      key_scales = s.bf16({pages, page, heads.kv}, 0.002, 0.003);
      value_scales = s.bf16({pages, page, heads.kv}, 0.002, 0.003);
    }
    table.resize(static_cast<size_t>(pages));
    std::iota(table.begin(), table.end(), 0);
    Rng(1, 0).shuffle(std::span(table));
  }
  KvPages of(int64_t set, int64_t sequences) const {
    const auto entries = static_cast<size_t>(sequences * per_sequence);
    return {keys,
            values,
            std::span(table).subspan(static_cast<size_t>(set) * entries, entries),
            per_sequence,
            key_scales,
            value_scales};
  }
  /// "pages of 16", "pages of 16 in f8".
  static std::string describe(int64_t page, Dtype stored) {
    return fmt::format("pages of {}{}", page, stored == Dtype::kF8E4M3 ? " in f8" : "");
  }
  /// Of the keys and values of a token.
  static double token_bytes(const Heads& heads, Dtype stored) {
    const int64_t row = heads.dim * dtype_size(stored) + (stored == Dtype::kF8E4M3 ? 2 : 0);
    return static_cast<double>(2 * heads.kv * row);
  }
};

/// `count` pieces of `tokens` each, whose sequences have `behind` tokens before them.
void attention_prefill(Bench& bench, int64_t count, int64_t tokens, int64_t behind, int64_t page,
                       Dtype stored) {
  const auto n = static_cast<double>(tokens);
  const std::string shape = fmt::format("{} x {} at {}, heads 32/8 of 128, {}", count, tokens,
                                        behind, Cache::describe(page, stored));
  attention_rows(bench, "prefill, paged", shape, [&](Scene& s) {
    const Tensor q = s.bf16({2 * count * tokens, kHeads, kHeadDim});
    const Tensor k = s.bf16({2 * count * tokens, kKvHeads, kHeadDim});
    const auto cache = std::make_shared<Cache>(s, kWide, 2, count, behind + tokens, page, stored);
    Packed* packed[] = {&s.packed(count, tokens, behind), &s.packed(count, tokens, behind)};
    return Work{.flops = static_cast<double>(count) *
                         (attention_flops(kWide, n) +
                          4.0 * kHeads * kHeadDim * n * static_cast<double>(behind)),
                .sets = 2,
                .call = [=, &s](int64_t set) {
                  const Tensor kv = part_of(k, set, count * tokens);
                  const KvPages pages = cache->of(set, count);
                  attention(s.ctx, part_of(q, set, count * tokens), kv, kv, packed[set]->view(),
                            kWide.config(), &pages);
                }};
  });
}

void attention_decode(Bench& bench, const Heads& heads, int64_t batch, int64_t context,
                      int64_t page, Dtype stored) {
  const double bytes = static_cast<double>(batch) *
                       (static_cast<double>(context) * Cache::token_bytes(heads, stored) +
                        4.0 * static_cast<double>(heads.dim * heads.q));
  if (bytes > static_cast<double>(kMostMemory)) {
    return;
  }
  const std::string shape = fmt::format("batch {} at {}, {}, {}", batch, context, heads.describe(),
                                        Cache::describe(page, stored));
  bench.row("attention decode", shape, [&](Scene& s) {
    const int64_t sets = bytes > 2 * kBeyondCaches ? 1 : sets_for(bytes);
    const Tensor q = s.bf16({sets * batch, heads.q, heads.dim});
    const Tensor k = s.bf16({sets * batch, heads.kv, heads.dim});
    const Tensor v = s.bf16({sets * batch, heads.kv, heads.dim});
    const auto cache = std::make_shared<Cache>(s, heads, sets, batch, context, page, stored);
    for (int64_t set = 0; set < sets; ++set) {
      s.packed(batch, 1, context - 1);
    }
    const AttentionConfig config = heads.config();
    return Work{.bytes = bytes, .sets = sets, .call = [=, &s](int64_t set) {
                  const KvPages pages = cache->of(set, batch);
                  attention(s.ctx, part_of(q, set, batch), part_of(k, set, batch),
                            part_of(v, set, batch), s.segments[static_cast<size_t>(set)].view(),
                            config, &pages);
                }};
  });
}

}  // namespace

void attention_section(Bench& bench) {
  std::printf("attention: %s\n", cudnn_status().c_str());
  for (const std::vector<int32_t>& lengths : std::vector<std::vector<int32_t>>{
           {2048}, {8192}, {16384}, {2048, 2048, 2048, 2048}, {5000, 2000, 1000, 192}}) {
    attention_of_sequences(bench, kWide, lengths);
    attention_backward_of_sequences(bench, kWide, lengths);
  }
  // Training steps.
  struct Step {
    Heads heads;
    int32_t count, length;
  };
  for (const auto& [heads, count, length] : {Step{kSmall, 1, 4096}, Step{kSmall, 8, 4096},
                                             Step{kSmall, 1, 32768}, Step{kWide, 1, 8192}}) {
    const std::vector<int32_t> lengths(static_cast<size_t>(count), length);
    if (heads.dim == kSmall.dim) {
      attention_of_sequences(bench, heads, lengths);
      attention_backward_of_sequences(bench, heads, lengths);
    }
    attention_backward_any_order(bench, heads, count, length);
  }
  for (const auto& [page, stored] :
       {std::pair{16, Dtype::kBF16}, std::pair{64, Dtype::kBF16}, std::pair{16, Dtype::kF8E4M3}}) {
    attention_prefill(bench, 8, 4096, 0, page, stored);
    attention_prefill(bench, 4, 2048, 14336, page, stored);
    attention_prefill(bench, 1, 2048, 14336, page, stored);
    attention_prefill(bench, 1, 256, 14336, page, stored);
    attention_prefill(bench, 16, 256, 0, page, stored);
    attention_prefill(bench, 16, 512, 2048, page, stored);
    for (const int64_t batch : {1, 8, 43, 64}) {
      for (const int64_t context : {1024, 5120, 16384, 131072}) {
        if (!bench.quick || context <= 16384) {
          attention_decode(bench, kWide, batch, context, page, stored);
        }
      }
    }
  }
}

// Two heads of keys: long sequences take many pages and few bytes, and the host's part shows.
void narrow_section(Bench& bench) {
  for (const int64_t page : {16, 128}) {
    for (const auto& [batch, context] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1024}, {1, 8192}, {1, 32704}, {32, 32704}, {188, 32704}}) {
      attention_decode(bench, kNarrow, batch, context, page, Dtype::kBF16);
    }
  }
}

}  // namespace cambium
