#include "ops/selective_scan/selective_scan.h"

#include <algorithm>

#include "base/parallel.h"
#include "ops/optional.h"
#include "ops/selective_scan/selective_scan_ref.h"

namespace cambium {
namespace {

void check(const SelectiveScanInputs& in) {
  const Tensor& u = in.u;
  expect(u.rank == 2 && u.row_contiguous() && (u.dtype == Dtype::kF32 || u.dtype == Dtype::kF64),
         "[selective_scan] expected u (T, d), f32 or f64, with contiguous rows, got {}",
         u.describe());
  const char* dtype = dtype_name(u.dtype);
  for (const auto& [name, t] : {std::pair{"dt", in.dt}, std::pair{"z", in.z}}) {
    expect(t.same_shape(u) && t.dtype == u.dtype && t.row_contiguous(),
           "[selective_scan] expected {} shaped like u {}, got {}", name, u.describe(),
           t.describe());
  }
  expect(in.a_log.rank == 2 && in.a_log.dim(0) == u.dim(1) && in.a_log.dtype == u.dtype &&
             in.a_log.contiguous(),
         "[selective_scan] expected a_log {} ({}, N), got {}", dtype, u.dim(1),
         in.a_log.describe());
  const int64_t states = in.a_log.dim(1);
  for (const auto& [name, t] : {std::pair{"b", in.b}, std::pair{"c", in.c}}) {
    expect(t.rank == 3 && t.dim(0) == u.dim(0) && t.dim(2) == states && t.dtype == u.dtype &&
               t.has_rows() && (t.dim(1) == 1 || t.stride[1] == states),
           "[selective_scan] expected {} {} ({}, groups, {}) with groups together, got {}", name,
           dtype, u.dim(0), states, t.describe());
    expect(t.dim(1) > 0 && u.dim(1) % t.dim(1) == 0,
           "[selective_scan] expected a number of {} groups that divides {} channels, got {}", name,
           u.dim(1), t.dim(1));
  }
  for (const auto& [name, t] : {std::pair{"d", in.d}, std::pair{"dt_bias", in.dt_bias}}) {
    expect(t.rank == 1 && t.dim(0) == u.dim(1) && t.dtype == u.dtype,
           "[selective_scan] expected {} {} ({}), got {}", name, dtype, u.dim(1), t.describe());
  }
}

template <class Real>
ScanRows<Real> scan_rows(const Tensor& t) {
  return {t.ptr<Real>(), t.grad_ptr<Real>(), t.stride[0]};
}

template <class Real>
ScanArgs<Real> make_args(const SelectiveScanInputs& in, const SegmentWalk& segments,
                         const Tensor& state, const Tensor& y) {
  return {.segments = segments,
          .channels = in.u.dim(1),
          .states = in.a_log.dim(1),
          .b_groups = in.b.dim(1),
          .c_groups = in.c.dim(1),
          .u = scan_rows<Real>(in.u),
          .dt = scan_rows<Real>(in.dt),
          .b = scan_rows<Real>(in.b),
          .c = scan_rows<Real>(in.c),
          .z = scan_rows<Real>(in.z),
          .a_log = in.a_log.ptr<Real>(),
          .d = in.d.ptr<Real>(),
          .dt_bias = in.dt_bias.ptr<Real>(),
          .da_log = in.a_log.grad_ptr<Real>(),
          .dd = in.d.grad_ptr<Real>(),
          .ddt_bias = in.dt_bias.grad_ptr<Real>(),
          .state = data_or_null<Real>(state),
          .y = y.ptr<Real>(),
          .dy = y.grad_ptr<Real>()};
}

// What the float kernels keep from forward to backward.
struct Chunks {
  const int64_t* first = nullptr;
  Tensor states;
};

Chunks make_chunks(Arena& arena, const ScanArgs<float>& args) {
  auto* first = static_cast<int64_t*>(
      arena.allocate(args.segments.count * static_cast<int64_t>(sizeof(int64_t))));
  int64_t count = 0;
  for (int64_t s = 0; s < args.segments.count; ++s) {
    first[s] = count;
    count += (args.segments.length(s) + kScanChunk - 1) / kScanChunk;
  }
  return {first, arena.empty(Dtype::kF32, {count, args.states, args.channels})};
}

ScanKernel kernel_args(Arena& arena, const ScanArgs<float>& args, const Chunks& chunks) {
  auto* start = static_cast<int64_t*>(
      arena.allocate((args.channels + 1) * static_cast<int64_t>(sizeof(int64_t))));
  int64_t blocks = 0;
  scan_blocks({args.channels, args.b_groups, args.c_groups, start, &blocks});
  // A piece of work should outweigh handing it to a thread.
  constexpr int64_t kLeastWork = 1 << 13;
  const int64_t tokens = args.segments.count == 0 ? 0 : args.segments.start[args.segments.count];
  const int64_t pieces = std::min({blocks, 1 + tokens * args.channels * args.states / kLeastWork,
                                   std::max<int64_t>(4 * num_threads(), 16)});
  return {.op = args,
          .first_chunk = chunks.first,
          .chunk_states = data_or_null<float>(chunks.states),
          .block_start = start,
          .blocks = blocks,
          .pieces = pieces,
          .scratch = arena.empty(Dtype::kF32, {pieces * scan_scratch(args.states)}).ptr<float>(),
          .db_blocks = nullptr,
          .dc_blocks = nullptr};
}

void backward(Arena& arena, const ScanArgs<float>& args, const Chunks& chunks, int64_t tokens) {
  ScanKernel kernel = kernel_args(arena, args, chunks);
  const auto parts = [&](const ScanRows<float>& input) {
    return input.grad == nullptr
               ? nullptr
               : arena.empty(Dtype::kF32, {tokens, kernel.blocks, scan_padded(args.states)})
                     .ptr<float>();
  };
  kernel.db_blocks = parts(args.b);
  kernel.dc_blocks = parts(args.c);
  selective_scan_backward(kernel);
}

}  // namespace

Tensor selective_scan(Context& ctx, const SelectiveScanInputs& inputs, const Segments& segments,
                      const Tensor& state) {
  require_cpu("selective_scan", inputs.u);
  check(inputs);
  const Tensor& u = inputs.u;
  expect_segments("selective_scan", segments, u.dim(0), state, u.dtype,
                  {u.dim(1), inputs.a_log.dim(1)});
  const bool differentiate = ctx.differentiate(u, inputs.dt, inputs.b, inputs.c, inputs.z,
                                               inputs.a_log, inputs.d, inputs.dt_bias);
  const Tensor y = ctx.result_like(u, differentiate);
  if (!ctx.use_reference(u)) {
    const auto args = make_args<float>(inputs, segments.walk(), state, y);
    // The states at chunk starts, the first included, are all that backward needs.
    const Chunks chunks = differentiate ? make_chunks(*ctx.arena, args) : Chunks{};
    {
      const ArenaScope scope(*ctx.arena);
      selective_scan_forward(kernel_args(*ctx.arena, args, chunks));
    }
    if (differentiate) {
      ctx.tape->record([arena = ctx.arena, args, chunks, tokens = u.dim(0)] {
        backward(*arena, args, chunks, tokens);
      });
    }
    return y;
  }
  const Tensor initial = differentiate ? copy_initial_state(ctx, segments, state) : Tensor{};
  if (u.dtype == Dtype::kF64) {
    reference::selective_scan_forward(make_args<double>(inputs, segments.walk(), state, y));
  } else {
    reference::selective_scan_forward(make_args<float>(inputs, segments.walk(), state, y));
  }
  if (differentiate) {
    SegmentWalk walk = segments.walk();
    walk.slot = nullptr;
    ctx.tape->record([inputs, walk, initial, y] {
      if (y.dtype == Dtype::kF64) {
        reference::selective_scan_backward(make_args<double>(inputs, walk, initial, y));
      } else {
        reference::selective_scan_backward(make_args<float>(inputs, walk, initial, y));
      }
    });
  }
  return y;
}

}  // namespace cambium
