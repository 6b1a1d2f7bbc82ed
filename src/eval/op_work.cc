#include "eval/op_work.h"

#include <fmt/format.h>

#include "ops/activation/activation_kernels.h"
#include "ops/attention/attention_kernels.h"
#include "ops/chosen_attention/chosen_attention_kernels.h"
#include "ops/conv/conv_kernels.h"
#include "ops/embedding/embedding_kernels.h"
#include "ops/experts/experts_kernels.h"
#include "ops/head_matmul/head_matmul_kernels.h"
#include "ops/join_heads/join_heads_kernels.h"
#include "ops/latent_attention/latent_attention_kernels.h"
#include "ops/matmul/matmul_kernels.h"
#include "ops/norm/norm_kernels.h"
#include "ops/pointwise/pointwise_kernels.h"
#include "ops/recurrence/recurrence_kernels.h"
#include "ops/recurrent_step/recurrent_step_kernels.h"
#include "ops/rope/rope_kernels.h"
#include "ops/sampling/sampling_kernels.h"
#include "ops/scale_heads/scale_heads_kernels.h"
#include "ops/scan_step/scan_step_kernels.h"
#include "ops/selection/selection_kernels.h"
#include "ops/selective_scan/selective_scan_kernels.h"
#include "ops/turned_write/turned_write_kernels.h"

namespace cambium {
namespace {

double product(std::initializer_list<int64_t> sizes) {
  double all = 1.0;
  for (const int64_t size : sizes) {
    all *= static_cast<double>(size);
  }
  return all;
}

template <class T, class G>
double bytes_of(const View<T, G>& view) {
  return view.defined() ? product({view.count(), view.channels, sizeof(T)}) : 0.0;
}
template <class... Views>
double bytes_of(const Views&... views) {
  return (bytes_of(views) + ...);
}

template <class T, class G>
std::string rows_shape(const View<T, G>& view) {
  return fmt::format("{} x {}", view.count(), view.channels);
}

// "3 x 16 at 512": segments, the tokens of each, and where they stand.
template <class Walk>
std::string segments_shape(const Walk& segments, int64_t count) {
  if (count == 0) {
    return "0 tokens";
  }
  const int64_t length = segments.length(0);
  const auto position = [&](int64_t s) {
    return segments.position == nullptr ? 0 : segments.position[s];
  };
  for (int64_t s = 1; s < count; ++s) {
    if (segments.length(s) != length || position(s) != position(0)) {
      return fmt::format("{} tokens of {} sequences", segments.start[count], count);
    }
  }
  return fmt::format("{} x {} at {}", count, length, position(0));
}

// Of state `size` numbers a segment: what is there is read, what comes after is written.
double state_bytes(const SegmentWalk& segments, const void* state, double size, double bytes) {
  double all = 0.0;
  for (int64_t s = 0; state != nullptr && s < segments.count; ++s) {
    all += (segments.continues(s) ? 2.0 : 1.0) * size * bytes;
  }
  return all;
}

template <class T>
OpWork describe(const Attention<T>& a) {
  const AttentionShape& shape = a.shape;
  OpWork work;
  work.shape = fmt::format("{}, {}/{} heads of {}", segments_shape(shape, shape.segments),
                           shape.heads, shape.kv_heads, shape.head_dim);
  if (shape.window > 0) {
    work.shape += fmt::format(", window {}", shape.window);
  }
  if (shape.sinks > 0) {
    work.shape += fmt::format(", {} sinks", shape.sinks);
  }
  const int64_t dims = shape.head_dim + shape.value_dim;
  // Of a key and its value.
  const int64_t pair = a.scaled_k.defined()   ? dims + 2 * static_cast<int64_t>(sizeof(bf16))
                       : a.narrow_k.defined() ? dims * static_cast<int64_t>(sizeof(bf16))
                                              : dims * static_cast<int64_t>(sizeof(T));
  work.cost.bytes = bytes_of(a.q, a.y);
  for (int64_t s = 0; s < shape.segments; ++s) {
    const int64_t position = shape.first_position(s);
    work.cost.bytes += product({shape.seen_keys(s).count(), shape.kv_heads, pair});
    work.cost.flops += 2.0 * product({shape.heads, dims}) *
                       keys_seen(position, shape.length(s), shape.window, shape.sinks);
  }
  return work;
}

template <class T>
OpWork describe(const AttentionWrite<T>& a) {
  const auto& [keys, values] = a.each;
  const auto written = [&](const auto& part) {
    const double numbers = bytes_of(part.rows) / static_cast<double>(sizeof(T));
    if (part.scaled.defined()) {
      return numbers + numbers / static_cast<double>(part.rows.channels) * sizeof(bf16);
    }
    return numbers * static_cast<double>(part.narrow.defined() ? sizeof(bf16) : sizeof(T));
  };
  return {fmt::format("{}, {} heads of {}", segments_shape(a.shape, a.shape.segments),
                      a.shape.kv_heads, a.shape.head_dim),
          {},
          {bytes_of(keys.rows, values.rows) + written(keys) + written(values), 0.0}};
}

/// Of all tokens of segment s. What is chosen may be anything before: at least once each, at most
/// all of them.
struct ChosenKeys {
  double looks = 0.0;
  double read = 0.0;
};
ChosenKeys chosen_keys(const AttentionShape& shape, const ChosenTokens& chosen, int64_t s) {
  const int64_t position = shape.first_position(s);
  ChosenKeys keys;
  for (int64_t i = 0; i < shape.length(s); ++i) {
    keys.looks += static_cast<double>(chosen.count(position + i));
  }
  keys.read = std::min(keys.looks, product({position + shape.length(s)}));
  return keys;
}

/// What attention to chosen keys of so many bytes reads and computes.
void add_chosen_keys(OpWork& work, const AttentionShape& shape, const ChosenTokens& chosen,
                     double key_bytes) {
  for (int64_t s = 0; s < shape.segments; ++s) {
    const ChosenKeys keys = chosen_keys(shape, chosen, s);
    work.cost.bytes += keys.read * key_bytes;
    work.cost.flops += 2.0 * product({shape.heads, shape.head_dim + shape.value_dim}) * keys.looks;
  }
}

template <class T>
OpWork describe(const LatentAttention<T>& a) {
  const AttentionShape& shape = a.shape;
  OpWork work;
  work.shape =
      fmt::format("{}, {} heads on latents of {} + {}", segments_shape(shape, shape.segments),
                  shape.heads, shape.value_dim, shape.head_dim - shape.value_dim);
  work.cost.bytes = bytes_of(a.q, a.y);
  add_chosen_keys(work, shape, a.chosen, product({a.latent.bytes() + a.rope_key.bytes()}));
  return work;
}

template <class T>
OpWork describe(const ChosenAttention<T>& a) {
  const AttentionShape& shape = a.shape;
  OpWork work;
  work.shape =
      fmt::format("{}, {}/{} heads of {}, {} pieces of {}", segments_shape(shape, shape.segments),
                  shape.heads, shape.kv_heads, shape.head_dim, a.chosen.budget, a.chosen.size);
  work.cost.bytes = bytes_of(a.q, a.y);
  add_chosen_keys(work, shape, a.chosen, product({a.k.bytes() + a.v.bytes()}));
  return work;
}

template <class T>
OpWork describe(const ChooseTokens<T>& a) {
  const AttentionShape& shape = a.shape;
  OpWork work;
  work.shape = fmt::format("{}, {} heads of {} choose {}", segments_shape(shape, shape.segments),
                           shape.heads, shape.head_dim, a.top());
  if (a.chosen.size > 1) {
    work.shape += fmt::format(" of {}", a.chosen.size);
  }
  work.cost.bytes = bytes_of(a.q, a.weight);
  for (int64_t s = 0; s < shape.segments; ++s) {
    const int64_t position = shape.first_position(s);
    work.cost.bytes += product({position + shape.length(s), a.keys.bytes()});
    work.cost.flops +=
        2.0 * product({shape.heads, shape.head_dim}) * keys_seen(position, shape.length(s), 0, 0);
  }
  return work;
}

template <class T>
OpWork describe(const JoinHeads<T>& a) {
  return {rows_shape(a.y), {}, {bytes_of(a.a, a.b, a.y), 0.0}};
}

template <class T>
OpWork describe(const ScaleHeads<T>& a) {
  return {rows_shape(a.y), {}, {bytes_of(a.x, a.factor, a.y), 0.0}};
}

template <class T>
OpWork describe(const HeadMatmul<T>& a) {
  const auto& [wide, narrow] = a.weight;
  return {
      fmt::format("{} x {} heads, {} -> {}", a.tokens(), a.heads(), a.x.channels, a.y.channels),
      {narrow.defined() ? static_cast<const void*>(narrow.data) : wide.data},
      {bytes_of(a.x, wide, narrow, a.y), 2.0 * product({a.x.count(), a.x.channels, a.y.channels})}};
}

template <class T>
OpWork describe(const ShortConv<T>& a) {
  return {fmt::format("{}, {} channels, {} taps", segments_shape(a.segments, a.segments.count),
                      a.channels(), a.taps()),
          {a.weight.data},
          {bytes_of(a.x, a.weight, a.bias, a.y) +
               state_bytes(a.segments, a.state, product({a.state_size()}), sizeof(Sum<T>)),
           2.0 * product({a.x.count(), a.channels(), a.taps()})}};
}

template <class T>
OpWork describe(const Embedding<T>& a) {
  const bool narrow = a.narrow.defined();
  const int64_t element = narrow ? sizeof(bf16) : sizeof(Sum<T>);
  return {rows_shape(a.y),
          {narrow ? static_cast<const void*>(a.narrow.data) : a.table.data},
          {bytes_of(a.y) + product({a.count, a.y.channels, element}), 0.0}};
}

template <class T, class Y>
OpWork describe(const MatmulsTo<T, Y>& a) {
  OpWork work;
  const View<T>& x = a.each[0].x;
  work.cost.bytes = bytes_of(x);
  for (int64_t i = 0; i < a.count; ++i) {
    const MatmulTo<T, Y>& one = a.each[i];
    const auto& [wide, narrow] = one.weight;
    work.shape += fmt::format("{} {}", i == 0 ? rows_shape(x) + " ->" : " +", one.y.channels);
    work.weights.push_back(narrow.defined() ? static_cast<const void*>(narrow.data) : wide.data);
    work.cost.bytes +=
        bytes_of(wide, narrow, one.bias) + bytes_of(one.y) * (one.accumulate ? 2.0 : 1.0);
    work.cost.flops += 2.0 * product({x.count(), x.channels, one.y.channels});
  }
  return work;
}

template <class T>
OpWork describe(const Route<T>& a) {
  return {fmt::format("{}, the best {}", rows_shape(a.logits), a.lists.top),
          {},
          {bytes_of(a.logits, a.choice_bias, a.weight) + product({3 * a.lists.rows(), 4}), 0.0}};
}

template <class T>
OpWork describe(const Dispatch<T>& a) {
  return {rows_shape(a.x) + fmt::format(" -> {} rows", a.y.count()), {}, {bytes_of(a.x, a.y), 0.0}};
}

template <class T>
OpWork describe(const Combine<T>& a) {
  return {fmt::format("{} rows -> {}", a.x.count(), rows_shape(a.y)),
          {},
          {bytes_of(a.x, a.weight, a.y, a.added, a.gate), 0.0}};
}

// Which experts the tokens chose only the device knows: as many as even chances would meet.
double met_share(const ExpertLists& lists) {
  return experts_met(static_cast<double>(lists.tokens), lists.top, lists.experts) /
         static_cast<double>(lists.experts);
}
template <class T>
const void* data_of(const MatmulWeight<T>& weight) {
  return weight.narrow.defined() ? static_cast<const void*>(weight.narrow.data) : weight.wide.data;
}

template <class T>
OpWork describe(const ExpertsMatmul<T>& a) {
  const auto& [wide, narrow] = a.weight;
  return {fmt::format("{} -> {}, {} of {} experts", rows_shape(a.x), a.y.channels, a.lists.top,
                      a.lists.experts),
          {data_of(a.weight)},
          {bytes_of(a.x, a.y) + met_share(a.lists) * bytes_of(wide, narrow, a.bias),
           2.0 * product({a.x.count(), a.x.channels, a.y.channels})}};
}

template <class T>
OpWork describe(const ExpertsHidden<T>& a) {
  return {
      fmt::format("{} -> {}, {} of {} experts", rows_shape(a.x), a.y.channels, a.lists.top,
                  a.lists.experts),
      {data_of(a.gate), data_of(a.up)},
      {bytes_of(a.x, a.y) + met_share(a.lists) * bytes_of(a.gate.wide, a.gate.narrow, a.gate_bias,
                                                          a.up.wide, a.up.narrow, a.up_bias),
       4.0 * product({a.lists.rows(), a.x.channels, a.y.channels})}};
}

template <class T>
OpWork describe(const ClampedSwiglu<T>& a) {
  return {rows_shape(a.gate), {}, {bytes_of(a.gate, a.up, a.y), 0.0}};
}

template <class T>
OpWork describe(const RmsNorm<T>& a) {
  return {rows_shape(a.x), {a.weight.data}, {bytes_of(a.x, a.weight, a.y), 0.0}};
}

template <class T>
OpWork describe(const AddRmsNorm<T>& a) {
  const double streams = a.keep == 0.0F ? 1.0 : 2.0;
  return {rows_shape(a.y),
          {a.weight.data},
          {bytes_of(a.y, a.weight, a.x) + streams * bytes_of(a.stream), 0.0}};
}

template <class T>
OpWork describe(const LayerNorm<T>& a) {
  return {rows_shape(a.x), {a.weight.data}, {bytes_of(a.x, a.weight, a.bias, a.y), 0.0}};
}

template <class T>
OpWork describe(const GatedNorm<T>& a) {
  return {rows_shape(a.x), {a.weight.data}, {bytes_of(a.x, a.gate, a.weight, a.y), 0.0}};
}

template <class T>
OpWork describe(const L2Norm<T>& a) {
  return {rows_shape(a.x), {}, {bytes_of(a.x, a.y), 0.0}};
}

template <class T>
OpWork describe(const Pointwise<T>& a) {
  return {rows_shape(a.y), {}, {bytes_of(a.a, a.b, a.y), 0.0}};
}

template <class T>
OpWork describe(const Activate<T>& a) {
  return {rows_shape(a.y), {}, {bytes_of(a.x, a.up, a.y), 0.0}};
}

template <class T>
OpWork describe(const Xielu<T>& a) {
  return {rows_shape(a.y), {}, {bytes_of(a.x, a.y), 0.0}};
}

template <class T>
OpWork describe(const SoftCap<T>& a) {
  return {rows_shape(a.x), {}, {2.0 * bytes_of(a.x) + bytes_of(a.y), 0.0}};
}

template <class T>
OpWork describe(const Sigmoid<T>& a) {
  return {rows_shape(a.x), {}, {bytes_of(a.x, a.y), 0.0}};
}

template <class T>
OpWork describe(const AddScaled<T>& a) {
  const bool one = a.b == 0.0F;  // x alone is scaled
  return {rows_shape(a.x), {}, {bytes_of(a.x, a.sum) + (one ? 0.0 : bytes_of(a.y)), 0.0}};
}

template <class T>
OpWork describe(const ScaleBlocks<T>& a) {
  return {rows_shape(a.x), {}, {bytes_of(a.x, a.y), 0.0}};
}

template <class T>
OpWork describe(const PerHead<T>& a) {
  return {rows_shape(a.x), {a.p.data}, {bytes_of(a.x, a.p, a.q, a.y), 0.0}};
}

template <class T>
OpWork describe(const RepeatHeads<T>& a) {
  return {rows_shape(a.x) + fmt::format(" -> {}", a.y.count()), {}, {bytes_of(a.x, a.y), 0.0}};
}

template <class T>
OpWork describe(const MixHeads<T>& a) {
  return {rows_shape(a.a), {}, {bytes_of(a.a, a.b, a.gate, a.y), 0.0}};
}

template <class T>
OpWork describe(const Recurrence<T>& a) {
  const double size = product({a.state_size()});
  return {fmt::format("{}, {}/{} heads of {} x {}", segments_shape(a.segments, a.segments.count),
                      a.key_heads, a.heads, a.key_dim, a.dim),
          {},
          {bytes_of(a.q, a.k, a.v, a.log_decay, a.weight, a.skip, a.y) +
               state_bytes(a.segments, a.state, size, sizeof(Sum<T>)),
           (a.delta ? 6.0 : 4.0) * static_cast<double>(a.segments.tokens()) * size}};
}

template <class T>
OpWork describe(const RecurrentStep<T>& a) {
  const double size = product({a.heads, a.key_dim, a.dim});
  const double inputs = product({a.channels(), a.taps() - 1});
  const auto tokens = static_cast<double>(a.segments.count);
  return {fmt::format("{}, {} heads of {} x {}", segments_shape(a.segments, a.segments.count),
                      a.heads, a.key_dim, a.dim),
          {},
          {bytes_of(a.x, a.conv_weight, a.conv_bias, a.decay, a.weight, a.z, a.y) +
               state_bytes(a.segments, a.state, size, sizeof(Sum<T>)) +
               state_bytes(a.segments, a.conv, inputs, sizeof(Sum<T>)),
           tokens * ((a.delta ? 6.0 : 4.0) * size + 2.0 * product({a.channels(), a.taps()}))}};
}

template <class T>
OpWork describe(const SelectiveScan<T>& a) {
  const double size = product({a.channels, a.states});
  return {fmt::format("{}, {} channels of {}", segments_shape(a.segments, a.segments.count),
                      a.channels, a.states),
          {a.a_log.data},
          {bytes_of(a.u, a.dt, a.z, a.b, a.c, a.a_log, a.d, a.dt_bias, a.y) +
               state_bytes(a.segments, a.state, size, sizeof(Sum<T>)),
           4.0 * static_cast<double>(a.segments.tokens()) * size}};
}

template <class T>
OpWork describe(const ScanStep<T>& a) {
  const double inputs = product({a.scan.channels, a.taps() - 1});
  OpWork work = describe(a.scan);
  work.cost.bytes += bytes_of(a.x, a.conv_weight, a.conv_bias) +
                     state_bytes(a.scan.segments, a.conv, inputs, sizeof(Sum<T>));
  return work;
}

template <class T>
OpWork describe(const TurnedWrite<T>& a) {
  OpWork work = describe(a.write);
  work.shape = fmt::format("{} and {}", rows_shape(a.q.x), work.shape);
  work.cost.bytes += bytes_of(a.q.x, a.q.y);
  return work;
}

template <class T>
OpWork describe(const Ropes<T>& a) {
  OpWork work;
  for (int64_t i = 0; i < a.count; ++i) {
    const Rope<T>& one = a.each[i];
    work.shape += (i == 0 ? "" : " and ") + rows_shape(one.x);
    work.cost.bytes += bytes_of(one.x, one.y);
  }
  return work;
}

template <class T>
OpWork describe(const SampleRows<T>& a) {
  return {rows_shape(a.logits), {}, {bytes_of(a.logits), 0.0}};
}

// Fills `work` if the call's arguments are Args of some type of elements.
template <template <class> class Args>
bool described(const OpCall& call, OpWork& work) {
  const auto of = [&]<class T>(T /*element*/) {
    const auto* args = call.as<Args<T>>();
    if (args != nullptr) {
      work = describe(*args);
    }
    return args != nullptr;
  };
  return of(float{}) || of(bf16{}) || of(double{});
}

template <template <class> class... Args>
OpWork first_of(const OpCall& call) {
  OpWork work;
  (described<Args>(call, work) || ...);
  return work;
}

}  // namespace

OpWork work_of(const OpCall& call) {
  return first_of<Matmuls, UnroundedMatmuls, AddRmsNorm, RmsNorm, LayerNorm, GatedNorm, L2Norm,
                  Attention, AttentionWrite, Ropes, Pointwise, Activate, Xielu, SoftCap, ShortConv,
                  Recurrence, RecurrentStep, SelectiveScan, ScanStep, Route, Dispatch,
                  ExpertsMatmul, ExpertsHidden, Combine, ClampedSwiglu, Sigmoid, PerHead, AddScaled,
                  ScaleBlocks, RepeatHeads, MixHeads, Embedding, SampleRows, LatentAttention,
                  ChosenAttention, ChooseTokens, JoinHeads, HeadMatmul, ScaleHeads, TurnedWrite>(
      call);
}

}  // namespace cambium
