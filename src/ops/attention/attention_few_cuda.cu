// Attention forward of few rows (decode) in bf16 on tensor cores: bound by reading keys and values,
// once for all heads of a group. As many blocks as the device holds share all keys evenly, so that
// none is left to run alone (batch-invariant: parts of fixed keys, dealt to them). A block takes
// pieces of row tiles one after the other; its warps divide the keys of a piece by chunks of a few
// keys, and each has a ring of chunks of its own in shared memory: warps wait for each other only
// where their results are added, in their order, at the end of a piece. The ring goes on across
// pieces: while one is finished the keys of the next are on their way. Whoever is done last with a
// row tile adds up its parts, in their order.
#include <algorithm>

#include "ops/attention/attention_few_copies.cuh"
#include "ops/shared_limit.h"

namespace cambium::cuda::attention {
namespace {

/// A row tile whose keys were split: where its partial results and its rows are.
struct Split {
  int first_partial, count;
  int start, first_row, rows;

  __device__ __forceinline__ void set(const Piece& piece, const Block& b) {
    first_partial = piece.first_partial;
    count = piece.count;
    start = b.start;
    first_row = b.tile.first_row;
    rows = b.rows;
  }
};

/// The rows of a tile from its partial results, added in the order of the parts. kLanes lanes have
/// a row, four numbers each, so that all rows of a tile of few dims are added at once: a block does
/// this while no other waits for it, and what it waits for is how long it takes to bring the parts.
template <class F>
__device__ void add_parts(const FewArgs<typename F::E>& a, const Split& split, int kv_head) {
  constexpr int kLanes = F::kDim <= 64 ? 16 : 32;
  // Parts that are on their way together, as far as there are registers.
  constexpr int kTogether = kLanes == 16 && sizeof(typename F::E) == 2 ? 16 : 8;
  const int value_dim = a.layout.value_dim;
  const int64_t step = int64_t{a.layout.kv_heads} * kFewRows;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int rows = min(F::kQueries, split.rows - split.first_row);
  for (int base_row = 0; base_row < rows; base_row += F::kThreads / kLanes) {
    // The lanes of a warp go together: those of no row read another's and keep nothing.
    const int r = base_row + static_cast<int>(threadIdx.x) / kLanes;
    const bool exists = r < rows;
    const int64_t first = (int64_t{split.first_partial} * a.layout.kv_heads + kv_head) * kFewRows +
                          (exists ? r : base_row);
    float largest = -INFINITY;
#pragma unroll 4
    for (int i = lane; i < split.count; i += kLanes) {
      largest = fmaxf(largest, __ldcg(a.partials.largest + first + i * step));
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, lanes));
    }
    for (int first_dim = 0; first_dim < value_dim; first_dim += 4 * kLanes) {
      // Lane i has the factor of part i of kLanes, and four numbers of the row.
      const int d = first_dim + 4 * lane;
      float sum = 0.0F;
      float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      for (int base = 0; base < split.count; base += kLanes) {
        const int count = min(kLanes, split.count - base);
        float factor = 0.0F;
        float of_part = 0.0F;
        if (lane < count) {
          const int64_t at = first + (base + lane) * step;
          factor = __ldcg(a.partials.largest + at);
          of_part = __ldcg(a.partials.sum + at);
        }
#pragma unroll 1
        for (int i = 0; i < kLanes; i += kTogether) {
          float4 y[kTogether];
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            y[j] = i + j < count && d < value_dim
                       ? __ldcg(reinterpret_cast<const float4*>(
                             a.partials.y + (first + (base + i + j) * step) * value_dim + d))
                       : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
          }
          if (i == 0) {
            factor = lane < count ? fast_exp2(factor - largest) : 0.0F;
            sum = fmaf(of_part, factor, sum);
          }
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            const float f = __shfl_sync(0xffffffffU, factor, i + j, kLanes);
            total.x = fmaf(y[j].x, f, total.x);
            total.y = fmaf(y[j].y, f, total.y);
            total.z = fmaf(y[j].z, f, total.z);
            total.w = fmaf(y[j].w, f, total.w);
          }
        }
      }
#pragma unroll
      for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        sum += __shfl_xor_sync(0xffffffffU, sum, lanes);
      }
      if (exists && d < value_dim) {
        const int row = split.first_row + r;
        const int head = kv_head * a.layout.group + row % a.layout.group;
        const float f = total_of(a.layout, head, largest, sum).factor;
        bf16* out = a.y.row(split.start + row / a.layout.group, head);
        *reinterpret_cast<uint2*>(out + d) =
            make_uint2(pack(total.x * f, total.y * f), pack(total.z * f, total.w * f));
      }
    }
  }
}

/// Makes what the block has written known to those who read the counter after this, and the other
/// way round. One thread calls, after a barrier of the block or before one.
__device__ __forceinline__ void fence() {
  asm volatile("fence.acq_rel.gpu;" : : : "memory");
}

/// The running softmax of a warp over its keys: number e % 2 of tile t is of query
/// 8 t + 2 (l % 4) + e % 2.
template <int kDim, int kQ, int kG>
struct Softmax {
  float largest[kQ][2];  // before the scale
  float sum[kQ][2];      // of this lane's keys
  float y[kQ][kDim / 16][4];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        largest[t][e] = -INFINITY;
        sum[t][e] = 0.0F;
      }
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          y[t][m][e] = 0.0F;
        }
      }
    }
  }
  /// Scores become probabilities, and what was summed is taken relative to the new largest score.
  /// scale: positive, for powers of two.
  __device__ __forceinline__ void add_scores(float scale, float (&s)[kG][kQ][4]) {
    float shrink[kQ][2];
    bool grows = false;
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float most = largest[t][e];
#pragma unroll
        for (int g = 0; g < kG; ++g) {
          most = fmaxf(most, fmaxf(s[g][t][e], s[g][t][e + 2]));
        }
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, lanes));
        }
        grows = grows || most != largest[t][e];
        // Nothing seen yet: any finite number keeps exp2 from -inf - -inf.
        const float base = most == -INFINITY ? 0.0F : most * scale;
        // Exactly 1 where nothing changes: what other rows do is then of no effect.
        shrink[t][e] = most == largest[t][e] ? 1.0F : fast_exp2(fmaf(largest[t][e], scale, -base));
        largest[t][e] = most;
        float added = 0.0F;
#pragma unroll
        for (int g = 0; g < kG; ++g) {
          s[g][t][e] = fast_exp2(fmaf(s[g][t][e], scale, -base));
          s[g][t][e + 2] = fast_exp2(fmaf(s[g][t][e + 2], scale, -base));
          added += s[g][t][e] + s[g][t][e + 2];
        }
        sum[t][e] = fmaf(sum[t][e], shrink[t][e], added);
      }
    }
    if (__any_sync(0xffffffffU, grows)) {
#pragma unroll
      for (int t = 0; t < kQ; ++t) {
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            y[t][m][e] *= shrink[t][e % 2];
          }
        }
      }
    }
  }
};

/// Which keys the queries of a lane see, and between which positions all of the tile's do. A tile's
/// keys are one of AttentionShape::key_ranges or of its parts.
template <int kQ>
struct Sight {
  int first[kQ][2], last[kQ][2];
  int sure_first, sure_end;

  __device__ __forceinline__ Sight(const Layout& layout, const Block& b) {
    const Tile& tile = b.tile;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto first_of = [&](int position) {
      return max(tile.end_key <= layout.sinks ? 0 : layout.reach(position), tile.first_key);
    };
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = tile.first_row + t * 8 + lane % 4 * 2 + e;
        const int position = b.first_position + row / layout.group;
        first[t][e] = first_of(position);
        last[t][e] = min(position, tile.end_key - 1);
      }
    }
    const int last_row = min(tile.first_row + kQ * 8, b.rows) - 1;
    sure_end = min(b.first_position + tile.first_row / layout.group + 1, tile.end_key);
    sure_first = first_of(b.first_position + last_row / layout.group);
  }
  /// Scores of keys that a query does not see become -inf; `begin` is the position of the first.
  template <int kG>
  __device__ __forceinline__ void mask(int begin, float (&s)[kG][kQ][4]) const {
    if (begin >= sure_first && begin + kG * 16 <= sure_end) {
      return;
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int g = 0; g < kG; ++g) {
#pragma unroll
      for (int t = 0; t < kQ; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int p = begin + g * 16 + lane / 4 + e / 2 * 8;
          const bool seen = p >= first[t][e % 2] && p <= last[t][e % 2];
          s[g][t][e] = seen ? s[g][t][e] : -INFINITY;
        }
      }
    }
  }
};

/// What warps tell each other of their results at the end of a piece.
template <int kQueries, int kWarps>
struct Results {
  float largest[kWarps][kQueries];  // times log2(e)
  float sum[kWarps][kQueries];
  const float* y[kWarps];  // (queries, kDim + 4)
  bool last;               // of the parts of a row tile
};

/// Adds the results of the warps, in their order, to the rows of the piece or to its partial
/// results.
template <class F>
__device__ __forceinline__ void add_warps(const FewArgs<typename F::E>& a, const Block& b,
                                          const Results<F::kQueries, F::kWarps>& results) {
  constexpr int kWarps = F::kWarps;
  const int value_dim = a.layout.value_dim;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int r = static_cast<int>(threadIdx.x) / 32; r < F::kQueries; r += kWarps) {
    const int row = b.tile.first_row + r;
    if (row >= b.rows) {
      break;
    }
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      largest = fmaxf(largest, results.largest[w][r]);
    }
    const float base = largest == -INFINITY ? 0.0F : largest;
    float factor[kWarps];
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = fast_exp2(results.largest[w][r] - base);
      sum = fmaf(results.sum[w][r], factor[w], sum);
    }
    const int head = b.kv_head * a.layout.group + row % a.layout.group;
    const float f = total_of(a.layout, head, base, sum).factor;
    const int64_t at = (int64_t{b.tile.partial} * a.layout.kv_heads + b.kv_head) * kFewRows + r;
    bf16* out = a.y.row(b.start + row / a.layout.group, head);
    for (int d = 4 * lane; d < value_dim; d += 128) {
      float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 y = *reinterpret_cast<const float4*>(results.y[w] + r * (F::kDim + 4) + d);
        total.x = fmaf(y.x, factor[w], total.x);
        total.y = fmaf(y.y, factor[w], total.y);
        total.z = fmaf(y.z, factor[w], total.z);
        total.w = fmaf(y.w, factor[w], total.w);
      }
      if (b.tile.partial >= 0) {
        *reinterpret_cast<float4*>(a.partials.y + at * value_dim + d) = total;
      } else {
        *reinterpret_cast<uint2*>(out + d) =
            make_uint2(pack(total.x * f, total.y * f), pack(total.z * f, total.w * f));
      }
    }
    if (b.tile.partial >= 0 && lane == 0) {
      a.partials.largest[at] = largest;
      a.partials.sum[at] = sum;
    }
  }
}

/// Block b of each key-value head takes the pieces of block b.
template <class F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks)
    few_rows(const FewArgs<typename F::E> a) {
  using E = typename F::E;
  using Keys = typename F::Keys;
  constexpr int kDim = F::kDim;
  constexpr int kQ = F::kQ;
  constexpr int kG = F::kG;
  constexpr int kStages = F::kStages;
  constexpr int kQueries = F::kQueries;
  static_assert(kQueries * (kDim + 4) * sizeof(float) <= Keys::kBytes);
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Results<kQueries, F::kWarps> results;
  const Layout& layout = a.layout;
  const int kv_head = static_cast<int>(blockIdx.x % layout.kv_heads);
  const int block = static_cast<int>(blockIdx.x / layout.kv_heads);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = warp_number();
  const auto chunk = [&](int i) {
    return Keys{reinterpret_cast<E*>(shared + (warp * kStages + i) * Keys::kBytes)};
  };
  // What the host made of the segments is there since before the kernels that came before; so are,
  // in a step, all keys and values but the call's own, which the kernel before this one writes.
  const int end_piece = a.first_piece[block + 1];
  const int first_piece = a.first_piece[block];
  Walk<F> walk(layout, a.pieces, first_piece, end_piece);
  bool waits = a.early != 0;
  if (!waits) {
    await_inputs();
  }
  Scales<F::kChunkKeys, E> scales;
  const Source<F> k(rows_of(a.k), layout.head_dim, kv_head);
  const Source<F> v(rows_of(a.v), layout.value_dim, kv_head);
  const auto copy_next = [&](int i) {
    if (walk.any()) {
      scales.read(a, kv_head, walk.row());
      copy_chunk<F>(k, v, walk.row(), chunk(i));
      walk.step();
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (waits && walk.any() && !walk.is_old()) {
      await_inputs();
      waits = false;
    }
    if (i > 0) {
      scales.put(chunk(i - 1));
    }
    copy_next(i);
  }
  if (waits) {
    await_inputs();
  }
  const float scale = positive_scale(layout);
  bool pending = false;  // the piece before is a part of a row tile, whose count is on its way
  Split split;
  const auto add_pending = [&] {
    if (pending) {
      __syncthreads();
      if (results.last) {
        add_parts<F>(a, split, kv_head);
      }
      pending = false;
    }
  };
  int next = 0;  // the chunk that is read next; the one before it in the ring is free
  const auto before = [](int i) { return i == 0 ? kStages - 1 : i - 1; };
  for (int i = first_piece; i < end_piece; ++i) {
    const Piece& piece = a.pieces[i];
    const Block b = block_of(layout, piece.tile, kv_head);
    Products<kDim, kQ, kG, E> products;
    products.load_queries(a.q, layout, b);
    const Sight<kQ> sight(layout, b);
    Softmax<kDim, kQ, kG> state;
    state.start();
    for (int p = b.tile.first_key / F::kStep * F::kStep + warp * F::kChunkKeys; p < b.tile.end_key;
         p += F::kStep) {
      scales.put(chunk(before(before(next))));
      wait_for_copies<kStages - 2>();
      __syncwarp();  // this chunk is here, the one before has been read
      copy_next(before(next));
      float s[kG][kQ][4] = {};
      products.scores(chunk(next), s);
      if (layout.scale < 0.0F) {
#pragma unroll
        for (int g = 0; g < kG; ++g) {
#pragma unroll
          for (int t = 0; t < kQ; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              s[g][t][e] = -s[g][t][e];
            }
          }
        }
      }
      sight.mask(p, s);
      state.add_scores(scale, s);
      products.add(chunk(next), s, state.y);
      next = next + 1 == kStages ? 0 : next + 1;
    }
    products.finish(state.y);
    auto* sums = reinterpret_cast<float*>(chunk(before(next)).rows);
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = t * 8 + lane % 4 * 2 + e;
        float sum = state.sum[t][e];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          sum += __shfl_xor_sync(0xffffffffU, sum, lanes);
        }
        if (b.tile.first_row + r < b.rows) {
          products.store(state.y[t], e, sums + r * (kDim + 4));
        }
        if (lane < 4) {
          const float largest = state.largest[t][e];
          results.largest[warp][r] = largest == -INFINITY ? -INFINITY : largest * scale;
          results.sum[warp][r] = sum;
        }
      }
    }
    if (lane == 0) {
      results.y[warp] = sums;
    }
    add_pending();
    __syncthreads();
    add_warps<F>(a, b, results);
    __syncthreads();
    if (piece.parts >= 0) {
      if (threadIdx.x == 0) {
        // Counts the parts that are done and starts from zero again after the last. The other warps
        // ask for it at the end of the next piece.
        fence();
        const auto parts = static_cast<unsigned>(piece.count);
        results.last = atomicInc(a.done + int64_t{piece.parts} * layout.kv_heads + kv_head,
                                 parts - 1) == parts - 1;
        fence();
      }
      pending = true;
      split.set(piece, b);
    }
  }
  add_pending();
}

template <class E>
struct Kernel {
  void (*kernel)(FewArgs<E>);
  int threads;
  size_t shared;

  int64_t resident() const { return resident_blocks(kernel, threads, shared); }
};

/// Of form F, or of the shorter one where a block may have less shared memory than F takes.
template <class F>
Kernel<typename F::E> kernel_of() {
  constexpr size_t kTaken = F::kShared + sizeof(Results<F::kQueries, F::kWarps>);
  if constexpr (kTaken > kSharedOfSm86) {
    static_assert(F::kStages > 2);
    if (kTaken > most_shared()) {
      return kernel_of<typename F::Shorter>();
    }
  }
  return {few_rows<F>, F::kThreads, F::kShared};
}

// What suits was measured. A row tile's results are the same in all forms of a dim, so that they do
// not depend on what else is in a batch: those of 16 queries differ in kQ alone.
Kernel<bf16> find_kernel(int dim, int queries, bf16 /*type*/) {
  const bool eight = queries == 8;
  switch (dim) {
    case 64:
      return eight ? kernel_of<Form<bf16, 64, 1, 4, 3, 2, 2>>()
                   : kernel_of<Form<bf16, 64, 2, 4, 3, 2, 2>>();
    case 96:
      return eight ? kernel_of<Form<bf16, 96, 1, 4, 4, 1, 2>>()
                   : kernel_of<Form<bf16, 96, 2, 4, 4, 1, 2>>();
    case 128:
      return eight ? kernel_of<Form<bf16, 128, 1, 4, 3, 1, 2>>()
                   : kernel_of<Form<bf16, 128, 2, 4, 3, 1, 2>>();
    default:
      return kernel_of<Form<bf16, 256, 1, 2, 3, 1, 2>>();
  }
}
Kernel<f8e4m3> find_kernel(int dim, int /*queries*/, f8e4m3 /*type*/) {
  switch (dim) {
    case 64:
      return kernel_of<Form<f8e4m3, 64, 1, 4, 4, 1, 4>>();
    case 96:
      return kernel_of<Form<f8e4m3, 96, 1, 4, 3, 1, 4>>();
    case 128:
      return kernel_of<Form<f8e4m3, 128, 1, 4, 2, 1, 4>>();
    default:
      return kernel_of<Form<f8e4m3, 256, 1, 4, 3, 1, 2>>();
  }
}

}  // namespace

template <class E>
FewRows<E>::FewRows(const AttentionShape& shape) {
  const int64_t widest = std::max(shape.head_dim, shape.value_dim);
  dim_ = widest <= 64 ? 64 : widest <= 96 ? 96 : widest <= 128 ? 128 : 256;
  // Keys of fp8 are half the bytes to read again for the next eight rows, and 16 sums of 256 dims
  // are too many for a warp.
  tile_rows_ = sizeof(E) == 1 || dim_ == 256 ? 8 : kFewRows;
  queries_ = 8;
  for (int64_t s = 0; s < shape.segments && tile_rows_ > 8; ++s) {
    if (is_few(shape, s) && shape.length(s) * shape.group() > 8) {
      queries_ = tile_rows_;
      break;
    }
  }
  blocks_per_head_ = static_cast<int>(
      std::max<int64_t>(find_kernel(dim_, queries_, E{}).resident() / shape.kv_heads, 1));
}

template <class E>
void FewRows<E>::launch(const FewArgs<E>& args, int64_t blocks, const Launch& on) const {
  const Kernel<E>& kernel = find_kernel(dim_, queries_, E{});
  FewArgs<E> in_step = args;
  in_step.early = on.recorder != nullptr ? 1 : 0;
  launch_ahead(on, "attention", kernel.kernel,
               dim3(static_cast<unsigned>(blocks * args.layout.kv_heads)),
               dim3(static_cast<unsigned>(kernel.threads)), kernel.shared, in_step);
}

template class FewRows<bf16>;
template class FewRows<f8e4m3>;

}  // namespace cambium::cuda::attention
