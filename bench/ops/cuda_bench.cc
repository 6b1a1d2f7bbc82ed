// Speed of the CUDA kernels at the sizes of real models, each next to what the device can do,
// measured in the same run: bytes that must move against a copy within the device, operations
// against a large product. Every figure is the median of several repeats, in GPU time: calls are
// queued behind copies that keep the device busy meanwhile, so that the host's part is not in it
// (it has a column of its own). Calls take turns among inputs that no cache holds together.
// Arguments: names of sections (matmul, attention, recurrence, scan, pointwise, loss), --quick (few
// repeats, no extremes), --json FILE. Without a CUDA device it says so and ends.
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/file.h"
#include "cuda_machine.h"
#include "ops/attention/attention.h"
#if CAMBIUM_CUDA
#include "ops/attention/attention_cudnn.h"
#endif
#include "ops/conv/conv.h"
#include "ops/loss/loss.h"
#include "ops/loss/loss_kernels.h"
#include "ops/loss/loss_ref.h"
#include "ops/matmul/matmul.h"
#include "ops/norm/norm.h"
#include "ops/optimizer/optimizer.h"
#include "ops/pointwise/pointwise.h"
#include "ops/recurrence/recurrence.h"
#include "ops/rope/rope.h"
#include "ops/run.h"
#include "ops/sampling/sampling.h"
#include "ops/sampling/sampling_kernels.h"
#include "ops/sampling/sampling_ref.h"
#include "ops/selective_scan/selective_scan.h"

namespace {

using namespace cambium;

// Products of a model with 15B parameters: what one call of a layer computes from one x.
struct Product {
  const char* name;
  std::vector<int64_t> outputs;
  int64_t inputs;
};

void product(Bench& bench, const Product& p, int64_t tokens) {
  const int64_t outputs = std::accumulate(p.outputs.begin(), p.outputs.end(), int64_t{0});
  const std::string shape = fmt::format("{} x {} x {}", tokens, outputs, p.inputs);
  bench.row(fmt::format("matmul {}", p.name), shape, [&](Scene& s) {
    Work work;
    const double bytes =
        2.0 * static_cast<double>(outputs * p.inputs + tokens * p.inputs + tokens * outputs);
    (tokens <= 64 ? work.bytes : work.flops) =
        tokens <= 64 ? bytes : 2.0 * static_cast<double>(tokens * outputs * p.inputs);
    work.sets = sets_for(bytes);
    const Tensor x = s.bf16({work.sets * tokens, p.inputs});
    std::vector<Affine> weights;
    for (int64_t set = 0; set < work.sets; ++set) {
      for (const int64_t n : p.outputs) {
        weights.push_back({s.bf16({n, p.inputs}, -0.02, 0.02), {}});
      }
    }
    work.call = [=, &s, count = p.outputs.size()](int64_t set) {
      std::array<Tensor, 4> y;
      matmul_each(s.ctx, part_of(x, set, tokens),
                  std::span(weights).subspan(static_cast<size_t>(set) * count, count),
                  std::span(y).first(count));
    };
    return work;
  });
}

void matmul_section(Bench& bench) {
  const std::vector<Product> products = {{"qkv", {4096, 1024, 1024}, 5120},
                                         {"o", {5120}, 4096},
                                         {"gate, up", {14336, 14336}, 5120},
                                         {"down", {5120}, 14336},
                                         {"head", {131072}, 5120}};
  for (const Product& p : products) {
    for (const int64_t tokens : {1, 2, 4, 8, 16, 64}) {
      product(bench, p, tokens);
    }
  }
  for (const Product& p : products) {
    product(bench, p, 4096);
  }
}

constexpr int64_t kMostMemory = 40'000'000'000;  // bytes of a cache of keys and values
constexpr int64_t kHeads = 32, kKvHeads = 8, kHeadDim = 128;
const AttentionConfig kAttention = {.scale = 0.0883883F};

// Who computes attention over whole sequences and pieces of prompts: cuDNN where it can, or our own
// kernels alone.
#if CAMBIUM_CUDA
using cuda::attention::allow_cudnn;
using cuda::attention::cudnn_calls;
using cuda::attention::cudnn_status;
#else
void allow_cudnn(bool) {}
int64_t cudnn_calls() {
  return 0;
}
std::string cudnn_status() {
  return "no cuDNN: this build has no CUDA";
}
#endif

double attention_flops(double tokens) {
  return 4.0 * kHeads * kHeadDim * tokens * (tokens + 1) / 2;
}
double attention_flops(const std::vector<int32_t>& lengths) {
  double sum = 0.0;
  for (const int32_t n : lengths) {
    sum += attention_flops(static_cast<double>(n));
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
    const int64_t before = cudnn_calls();
    bench.row(fmt::format("attention {}, {}", name, cudnn ? "cuDNN" : "own"), shape, make);
    if (cudnn && cudnn_calls() == before) {
      std::printf("  (served by our own kernels: %s)\n", cudnn_status().c_str());
    }
  }
  allow_cudnn(true);
}

std::string shape_of(const std::vector<int32_t>& lengths) {
  return fmt::format("{} tokens, heads {}/{} of {}", fmt::join(lengths, " + "), kHeads, kKvHeads,
                     kHeadDim);
}

void attention_forward(Bench& bench, const std::vector<int32_t>& lengths) {
  attention_rows(bench, "forward", shape_of(lengths), [&](Scene& s) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const Tensor q = s.bf16({2 * tokens, kHeads, kHeadDim});
    const Tensor k = s.bf16({2 * tokens, kKvHeads, kHeadDim});
    const Tensor v = s.bf16({2 * tokens, kKvHeads, kHeadDim});
    Packed& packed = packed_lengths(s, lengths);
    return Work{
        .flops = attention_flops(lengths), .sets = 2, .call = [=, &s, &packed](int64_t set) {
          attention(s.ctx, part_of(q, set, tokens), part_of(k, set, tokens),
                    part_of(v, set, tokens), packed.view(), kAttention);
        }};
  });
}

// The backward pass alone, counted as five products for the two of the forward pass.
void attention_backward(Bench& bench, const std::vector<int32_t>& lengths) {
  attention_rows(bench, "backward", shape_of(lengths), [&](Scene& s) {
    const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const Leaf q = s.leaf(s.bf16({tokens, kHeads, kHeadDim}));
    const Leaf k = s.leaf(s.bf16({tokens, kKvHeads, kHeadDim}));
    const Leaf v = s.leaf(s.bf16({tokens, kKvHeads, kHeadDim}));
    Packed& packed = packed_lengths(s, lengths);
    Work work{.flops = 2.5 * attention_flops(lengths),
              .call = [&s](int64_t) { s.tape.backward(s.recorded); }};
    work.prepare = [=, &s, &packed](int64_t) {
      s.set_gradient(
          attention(s.recorded, s.fresh(q), s.fresh(k), s.fresh(v), packed.view(), kAttention));
    };
    return work;
  });
}

/// Keys and values of `sets` times `sequences` in pages that lie in no order; in f8 of any codes.
struct Cache {
  Tensor keys, values, key_scales, value_scales;
  std::vector<int32_t> table;  // (sets, sequences, per_sequence)
  int64_t per_sequence;

  Cache(Scene& s, int64_t sets, int64_t sequences, int64_t context, int64_t page, Dtype stored)
      : per_sequence((context + page - 1) / page) {
    const int64_t pages = sets * sequences * per_sequence;
    const auto rows = [&] {
      if (stored == Dtype::kBF16) {
        return s.bf16({pages, page, kKvHeads, kHeadDim});
      }
      const Tensor t = s.bf16({pages, page, kKvHeads, kHeadDim / 2});
      const int64_t shape[] = {pages, page, kKvHeads, kHeadDim};
      return Tensor::of(stored, t.device, shape, t.data);
    };
    keys = rows();
    values = rows();
    if (stored == Dtype::kF8E4M3) {
      key_scales = s.bf16({pages, page, kKvHeads}, 0.002, 0.003);
      value_scales = s.bf16({pages, page, kKvHeads}, 0.002, 0.003);
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
  static double token_bytes(Dtype stored) {
    const int64_t row = kHeadDim * dtype_size(stored) + (stored == Dtype::kF8E4M3 ? 2 : 0);
    return static_cast<double>(2 * kKvHeads * row);
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
    const auto cache = std::make_shared<Cache>(s, 2, count, behind + tokens, page, stored);
    Packed* packed[] = {&s.packed(count, tokens, behind), &s.packed(count, tokens, behind)};
    return Work{
        .flops = static_cast<double>(count) *
                 (attention_flops(n) + 4.0 * kHeads * kHeadDim * n * static_cast<double>(behind)),
        .sets = 2,
        .call = [=, &s](int64_t set) {
          const Tensor kv = part_of(k, set, count * tokens);
          const KvPages pages = cache->of(set, count);
          attention(s.ctx, part_of(q, set, count * tokens), kv, kv, packed[set]->view(), kAttention,
                    &pages);
        }};
  });
}

void attention_decode(Bench& bench, int64_t batch, int64_t context, int64_t page, Dtype stored) {
  const double bytes =
      static_cast<double>(batch) * (static_cast<double>(context) * Cache::token_bytes(stored) +
                                    4.0 * kHeadDim * static_cast<double>(kHeads));
  if (bytes > static_cast<double>(kMostMemory)) {
    return;
  }
  const std::string shape = fmt::format("batch {} at {}, heads 32/8 of 128, {}", batch, context,
                                        Cache::describe(page, stored));
  bench.row("attention decode", shape, [&](Scene& s) {
    const int64_t sets = bytes > 2 * kBeyondCaches ? 1 : sets_for(bytes);
    const Tensor q = s.bf16({sets * batch, kHeads, kHeadDim});
    const Tensor k = s.bf16({sets * batch, kKvHeads, kHeadDim});
    const Tensor v = s.bf16({sets * batch, kKvHeads, kHeadDim});
    const auto cache = std::make_shared<Cache>(s, sets, batch, context, page, stored);
    for (int64_t set = 0; set < sets; ++set) {
      s.packed(batch, 1, context - 1);
    }
    return Work{.bytes = bytes, .sets = sets, .call = [=, &s](int64_t set) {
                  const KvPages pages = cache->of(set, batch);
                  attention(s.ctx, part_of(q, set, batch), part_of(k, set, batch),
                            part_of(v, set, batch), s.segments[static_cast<size_t>(set)].view(),
                            kAttention, &pages);
                }};
  });
}

void attention_section(Bench& bench) {
  std::printf("attention: %s\n", cudnn_status().c_str());
  for (const std::vector<int32_t>& lengths : std::vector<std::vector<int32_t>>{
           {2048}, {8192}, {16384}, {2048, 2048, 2048, 2048}, {5000, 2000, 1000, 192}}) {
    attention_forward(bench, lengths);
    attention_backward(bench, lengths);
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
          attention_decode(bench, batch, context, page, stored);
        }
      }
    }
  }
}

struct Mixer {
  const char* name;
  int64_t key_heads, heads, key_dim, dim;
  bool delta, per_channel;

  std::string describe() const {
    return fmt::format("heads {}/{} of {} x {}", key_heads, heads, key_dim, dim);
  }
};

RecurrenceInputs recurrence_inputs(Scene& s, const Mixer& m, int64_t tokens) {
  // Keys of norm 1, as the delta rule wants them.
  const double key = std::sqrt(3.0 / static_cast<double>(m.key_dim));
  RecurrenceInputs in{.q = s.bf16({tokens, m.key_heads, m.key_dim}),
                      .k = s.bf16({tokens, m.key_heads, m.key_dim}, -key, key),
                      .v = s.bf16({tokens, m.heads, m.dim}),
                      .log_decay = m.per_channel ? s.f32({tokens, m.heads, m.key_dim}, -0.2, -1e-3)
                                                 : s.f32({tokens, m.heads}, -0.2, -1e-3),
                      .weight = s.f32({tokens, m.heads}, 0.01, m.delta ? 1.0 : 0.1),
                      .delta = m.delta};
  if (!m.delta) {
    in.skip = s.f32({m.heads});
  }
  return in;
}
double recurrence_bytes(const RecurrenceInputs& in) {
  return bytes_of({in.q, in.k, in.v, in.log_decay, in.weight, in.skip});
}

void recurrence_decode(Bench& bench, const Mixer& m, int64_t batch) {
  const std::string shape = fmt::format("batch {}, {}", batch, m.describe());
  bench.row(fmt::format("{} decode", m.name), shape, [&](Scene& s) {
    const double state_bytes = 4.0 * static_cast<double>(batch * m.heads * m.key_dim * m.dim);
    const int64_t sets = sets_for(2.0 * state_bytes);
    const RecurrenceInputs in = recurrence_inputs(s, m, sets * batch);
    const Tensor state = s.f32({sets * batch, m.heads, m.key_dim, m.dim});
    for (int64_t set = 0; set < sets; ++set) {
      s.packed(batch, 1, 100, set * batch);
    }
    const double others = (recurrence_bytes(in) + bytes_of({in.v})) / static_cast<double>(sets);
    return Work{.bytes = 2.0 * state_bytes + others, .sets = sets, .call = [=, &s](int64_t set) {
                  const auto rows = [&](const Tensor& t) { return part_of(t, set, batch); };
                  recurrence(s.ctx,
                             {.q = rows(in.q),
                              .k = rows(in.k),
                              .v = rows(in.v),
                              .log_decay = rows(in.log_decay),
                              .weight = rows(in.weight),
                              .delta = in.delta,
                              .skip = in.skip},
                             s.segments[static_cast<size_t>(set)].view(), state);
                }};
  });
}

void recurrence_prefill(Bench& bench, const Mixer& m, int64_t tokens) {
  const std::string shape = fmt::format("{} tokens, {}", tokens, m.describe());
  bench.row(fmt::format("{} prefill", m.name), shape, [&](Scene& s) {
    const auto in = std::make_shared<std::vector<RecurrenceInputs>>();
    const double bytes = recurrence_bytes(in->emplace_back(recurrence_inputs(s, m, tokens))) +
                         bytes_of({in->front().v});
    const int64_t sets = sets_for(bytes);
    while (static_cast<int64_t>(in->size()) < sets) {
      in->push_back(recurrence_inputs(s, m, tokens));
    }
    const Tensor state = s.f32({1, m.heads, m.key_dim, m.dim});
    Packed& packed = s.packed(1, tokens, 0, 0);
    return Work{
        .bytes = bytes + bytes_of({state}), .sets = sets, .call = [=, &s, &packed](int64_t set) {
          recurrence(s.ctx, (*in)[static_cast<size_t>(set)], packed.view(), state);
        }};
  });
}

// Bytes of inputs twice, of their gradients, of the result and its gradient.
void recurrence_training(Bench& bench, const Mixer& m, int64_t tokens) {
  const std::string shape = fmt::format("{} tokens, {}", tokens, m.describe());
  bench.row(fmt::format("{} forward + backward", m.name), shape, [&](Scene& s) {
    const RecurrenceInputs in = recurrence_inputs(s, m, tokens);
    const std::array<Leaf, 6> leaves = {s.leaf(in.q),         s.leaf(in.k),      s.leaf(in.v),
                                        s.leaf(in.log_decay), s.leaf(in.weight), s.leaf(in.skip)};
    Packed& packed = s.packed(1, tokens, 0);
    return Work{.bytes = 3.0 * recurrence_bytes(in) + 2.0 * bytes_of({in.v}),
                .call = [=, &s, &packed](int64_t) {
                  s.set_gradient(recurrence(s.recorded,
                                            {.q = s.fresh(leaves[0]),
                                             .k = s.fresh(leaves[1]),
                                             .v = s.fresh(leaves[2]),
                                             .log_decay = s.fresh(leaves[3]),
                                             .weight = s.fresh(leaves[4]),
                                             .delta = in.delta,
                                             .skip = s.fresh(leaves[5])},
                                            packed.view()));
                  s.tape.backward(s.recorded);
                }};
  });
}

void recurrence_section(Bench& bench) {
  const Mixer mamba = {"Mamba-2", 8, 128, 128, 64, false, false};
  for (const Mixer& m : {Mixer{"GDN", 16, 32, 128, 128, true, false},
                         Mixer{"KDA", 32, 32, 128, 128, true, true}, mamba}) {
    for (const int64_t batch : {1, 64, 256, 1024}) {
      recurrence_decode(bench, m, batch);
    }
  }
  recurrence_prefill(bench, {"GDN", 2, 8, 128, 128, true, false}, 8192);
  recurrence_prefill(bench, {"KDA", 16, 16, 128, 128, true, true}, 2048);
  recurrence_prefill(bench, mamba, 8192);
  recurrence_training(bench, {"KDA", 32, 32, 128, 128, true, true}, 8192);
  recurrence_training(bench, {"KDA", 16, 16, 128, 128, true, true}, 32768);
  recurrence_training(bench, {"GDN", 32, 32, 128, 128, true, false}, 8192);
  recurrence_training(bench, mamba, 8192);
}

// The scan of Apriel-H1: 4,096 channels of 16 states, B of 64 groups and C of 256, which lie with z
// in the columns of one projection, (z, x, B, C).
constexpr int64_t kChannels = 4096, kStates = 16, kProjected = 10240;

struct ScanData {
  Tensor projected, u, dt, a_log, d, dt_bias;

  ScanData(Scene& s, int64_t tokens)
      : projected(s.bf16({tokens, kProjected})),
        u(s.bf16({tokens, kChannels})),
        dt(s.bf16({tokens, kChannels})),
        a_log(s.f32({kChannels, kStates}, 0.0, 2.8)),
        d(s.f32({kChannels})),
        dt_bias(s.f32({kChannels}, -6.0, -2.0)) {}

  static SelectiveScanInputs inputs(const Tensor& projected, const Tensor& u, const Tensor& dt,
                                    const Tensor& a_log, const Tensor& d, const Tensor& dt_bias) {
    return {.u = u,
            .dt = dt,
            .b = projected.slice(1, 5120, 1024).split_last(64, kStates),
            .c = projected.slice(1, 6144, kChannels).split_last(256, kStates),
            .z = projected.slice(1, 0, kChannels),
            .a_log = a_log,
            .d = d,
            .dt_bias = dt_bias};
  }
  /// u, dt, z, B and C of so many tokens.
  static double bytes(int64_t tokens) {
    return 2.0 * static_cast<double>(tokens * (4 * kChannels + 1024));
  }
  static double result_bytes(int64_t tokens) {
    return 2.0 * static_cast<double>(tokens * kChannels);
  }
};

void scan_decode(Bench& bench, int64_t batch) {
  bench.row(
      "selective scan decode", fmt::format("batch {}, 4096 channels of 16", batch), [&](Scene& s) {
        const double state_bytes = 4.0 * static_cast<double>(batch * kChannels * kStates);
        const double bytes =
            2.0 * state_bytes + ScanData::bytes(batch) + ScanData::result_bytes(batch);
        const int64_t sets = sets_for(bytes);
        const ScanData in(s, sets * batch);
        const Tensor state = s.f32({sets * batch, kChannels, kStates});
        for (int64_t set = 0; set < sets; ++set) {
          s.packed(batch, 1, 100, set * batch);
        }
        return Work{
            .bytes = bytes + bytes_of({in.a_log, in.d, in.dt_bias}),
            .sets = sets,
            .call = [=, &s](int64_t set) {
              selective_scan(
                  s.ctx,
                  ScanData::inputs(part_of(in.projected, set, batch), part_of(in.u, set, batch),
                                   part_of(in.dt, set, batch), in.a_log, in.d, in.dt_bias),
                  s.segments[static_cast<size_t>(set)].view(), state);
            }};
      });
}

void scan_prefill(Bench& bench, int64_t tokens) {
  bench.row("selective scan prefill", fmt::format("{} tokens, 4096 channels of 16", tokens),
            [&](Scene& s) {
              const ScanData in(s, 2 * tokens);
              const Tensor state = s.f32({1, kChannels, kStates});
              Packed& packed = s.packed(1, tokens, 0, 0);
              return Work{.bytes = ScanData::bytes(tokens) + ScanData::result_bytes(tokens),
                          .sets = 2,
                          .call = [=, &s, &packed](int64_t set) {
                            selective_scan(s.ctx,
                                           ScanData::inputs(part_of(in.projected, set, tokens),
                                                            part_of(in.u, set, tokens),
                                                            part_of(in.dt, set, tokens), in.a_log,
                                                            in.d, in.dt_bias),
                                           packed.view(), state);
                          }};
            });
}

void scan_training(Bench& bench, int64_t tokens) {
  bench.row(
      "selective scan forward + backward", fmt::format("{} tokens, 4096 channels of 16", tokens),
      [&](Scene& s) {
        const ScanData in(s, tokens);
        const std::array<Leaf, 6> leaves = {s.leaf(in.projected), s.leaf(in.u), s.leaf(in.dt),
                                            s.leaf(in.a_log),     s.leaf(in.d), s.leaf(in.dt_bias)};
        Packed& packed = s.packed(1, tokens, 0);
        return Work{
            .bytes = 3.0 * ScanData::bytes(tokens) + 2.0 * ScanData::result_bytes(tokens),
            .call = [=, &s, &packed](int64_t) {
              s.set_gradient(selective_scan(
                  s.recorded,
                  ScanData::inputs(s.fresh(leaves[0]), s.fresh(leaves[1]), s.fresh(leaves[2]),
                                   s.fresh(leaves[3]), s.fresh(leaves[4]), s.fresh(leaves[5])),
                  packed.view()));
              s.tape.backward(s.recorded);
            }};
      });
}

void scan_section(Bench& bench) {
  for (const int64_t batch : {1, 64, 128}) {
    scan_decode(bench, batch);
  }
  scan_prefill(bench, 8192);
  scan_training(bench, 8192);
}

constexpr int64_t kWidth = 5120;

/// An operation that reads `inputs` tensors (tokens, width) and writes one, and reads or writes
/// `more` bytes a call beside them.
template <class MakeCall>
void pointwise(Bench& bench, const char* name, int64_t tokens, int64_t inputs, double more,
               const MakeCall& make_call) {
  bench.row(name, fmt::format("{} tokens of {}", tokens, kWidth), [&](Scene& s) {
    const double bytes = 2.0 * static_cast<double>((inputs + 1) * tokens * kWidth) + more;
    const int64_t sets = sets_for(bytes);
    const Tensor a = s.bf16({sets * tokens, kWidth});
    const Tensor b = inputs > 1 ? s.bf16({sets * tokens, kWidth}) : a;
    return Work{.bytes = bytes, .sets = sets, .call = [=, call = make_call(s, sets)](int64_t set) {
                  call(set, part_of(a, set, tokens), part_of(b, set, tokens));
                }};
  });
}

void pointwise_of(Bench& bench, int64_t tokens) {
  // Many tokens are one sequence that keeps no state, few are a step of as many sequences.
  const bool step = tokens <= 64;
  const double conv_bytes = 4.0 * kWidth * (5.0 + (step ? 6.0 * static_cast<double>(tokens) : 0.0));
  pointwise(bench, "short_conv", tokens, 1, conv_bytes, [&](Scene& s, int64_t sets) {
    const Tensor weight = s.f32({kWidth, 4});
    const Tensor bias = s.f32({kWidth});
    const Tensor state = step ? s.f32({sets * tokens, kWidth, 3}) : Tensor{};
    for (int64_t set = 0; set < sets; ++set) {
      step ? s.packed(tokens, 1, 100, set * tokens) : s.packed(1, tokens, 0);
    }
    return [=, &s](int64_t set, const Tensor& x, const Tensor&) {
      short_conv(s.ctx, x, weight, bias, true, s.segments[static_cast<size_t>(set)].view(), state);
    };
  });
  pointwise(bench, "rms_norm", tokens, 1, 4.0 * kWidth, [&](Scene& s, int64_t) {
    const Tensor weight = s.f32({kWidth}, 0.5, 1.5);
    return [=, &s](int64_t, const Tensor& x, const Tensor&) { rms_norm(s.ctx, x, weight, 1e-5F); };
  });
  pointwise(bench, "gated_rms_norm", tokens, 2, 4.0 * 128, [&](Scene& s, int64_t) {
    const Tensor weight = s.f32({128}, 0.5, 1.5);
    return [=, &s](int64_t, const Tensor& x, const Tensor& gate) {
      gated_rms_norm(s.ctx, x, gate, weight, {.group = 128, .order = GateOrder::kNormFirst});
    };
  });
  pointwise(bench, "swiglu", tokens, 2, 0.0, [&](Scene& s, int64_t) {
    return [&s](int64_t, const Tensor& gate, const Tensor& up) { swiglu(s.ctx, gate, up); };
  });
  pointwise(bench, "add", tokens, 2, 0.0, [&](Scene& s, int64_t) {
    return [&s](int64_t, const Tensor& x, const Tensor& y) { add(s.ctx, x, y); };
  });
  pointwise(bench, "rope", tokens, 1, 8.0 * 64 * static_cast<double>(tokens),
            [&](Scene& s, int64_t) {
              const auto table = std::make_shared<RopeTable>(RopeConfig{.theta = 1e6, .dim = 128});
              table->ensure(tokens);
              const Turns turns = table->turns(s.ctx, s.packed(1, tokens, 0).view());
              return [=, &s](int64_t, const Tensor& x, const Tensor&) {
                rope(s.ctx, x.split_last(kWidth / 128, 128), turns);
                static_cast<void>(table);  // outlives the turns
              };
            });
}

void pointwise_section(Bench& bench) {
  pointwise_of(bench, 8192);
  pointwise_of(bench, 64);
}

constexpr int64_t kVocabulary = 131072;

// Two readings and the gradient in place of the student's logits.
void loss_kernel(Bench& bench, int64_t rows) {
  bench.row("loss, both KL, gradient", fmt::format("{} rows of {}", rows, kVocabulary),
            [&](Scene& s) {
              const Tensor student = s.bf16({rows, kVocabulary}, -8.0, 8.0);
              const Tensor teacher = s.bf16({rows, kVocabulary}, -8.0, 8.0);
              auto* label = s.ctx.shared_scratch<int32_t>(rows);
              auto* result = s.ctx.shared_scratch<LossRow>(rows);
              for (int64_t r = 0; r < rows; ++r) {
                label[r] = static_cast<int32_t>(r * 31 % kVocabulary);
              }
              Work work{.bytes = 3.0 * bytes_of({student}), .call = [=, &s](int64_t) {
                          run<loss_rows>(s.ctx, student, [&]<class T>() {
                            return LossRows<T>{.student = view<T>(student),
                                               .teacher = view<T>(teacher),
                                               .label = label,
                                               .gradient = true,
                                               .cross_entropy = 0.0,
                                               .forward_kl = 0.5,
                                               .reverse_kl = 0.5,
                                               .temperature = 1.0,
                                               .result = result};
                          });
                        }};
              work.prepare = [=, &s](int64_t) {  // the kernel overwrites both
                s.random.fill(student, -8.0, 8.0);
                s.random.fill(teacher, -8.0, 8.0);
              };
              return work;
            });
}

// With the heads' products: two forward, one backward, as the head has no gradient here.
void fused_loss(Bench& bench, int64_t rows) {
  const std::string shape = fmt::format("{} rows, head {} x {}", rows, kVocabulary, kWidth);
  bench.row("head_loss, both KL", shape, [&](Scene& s) {
    const Leaf hidden = s.leaf(s.bf16({rows, kWidth}));
    const Tensor teacher_hidden = s.bf16({rows, kWidth});
    const Tensor head = s.bf16({kVocabulary, kWidth}, -0.02, 0.02);
    const Tensor teacher_head = s.bf16({kVocabulary, kWidth}, -0.02, 0.02);
    const std::vector<int32_t> labels(static_cast<size_t>(rows), 1);
    return Work{.flops = 6.0 * static_cast<double>(rows * kVocabulary * kWidth),
                .call = [=, &s](int64_t) {
                  head_loss(s.ctx,
                            {.hidden = s.fresh(hidden),
                             .head = head,
                             .teacher_hidden = teacher_hidden,
                             .teacher_head = teacher_head,
                             .labels = labels,
                             .scale = 1.0},
                            {.forward_kl = 0.5F, .reverse_kl = 0.5F});
                }};
  });
}

void sampling(Bench& bench, const char* name, int64_t rows, const SamplingConfig& config) {
  bench.row(name, fmt::format("{} rows of {}", rows, kVocabulary), [&](Scene& s) {
    const double bytes = 2.0 * static_cast<double>(rows * kVocabulary);
    const int64_t sets = sets_for(bytes);
    const Tensor logits = s.bf16({sets * rows, kVocabulary}, -10.0, 10.0);
    auto* configs = s.ctx.shared_scratch<SamplingConfig>(rows);
    auto* uniform = s.ctx.shared_scratch<double>(rows);
    auto* token = s.ctx.shared_scratch<int32_t>(rows);
    auto* log_probability = s.ctx.shared_scratch<float>(rows);
    Rng random(2, 0);
    for (int64_t r = 0; r < rows; ++r) {
      configs[r] = config;
      uniform[r] = random.uniform();
    }
    return Work{.bytes = bytes, .sets = sets, .call = [=, &s](int64_t set) {
                  run<sample_rows>(s.ctx, logits, [&]<class T>() {
                    return SampleRows<T>{view<T>(part_of(logits, set, rows)), configs, uniform,
                                         token, log_probability};
                  });
                }};
  });
}

// Reads p, its gradient, m and v and writes all four.
void adamw(Bench& bench, int64_t parameters) {
  bench.row("adamw_update", fmt::format("{} parameters, f32", parameters), [&](Scene& s) {
    Tensor p = s.f32({parameters}, -0.02, 0.02);
    const Tensor gradient = s.f32({parameters}, -1.0, 1.0);
    const Tensor m = s.f32({parameters}, -1.0, 1.0);
    const Tensor v = s.f32({parameters}, 0.01, 1.0);
    p.grad = gradient.data;
    Work work{.bytes = 32.0 * static_cast<double>(parameters), .call = [=, &s](int64_t) {
                adamw_update(s.ctx, p, m, v, {.rate = 1e-4F, .weight_decay = 0.1F});
              }};
    work.prepare = [=, &s](int64_t) { s.random.fill(gradient, -1.0, 1.0); };  // it was zeroed
    return work;
  });
}

void loss_section(Bench& bench) {
  loss_kernel(bench, 4096);
  fused_loss(bench, bench.quick ? 512 : 4096);
  sampling(bench, "sampling, greedy", 64, {});
  sampling(bench, "sampling, top-k 50, top-p 0.95", 64,
           {.temperature = 0.8F, .top_k = 50, .top_p = 0.95F});
  sampling(bench, "sampling, top-p 0.95", 64, {.temperature = 0.8F, .top_p = 0.95F});
  sampling(bench, "sampling, all", 64, {.temperature = 1.0F});
  adamw(bench, bench.quick ? 100'000'000 : 1'000'000'000);
}

struct Section {
  const char* name;
  void (*run)(Bench&);
};
constexpr Section kSections[] = {
    {"matmul", matmul_section},         {"attention", attention_section},
    {"recurrence", recurrence_section}, {"scan", scan_section},
    {"pointwise", pointwise_section},   {"loss", loss_section}};

struct Options {
  std::vector<std::string> sections;  // empty: all
  bool quick = false;
  std::string json;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--json") {
      expect(++i < argc, "--json needs the name of a file");
      options.json = argv[i];
    } else {
      expect(std::any_of(std::begin(kSections), std::end(kSections),
                         [&](const Section& s) { return argument == s.name; }),
             "expected matmul, attention, recurrence, scan, pointwise, loss, --quick or --json "
             "FILE, got {}",
             argument);
      options.sections.push_back(argument);
    }
  }
  return options;
}

int run_all(const Options& options) {
  if (cuda_devices() == 0) {
    std::printf("no CUDA device: %s\n", why_no_cuda().c_str());
    return 0;
  }
  const std::string name = cuda_device_info(kDevice).name;
  std::printf("%s; limits and figures of this run, bf16 unless said otherwise\n", name.c_str());
  std::printf("%-33s %-52s %10s %16s %16s %6s %9s\n", "operation", "shape", "ms", "work",
              "achieved", "share", "queue us");
  const double begin = now_ms();
  Bench bench(options.quick);
  for (const Section& section : kSections) {
    const auto& wanted = options.sections;
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), section.name) != wanted.end()) {
      bench.section = section.name;
      std::printf("%s\n", section.name);
      section.run(bench);
    }
  }
  std::printf("%.1f s\n", 1e-3 * (now_ms() - begin));
  if (!options.json.empty()) {
    const nlohmann::ordered_json report = {{"device", name},
                                           {"copy_gb_per_s", bench.copy_gbs},
                                           {"product_tflop_per_s", bench.product_tflops},
                                           {"quick", options.quick},
                                           {"rows", bench.rows}};
    write_file_atomically(options.json, report.dump(1) + "\n");
  }
  return bench.failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run_all(parse(argc, argv));
  } catch (const Error& error) {
    std::fprintf(stderr, "cuda_bench: %s\n", error.what());
    return 1;
  }
}
