#include "ops/recurrence/recurrence.h"

#include <algorithm>

#include "base/parallel.h"
#include "ops/optional.h"
#include "ops/recurrence/recurrence_kernels.h"
#include "ops/recurrence/recurrence_ref.h"

namespace cambium {
namespace {

// (T, heads, dim) with heads and elements together; (T, heads) for dim 0.
bool has_heads(const Tensor& t, const Tensor& like, int64_t heads, int64_t dim) {
  const int rank = dim > 0 ? 3 : 2;
  if (t.rank != rank || t.dtype != like.dtype || t.dim(0) != like.dim(0) || t.dim(1) != heads ||
      (dim > 0 && t.dim(2) != dim) || !t.has_rows()) {
    return false;
  }
  return dim == 0 || heads == 1 || t.stride[1] == dim;
}

void check(const RecurrenceInputs& in) {
  const Tensor& v = in.v;
  expect(v.rank == 3 && (v.dtype == Dtype::kF32 || v.dtype == Dtype::kF64) &&
             has_heads(v, v, v.dim(1), v.dim(2)),
         "[recurrence] expected v (T, Hv, V), f32 or f64, with heads together, got {}",
         v.describe());
  const char* dtype = dtype_name(v.dtype);
  expect(in.q.rank == 3 && has_heads(in.q, v, in.q.dim(1), in.q.dim(2)),
         "[recurrence] expected q {} ({}, Hk, K) with heads together, got {}", dtype, v.dim(0),
         in.q.describe());
  const int64_t key_dim = in.q.dim(2);
  expect(has_heads(in.k, v, in.q.dim(1), key_dim),
         "[recurrence] expected k shaped like q {}, got {}", in.q.describe(), in.k.describe());
  expect(v.dim(1) % in.q.dim(1) == 0,
         "[recurrence] expected a number of key heads that divides {} value heads, got {}",
         v.dim(1), in.q.dim(1));
  expect(has_heads(in.log_decay, v, v.dim(1), in.log_decay.rank == 3 ? key_dim : 0),
         "[recurrence] expected log_decay {} ({}, {}) or ({}, {}, {}), got {}", dtype, v.dim(0),
         v.dim(1), v.dim(0), v.dim(1), key_dim, in.log_decay.describe());
  expect(!in.weight.defined() || has_heads(in.weight, v, v.dim(1), 0),
         "[recurrence] expected weight {} ({}, {}), got {}", dtype, v.dim(0), v.dim(1),
         in.weight.describe());
  expect(!in.delta || in.weight.defined(),
         "[recurrence] the delta rule needs a weight (its beta), got none");
  expect(!in.skip.defined() ||
             (in.skip.rank == 1 && in.skip.dim(0) == v.dim(1) && in.skip.dtype == v.dtype),
         "[recurrence] expected skip {} ({}), got {}", dtype, v.dim(1), in.skip.describe());
}

template <class Real>
PerToken<Real> per_token(const Tensor& t) {
  return t.defined() ? PerToken<Real>{t.ptr<Real>(), t.grad_ptr<Real>(), t.stride[0]}
                     : PerToken<Real>{};
}

template <class Real>
RecurrenceArgs<Real> make_args(const RecurrenceInputs& in, const SegmentWalk& segments,
                               const Tensor& state, const Tensor& y) {
  return {.segments = segments,
          .key_heads = in.q.dim(1),
          .heads = in.v.dim(1),
          .key_dim = in.q.dim(2),
          .dim = in.v.dim(2),
          .decay_per_channel = in.log_decay.rank == 3,
          .delta = in.delta,
          .q = per_token<Real>(in.q),
          .k = per_token<Real>(in.k),
          .v = per_token<Real>(in.v),
          .log_decay = per_token<Real>(in.log_decay),
          .weight = per_token<Real>(in.weight),
          .skip = data_or_null<Real>(in.skip),
          .dskip = grad_or_null<Real>(in.skip),
          .state = data_or_null<Real>(state),
          .y = y.ptr<Real>(),
          .dy = y.grad_ptr<Real>()};
}

// Tokens of a chunk in the kernels, a divisor of kRecurrenceChunk: the pairs of a chunk cost as
// much as its state where they are about as many as a head has channels.
int64_t chunk_tokens(const RecurrenceArgs<float>& args) {
  return std::max(args.key_dim, args.dim) > 64 ? kRecurrenceChunk : kRecurrenceChunk / 2;
}

// What the float kernels keep from forward to backward.
struct Chunks {
  const int64_t* first_chunk = nullptr;
  Tensor states;
};

Chunks make_chunks(Arena& arena, const RecurrenceArgs<float>& args) {
  const int64_t chunk = chunk_tokens(args);
  const SegmentWalk& segments = args.segments;
  auto* first =
      static_cast<int64_t*>(arena.allocate(segments.count * static_cast<int64_t>(sizeof(int64_t))));
  int64_t count = 0;
  for (int64_t s = 0; s < segments.count; ++s) {
    first[s] = count;
    const int64_t begin = segments.position[s];
    const int64_t end = begin + segments.length(s);
    count += end > begin ? (end - 1) / chunk - begin / chunk + 1 : 0;
  }
  return {first, arena.empty(Dtype::kF32, {count, args.heads, recurrence_padded(args.key_dim),
                                           recurrence_padded(args.dim)})};
}

RecurrenceChunks kernel_args(Arena& arena, const RecurrenceArgs<float>& args,
                             const Chunks& chunks) {
  // A piece of work should outweigh handing it to a thread.
  constexpr int64_t kLeastWork = 1 << 15;
  const int64_t tokens = args.segments.count == 0 ? 0 : args.segments.start[args.segments.count];
  const int64_t work = tokens * args.heads * args.key_dim * args.dim;
  const int64_t pieces = std::min({args.segments.count * args.heads, 1 + work / kLeastWork,
                                   std::max<int64_t>(4 * num_threads(), 16)});
  const int64_t scratch = recurrence_scratch(args.key_dim, args.dim);
  return {.op = args,
          .chunk = chunk_tokens(args),
          .first_chunk = chunks.first_chunk,
          .chunk_states = data_or_null<float>(chunks.states),
          .pieces = pieces,
          .scratch = arena.empty(Dtype::kF32, {pieces * scratch}).ptr<float>(),
          .dq_heads = nullptr,
          .dk_heads = nullptr,
          .dskip_part = nullptr};
}

void backward(Arena& arena, const RecurrenceArgs<float>& args, const Chunks& chunks,
              int64_t tokens) {
  RecurrenceChunks kernel = kernel_args(arena, args, chunks);
  if (args.key_heads < args.heads) {
    const auto heads = [&] {
      return arena.empty(Dtype::kF32, {tokens, args.heads, args.key_dim}).ptr<float>();
    };
    kernel.dq_heads = heads();
    kernel.dk_heads = heads();
  }
  if (args.dskip != nullptr) {
    kernel.dskip_part = arena.empty(Dtype::kF32, {args.segments.count, args.heads}).ptr<float>();
  }
  recurrence_backward(kernel);
}

}  // namespace

Tensor recurrence(Context& ctx, const RecurrenceInputs& inputs, const Segments& segments,
                  const Tensor& state) {
  require_cpu("recurrence", inputs.v);
  check(inputs);
  const Tensor& v = inputs.v;
  expect_segments("recurrence", segments, v.dim(0), state, v.dtype,
                  {v.dim(1), inputs.q.dim(2), v.dim(2)});
  const bool differentiate =
      ctx.differentiate(inputs.q, inputs.k, v, inputs.log_decay, inputs.weight, inputs.skip);
  const Tensor y = ctx.result_like(v, differentiate);
  if (!ctx.use_reference(v)) {
    const auto args = make_args<float>(inputs, segments.walk(), state, y);
    // The states at chunk starts, the first included, are all that backward needs.
    const Chunks chunks = differentiate ? make_chunks(*ctx.arena, args) : Chunks{};
    {
      const ArenaScope scope(*ctx.arena);
      recurrence_forward(kernel_args(*ctx.arena, args, chunks));
    }
    if (differentiate) {
      ctx.tape->record([arena = ctx.arena, args, chunks, tokens = v.dim(0)] {
        backward(*arena, args, chunks, tokens);
      });
    }
    return y;
  }
  const Tensor initial = differentiate ? copy_initial_state(ctx, segments, state) : Tensor{};
  if (v.dtype == Dtype::kF64) {
    reference::recurrence_forward(make_args<double>(inputs, segments.walk(), state, y));
  } else {
    reference::recurrence_forward(make_args<float>(inputs, segments.walk(), state, y));
  }
  if (differentiate) {
    SegmentWalk walk = segments.walk();
    walk.slot = nullptr;
    ctx.tape->record([inputs, walk, initial, y] {
      if (y.dtype == Dtype::kF64) {
        reference::recurrence_backward(make_args<double>(inputs, walk, initial, y));
      } else {
        reference::recurrence_backward(make_args<float>(inputs, walk, initial, y));
      }
    });
  }
  return y;
}

}  // namespace cambium
