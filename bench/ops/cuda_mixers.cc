// The recurrence and the selective scan of cuda_bench.
#include <array>
#include <cmath>
#include <memory>
#include <vector>

#include "cuda_machine.h"
#include "cuda_sections.h"
#include "ops/recurrence/recurrence.h"
#include "ops/selective_scan/selective_scan.h"

namespace cambium {
namespace {

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

void recurrence_prefill(Bench& bench, const Mixer& m, int64_t sequences, int64_t length) {
  const int64_t tokens = sequences * length;
  const std::string shape =
      sequences == 1 ? fmt::format("{} tokens, {}", tokens, m.describe())
                     : fmt::format("{} x {} tokens, {}", sequences, length, m.describe());
  bench.row(fmt::format("{} prefill", m.name), shape, [&](Scene& s) {
    const auto in = std::make_shared<std::vector<RecurrenceInputs>>();
    const double bytes = recurrence_bytes(in->emplace_back(recurrence_inputs(s, m, tokens))) +
                         bytes_of({in->front().v});
    const int64_t sets = sets_for(bytes);
    while (static_cast<int64_t>(in->size()) < sets) {
      in->push_back(recurrence_inputs(s, m, tokens));
    }
    const Tensor state = s.f32({sequences, m.heads, m.key_dim, m.dim});
    Packed& packed = s.packed(sequences, length, 0, 0);
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

}  // namespace

void recurrence_section(Bench& bench) {
  const Mixer mamba = {"Mamba-2", 8, 128, 128, 64, false, false};
  for (const Mixer& m : {Mixer{"GDN", 16, 32, 128, 128, true, false},
                         Mixer{"KDA", 32, 32, 128, 128, true, true}, mamba}) {
    for (const int64_t batch : {1, 64, 256, 1024}) {
      recurrence_decode(bench, m, batch);
    }
  }
  const Mixer nano = {"Mamba-2 of Nemotron-Nano", 8, 128, 128, 80, false, false};
  const Mixer falcon = {"Mamba-2 of Falcon-H1", 2, 32, 256, 128, false, false};
  for (const Mixer& m : {nano, falcon}) {
    recurrence_decode(bench, m, 64);
    recurrence_prefill(bench, m, 1, 8192);
  }
  for (const int64_t tokens : {3072, 8192, 32768}) {
    recurrence_prefill(bench, {"GDN", 2, 8, 128, 128, true, false}, 1, tokens);
  }
  recurrence_prefill(bench, {"GDN", 1, 4, 128, 128, true, false}, 1, 8192);
  recurrence_prefill(bench, {"GDN", 2, 8, 128, 128, true, false}, 8, 4096);
  recurrence_prefill(bench, {"KDA", 16, 16, 128, 128, true, true}, 1, 2048);
  recurrence_prefill(bench, {"KDA", 16, 16, 128, 128, true, true}, 8, 4096);
  recurrence_prefill(bench, mamba, 1, 8192);
  recurrence_prefill(bench, mamba, 8, 4096);
  recurrence_training(bench, {"KDA", 32, 32, 128, 128, true, true}, 8192);
  recurrence_training(bench, {"KDA", 16, 16, 128, 128, true, true}, 32768);
  recurrence_training(bench, {"GDN", 32, 32, 128, 128, true, false}, 8192);
  recurrence_training(bench, mamba, 8192);
}

void scan_section(Bench& bench) {
  for (const int64_t batch : {1, 64, 128}) {
    scan_decode(bench, batch);
  }
  scan_prefill(bench, 8192);
  scan_training(bench, 8192);
}

}  // namespace cambium
