// Chunks with one decay a head and without the delta rule (Mamba-2, Lightning): what a token writes
// is w v, so that nothing of a chunk waits for the chunk before but its state. In the notation of
// recurrence_chunks_cuda.cu, with S transposed (V, K):
//
//   y = exp(G) q S + P v          S' = S' exp(G_last) + (v' f) k',  f = exp(G_last - G) w
//
// 1. gates_kernel, for all chunks and heads at once: what their gates come to, as of a head's
//    tokens these lie far apart in memory.
// 2. scan_kernel, a block for each segment, head and 64 columns of the value (80 where that is all
//    of them: with 64 and 16 each chunk would be walked twice), over the chunks in
//    turn: states never leave registers, so of the large the device's memory sees v and y alone.
//    Warps have 16 columns each, of the state and of y, and where the device can (sm_90a) the first
//    four multiply as a warpgroup, which reads q, k and P of shared memory once for all four, y'
//    then being a product from the left like the state; the others work ahead: they fetch into
//    shared memory all that a chunk takes, and make the pairs P and the decays. No warp waits for
//    memory of the device but by a barrier, some chunks after it was asked for.
//
// More keys than registers hold a state of are taken in two passes: S q and P are sums over keys,
// and what the halves of S become does not depend on each other. The first leaves its y in fp32.
#include <algorithm>

#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kColumns = 64;    // of the value, a block's, unless it has more warps
constexpr int kMostKeys = 128;  // of a pass
// Threads of a block that scans. Twelve warps do where four can multiply as a warpgroup: they then
// have more of the registers than the others.
constexpr int kThreads = 256;
constexpr int kWideThreads = 384;

// What a block may take of shared memory of devices that launch ahead (sm_90) and have
// kForwardShared.
constexpr size_t kWideShared = 227 * 1024;

// Which of the keys' passes a kernel is.
enum class Pass { kOnly, kFirst, kLast };

// Of a chunk and head.
struct ScanGates {
  float sums[kC];  // G in units of log 2
  float weights[kC];
};
constexpr int kGateHeads = 16;  // of a block

/// The gates of heads [h, end) of a chunk, kGateHeads at most, by 4 warps.
__device__ __forceinline__ void sum_gates(const Recurrence<bf16>& a, const ChunkSpan& span,
                                          int64_t h, int64_t end, ScanGates* gates) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kOwn = kGateHeads / 4;
  float sums[kOwn][2];
  float weights[kOwn][2];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t own = h + warp * kOwn + i;
    const int64_t head = own < end ? own : end - 1;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      sums[i][x] = log_decay_of(a, span.token, span.tokens, 2 * lane + x, head);
      weights[i][x] = weight_of(a, span.token, span.tokens, 2 * lane + x, head);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    sum_decays(sums[i]);
    const int64_t own = h + warp * kOwn + i;
    if (own < end) {
      const float of[2] = {sums[i][0] * kLog2E, sums[i][1] * kLog2E};
      store_n<2>(gates[own].sums + 2 * lane, of);
      store_n<2>(gates[own].weights + 2 * lane, weights[i]);
    }
  }
}

// gates (chunks, heads); a block for every chunk and kGateHeads heads.
__global__ void __launch_bounds__(128)
    gates_kernel(Recurrence<bf16> a, const ChunkSpan* spans, ScanGates* gates) {
  await_inputs();
  const int64_t parts = (a.heads + kGateHeads - 1) / kGateHeads;
  const int64_t chunk = blockIdx.x / parts;
  const int64_t h = blockIdx.x % parts * kGateHeads;
  const ChunkSpan span = spans[chunk];
  if (in_chunks(a.segments, span.segment)) {
    const int64_t end = h + kGateHeads < a.heads ? h + kGateHeads : a.heads;
    sum_gates(a, span, h, end, gates + chunk * a.heads);
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kByWarpgroup = true;
#else
constexpr bool kByWarpgroup = false;
#endif

// --- What compute capability 9.0 has: products of a warpgroup, m64n64k16, the left operand in
// registers, the right one in shared memory in rows of 128 bytes, whose pieces of 16 bytes are
// swizzled by the row.
constexpr int kSwizzledRow = 64;              // elements
constexpr int kSwizzled = kC * kSwizzledRow;  // of 64 rows

/// Registers that each thread of a warpgroup has from now on: kScanRegisters where it scans, and of
/// the last of three kAheadRegisters; that leaves the second the 168 that all begin with.
constexpr int kScanRegisters = 208;
constexpr int kAheadRegisters = 128;
[[maybe_unused]] __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kScanRegisters));
}
[[maybe_unused]] __device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kAheadRegisters));
}

/// Of (n, k) with k together, or with kTransposed of (k, n) with n together.
[[maybe_unused]] __device__ __forceinline__ uint64_t describe(const bf16* p) {
  return static_cast<uint64_t>((shared_address(p) & 0x3ffffU) >> 4) | uint64_t{1024 / 16} << 16 |
         uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}
/// d, four tiles side by side, += a b.
template <int kTransposed>
__device__ __forceinline__ void multiply_async(float (*d)[2][4], const uint32_t (&a)[4],
                                               uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
      "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
      "%27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
      : "+f"(d[0][0][0]), "+f"(d[0][0][1]), "+f"(d[0][0][2]), "+f"(d[0][0][3]), "+f"(d[0][1][0]),
        "+f"(d[0][1][1]), "+f"(d[0][1][2]), "+f"(d[0][1][3]), "+f"(d[1][0][0]), "+f"(d[1][0][1]),
        "+f"(d[1][0][2]), "+f"(d[1][0][3]), "+f"(d[1][1][0]), "+f"(d[1][1][1]), "+f"(d[1][1][2]),
        "+f"(d[1][1][3]), "+f"(d[2][0][0]), "+f"(d[2][0][1]), "+f"(d[2][0][2]), "+f"(d[2][0][3]),
        "+f"(d[2][1][0]), "+f"(d[2][1][1]), "+f"(d[2][1][2]), "+f"(d[2][1][3]), "+f"(d[3][0][0]),
        "+f"(d[3][0][1]), "+f"(d[3][0][2]), "+f"(d[3][0][3]), "+f"(d[3][1][0]), "+f"(d[3][1][1]),
        "+f"(d[3][1][2]), "+f"(d[3][1][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed));
}
/// The compiler moves no use of the tiles across.
template <int kTiles>
__device__ __forceinline__ void pin(float (&x)[kTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) {
    asm volatile("" : "+f"(x[i / 8][i / 4 % 2][i % 4]) : : "memory");
  }
}
[[maybe_unused]] __device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}
[[maybe_unused]] __device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kLeft) : "memory");
}
/// What this thread wrote to shared memory is there for products, once others met it at a barrier.
[[maybe_unused]] __device__ __forceinline__ void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}
/// Row `row` and piece `piece` of 16 bytes in kDim / 64 parts of kSwizzled elements.
__device__ __forceinline__ int swizzled_at(int row, int piece) {
  return piece / 8 * kSwizzled + row * kSwizzledRow + ((piece % 8) ^ (row % 8)) * 8;
}
/// Operands as load_left, load_right and load_right_of_rows have them, of rows [16 i, 16 i + 16)
/// and columns [16 t, 16 t + 16) of a matrix that lies so.
[[maybe_unused]] __device__ __forceinline__ void load_left_swizzled(const bf16* x, int i, int t,
                                                                    uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(a, x + swizzled_at(16 * i + lane % 16, 2 * t + lane / 16));
}
[[maybe_unused]] __device__ __forceinline__ void load_right_swizzled(const bf16* x, int i, int t,
                                                                     uint32_t (&b)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices_transposed(b, x + swizzled_at(16 * i + lane % 16, 2 * t + lane / 16));
}
[[maybe_unused]] __device__ __forceinline__ void load_right_of_rows_swizzled(const bf16* x, int i,
                                                                             int t,
                                                                             uint32_t (&b)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(b, x + swizzled_at(16 * i + lane % 8 + lane / 16 * 8, 2 * t + lane / 8 % 2));
}

template <int kKey, int kWarps, bool kWarpgroup>
struct ScanShared {
  static constexpr int kRow = kKey + 8;
  static constexpr int kKeys = kWarpgroup ? kC * kKey : kC * kRow;
  static constexpr int kStages = kWarpgroup ? 4 : 3;
  struct alignas(kWarpgroup ? 1024 : 16) Stage {
    bf16 q[kKeys];
    bf16 k[kKeys];
    bf16 v[kC * (16 * kWarps + 8)];
    ScanGates gates;
  };
  Stage stage[kStages];
  // Of two chunks: one is read while the next is made.
  bf16 square[kWarpgroup ? 2 : 1][kWarpgroup ? kSwizzled : 8];  // P, zero above the diagonal
  Tile pairs[kWarpgroup ? 1 : 2][kWarpgroup ? 1 : kPairTiles];  // or its tiles
  float starts[2][kC];                                          // exp(G)
  float ends[2][kC];                                            // exp(G_last - G) w
  float decay[2];                                               // exp(G_last)
};

// sums, of two passes: y of a block's chunks, (chunks, heads, slices, 32, 128 threads).
template <int kKey, Pass kPass, int kWarps, bool kWide>
__global__ void __launch_bounds__(kWide ? kWideThreads : kThreads, 1)
    scan_kernel(Recurrence<bf16> a, const int32_t* first_chunk, RecurrenceKept kept,
                const ScanGates* gates, float* sums) {
  await_inputs();
  extern __shared__ __align__(1024) float4 shared[];
  constexpr bool kWarpgroup = kByWarpgroup && kWide;
  constexpr int kColumns = 16 * kWarps;
  constexpr int kValuePad = kColumns + 8;
  constexpr int kScanning = 32 * kWarps;  // threads
  constexpr int kAhead = (kWide ? kWideThreads : kThreads) - kScanning;
  using Shared = ScanShared<kKey, kWarps, kWarpgroup>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kStages = Shared::kStages;
  constexpr int kKeyTiles = kKey / 16;
  constexpr int64_t kFirstKey = kPass == Pass::kLast ? kKey : 0;
  const int64_t slices = (a.dim + kColumns - 1) / kColumns;
  const int64_t slice = blockIdx.x % slices;
  const int64_t h = blockIdx.x / slices % a.heads;
  const int64_t segment = blockIdx.x / slices / a.heads;
  if (!in_chunks(a.segments, segment)) {
    return;
  }
  // The same for a warp, and known to be: products of a warpgroup are not to diverge.
  const auto first_thread = static_cast<int>(__shfl_sync(kWholeWarp, threadIdx.x, 0));
  const bool scans = first_thread < kScanning;
  const int thread = static_cast<int>(threadIdx.x) - (scans ? 0 : kScanning);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int64_t first = first_chunk[segment];
  const auto count = static_cast<int>(first_chunk[segment + 1] - first);
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const int64_t position = a.segments.position[segment];
  const int64_t key_head = a.key_head(h);
  const int64_t value = slice * kColumns + 16 * warp;  // a scanning warp's first column
  const bool has_columns = value < a.dim;
  const auto columns = static_cast<int>(a.dim - slice * kColumns);  // that there are of the block's
  const auto token_of = [&](int c) { return begin + chunk_begin(position, c); };
  const auto tokens_of = [&](int c) {
    const int64_t end = c + 1 == count ? length : chunk_begin(position, c + 1);
    return static_cast<int>(end - chunk_begin(position, c));
  };

  // --- Of the warps that work ahead.
  const auto fetch = [&](int c) {
    if (c < count) {
      auto& stage = s.stage[c % kStages];
      const int64_t token = token_of(c);
      const int tokens = tokens_of(c);
      const int64_t key = key_head * a.key_dim + kFirstKey;
      const auto copy_keys = [&](const View<bf16>& from, bf16* to) {
        copy_pieces<kKey, kAhead>(from.at(token, key), from.rows.outer_stride, tokens, kKey, thread,
                                  to, [](int row, int piece) {
                                    return kWarpgroup ? swizzled_at(row, piece)
                                                      : row * Shared::kRow + 8 * piece;
                                  });
      };
      copy_keys(a.q, stage.q);
      copy_keys(a.k, stage.k);
      copy_pieces<kColumns, kAhead>(a.v.at(token, h * a.dim + slice * kColumns),
                                    a.v.rows.outer_stride, tokens, columns, thread, stage.v,
                                    [](int row, int piece) { return row * kValuePad + 8 * piece; });
      if (thread < 32) {
        copy_16(reinterpret_cast<float4*>(&stage.gates) + thread,
                reinterpret_cast<const float4*>(&gates[(first + c) * a.heads + h]) + thread, true);
      }
    }
    commit_copies();
  };
  // Tiles [from, end) of row i of P, by a warp.
  const auto make_tiles = [&]<int i, int from, int end>(int c) {
    const auto& stage = s.stage[c % kStages];
    const int buffer = c % 2;
    const ScanGates& of = stage.gates;
    float p[end - from][2][4] = {};
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
      uint32_t query[4];
      if constexpr (kWarpgroup) {
        load_left_swizzled(stage.q, i, t, query);
      } else {
        load_left(stage.q + 16 * i * Shared::kRow + 16 * t, Shared::kRow, query);
      }
#pragma unroll
      for (int j = from; j < end; ++j) {
        uint32_t right[4];
        if constexpr (kWarpgroup) {
          load_right_of_rows_swizzled(stage.k, j, t, right);
        } else {
          load_right_of_rows(stage.k + 16 * j * Shared::kRow + 16 * t, Shared::kRow, right);
        }
        multiply_tiles(p[j - from], query, right);
      }
    }
    const float row[2] = {of.sums[16 * i + tile_row(0)], of.sums[16 * i + tile_row(2)]};
#pragma unroll
    for (int j = from; j < end; ++j) {
      float(&pair)[2][4] = p[j - from];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = 16 * j + tile_column(n, 0);
        float sum[2];
        float weight[2];
        load_n<2>(of.sums + column, sum);
        load_n<2>(of.weights + column, weight);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float x = pair[n][e] * fast_exp2(row[e / 2] - sum[e % 2]) * weight[e % 2];
          pair[n][e] = j < i || column + e % 2 <= 16 * i + tile_row(e) ? x : 0.0F;
        }
      }
      if constexpr (kWarpgroup) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            bf16* to =
                s.square[buffer] + swizzled_at(16 * i + tile_row(e), 2 * j + n) + tile_column(0, 0);
            *reinterpret_cast<uint32_t*>(to) = pack(pair[n][e], pair[n][e + 1]);
          }
        }
      } else {
        uint32_t rounded[4];
        round_left(pair, rounded);
        store_tile(&s.pairs[buffer][pair_tile(i, j)], rounded);
      }
    }
  };
  const auto make_pairs = [&](int c) {
    const int buffer = c % 2;
    const ScanGates& of = s.stage[c % kStages].gates;
    const float last = of.sums[kC - 1];
    // From the last threads on, whose warps have the fewest tiles.
    for (int x = kAhead - 1 - thread; x < 2 * kC; x += kAhead) {
      if (x < kC) {
        s.starts[buffer][x] = fast_exp2(of.sums[x]);
      } else {
        s.ends[buffer][x - kC] = fast_exp2(last - of.sums[x - kC]) * of.weights[x - kC];
      }
    }
    if (thread == kAhead - 1) {
      s.decay[buffer] = fast_exp2(last);
    }
    static_assert(kRowTiles == 4);
    if constexpr (kWide) {
      switch (warp) {
        case 0:
          return make_tiles.template operator()<3, 0, 2>(c);
        case 1:
          return make_tiles.template operator()<3, 2, 4>(c);
        case 2:
          return make_tiles.template operator()<2, 0, 2>(c);
        case 3:
          return make_tiles.template operator()<1, 0, 2>(c);
        case 4:
          return make_tiles.template operator()<2, 2, 3>(c);
        case 5:
          return make_tiles.template operator()<0, 0, 1>(c);
        default:
          return;
      }
    } else {
      switch (warp) {
        case 0:
          return make_tiles.template operator()<3, 0, 4>(c);
        case 1:
          return make_tiles.template operator()<2, 0, 3>(c);
        case 2:
          return make_tiles.template operator()<1, 0, 2>(c);
        default:
          return make_tiles.template operator()<0, 0, 1>(c);
      }
    }
  };

  // --- Of the warps that scan: S' (16 columns of the value, K).
  float state[kKeyTiles][2][4];
  float* slot = a.state_of(segment, h);
  const float skip = kPass != Pass::kFirst && a.skip.defined() ? a.skip.data[h] : 0.0F;
  const auto at = [&](int t, int n, int e) {
    return (kFirstKey + 16 * t + tile_column(n, e)) * a.dim + value + tile_row(e);
  };
  const auto scan = [&]<bool kGrouped>(int c) {
    const auto& stage = s.stage[c % kStages];
    const int buffer = c % 2;
    [[maybe_unused]] float* sums_at =
        sums + (((first + c) * a.heads + h) * slices + slice) * (kC * kColumns) + thread;
    [[maybe_unused]] float sum[kPass == Pass::kLast ? kRowTiles : 1][2][4];
    if constexpr (kPass == Pass::kLast) {
#pragma unroll
      for (int x = 0; x < 8 * kRowTiles; ++x) {
        sum[x / 8][x / 4 % 2][x % 4] = sums_at[x * kScanning];
      }
    }
    if (kept.states != nullptr && has_columns) {
      float* to = kept.states + ((first + c) * a.heads + h) * a.key_dim * a.dim;
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          to[at(t, x / 4, x % 4)] = state[t][x / 4][x % 4];
        }
      }
    }
    float y[kRowTiles][2][4];
    // The passes' sums, once y is there.
    const auto exchange = [&] {
      if constexpr (kPass != Pass::kOnly) {
#pragma unroll
        for (int x = 0; x < 8 * kRowTiles; ++x) {
          if constexpr (kPass == Pass::kFirst) {
            sums_at[x * kScanning] = y[x / 8][x / 4 % 2][x % 4];
          } else {
            y[x / 8][x / 4 % 2][x % 4] += sum[x / 8][x / 4 % 2][x % 4];
          }
        }
      }
    };
    uint32_t parts[kRowTiles][4];     // of y, the lane's pairs by row, then by columns
    if constexpr (kGrouped) {         // y' (value, tokens)
      uint32_t states[kKeyTiles][4];  // (value, key)
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        round_left(state[t], states[t]);
        scale_tile(state[t], s.decay[buffer]);
      }
#pragma unroll
      for (int x = 0; x < 8 * kRowTiles; ++x) {
        y[x / 8][x / 4 % 2][x % 4] = 0.0F;
      }
      pin(y);
      begin_products();
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        multiply_async<0>(y, states[t], describe(stage.q + t / 4 * kSwizzled + t % 4 * 16));
      }
      commit_products();
      // Meanwhile what else is multiplied.
      uint32_t values[kRowTiles][4];   // (value, tokens)
      uint32_t written[kRowTiles][4];  // the same times what is left of it at the end
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        load_right(stage.v + 16 * j * kValuePad + 16 * warp, kValuePad, values[j]);
        left_to_right(values[j]);
        float v[2][4];
        widen_left(values[j], v);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float end[2];
          load_n<2>(&s.ends[buffer][16 * j + tile_column(n, 0)], end);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            v[n][e] *= end[e % 2];
          }
        }
        round_left(v, written[j]);
      }
      wait_for_products<0>();
      pin(y);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        float v[2][4];
        widen_left(values[i], v);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float start[2];
          load_n<2>(&s.starts[buffer][16 * i + tile_column(n, 0)], start);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            y[i][n][e] = fmaf(start[e % 2], y[i][n][e], skip * v[n][e]);
          }
        }
      }
      pin(y);
      pin(state);
      begin_products();
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        multiply_async<0>(y, values[j], describe(s.square[buffer] + 16 * j));
      }
      commit_products();
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int part = 0; part < kKey / 64; ++part) {
          multiply_async<1>(state + 4 * part, written[j],
                            describe(stage.k + part * kSwizzled + 16 * j * kSwizzledRow));
        }
      }
      commit_products();
      wait_for_products<1>();
      pin(y);
      exchange();
      if constexpr (kPass != Pass::kFirst) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float* of = &y[i][x / 2][x % 2 * 2];
            parts[i][x] = transpose_matrix(pack(of[0], of[1]));
          }
        }
      }
    } else {
#pragma unroll
      for (int x = 0; x < 8 * kRowTiles; ++x) {
        y[x / 8][x / 4 % 2][x % 4] = 0.0F;
      }
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        uint32_t right[4];
        round_right(state[t], right);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          uint32_t left[4];
          if constexpr (kWarpgroup) {
            load_left_swizzled(stage.q, i, t, left);
          } else {
            load_left(stage.q + 16 * i * Shared::kRow + 16 * t, Shared::kRow, left);
          }
          multiply_tiles(y[i], left, right);
        }
      }
      uint32_t values[kRowTiles][4];  // (value, tokens)
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        load_right(stage.v + 16 * j * kValuePad + 16 * warp, kValuePad, values[j]);
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const float start[2] = {s.starts[buffer][16 * i + tile_row(0)],
                                s.starts[buffer][16 * i + tile_row(2)]};
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          y[i][x / 4][x % 4] *= start[x % 4 / 2];
        }
      }
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int i = j; i < kRowTiles; ++i) {
          uint32_t left[4];
          if constexpr (kWarpgroup) {
            load_left_swizzled(s.square[buffer], i, j, left);
          } else {
            load_tile(&s.pairs[buffer][pair_tile(i, j)], left);
          }
          multiply_tiles(y[i], left, values[j]);
        }
      }
      const float decay = s.decay[buffer];
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        scale_tile(state[t], decay);
      }
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        float written[2][4];
        widen_right(values[j], written);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float end[2];
          load_n<2>(&s.ends[buffer][16 * j + tile_column(n, 0)], end);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            written[n][e] *= end[e % 2];
          }
        }
        uint32_t left[4];
        round_left(written, left);
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t) {
          uint32_t right[4];
          if constexpr (kWarpgroup) {
            load_right_swizzled(stage.k, j, t, right);
          } else {
            load_right(stage.k + 16 * j * Shared::kRow + 16 * t, Shared::kRow, right);
          }
          multiply_tiles(state[t], left, right);
        }
      }
      exchange();
      const bf16* v = stage.v + tile_row(0) * kValuePad + 16 * warp + tile_column(0, 0);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float* of = &y[i][x % 2][x / 2 * 2];
          float of_v[2];
          load_n<2>(v + (16 * i + x / 2 * 8) * kValuePad + x % 2 * 8, of_v);
          parts[i][x] = pack(fmaf(skip, of_v[0], of[0]), fmaf(skip, of_v[1], of[1]));
        }
      }
    }
    // Of the quads of lanes that have rows r and r + 8 of y in parts, each lane stores 16 bytes.
    if constexpr (kPass != Pass::kFirst) {
      const int tokens = has_columns ? tokens_of(c) : 0;
      const int row = tile_row(0) + lane % 4 / 2 * 8;
      bf16* to = a.y.at(token_of(c) + row, h * a.dim + value + lane % 2 * 8);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        transpose_quad(parts[i]);
        if (16 * i + row < tokens) {
          *reinterpret_cast<uint4*>(to) =
              make_uint4(parts[i][0], parts[i][1], parts[i][2], parts[i][3]);
        }
        to += 16 * a.y.rows.outer_stride;
      }
    }
    if constexpr (kGrouped) {
      wait_for_products<0>();
      pin(state);
    }
  };
  const auto scan_all = [&]<bool kGrouped>() {
    const bool continues = has_columns && a.segments.continues(segment);
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        state[t][x / 4][x % 4] = continues ? slot[at(t, x / 4, x % 4)] : 0.0F;
      }
    }
    for (int c = 1 - kStages; c < count; ++c) {
      __syncthreads();  // chunk c is there
      if (c >= 0) {
        scan.template operator()<kGrouped>(c);
      }
    }
    if (has_columns && slot != nullptr) {
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          slot[at(t, x / 4, x % 4)] = state[t][x / 4][x % 4];
        }
      }
    }
  };
  const auto work_ahead = [&] {
    if constexpr (kWarpgroup) {  // pairs are written after the next barriers
      for (int x = thread; x < 2 * kSwizzled / 8; x += kAhead) {
        reinterpret_cast<uint4*>(s.square)[x] = make_uint4(0, 0, 0, 0);
      }
    }
    for (int c = 1 - kStages; c < count; ++c) {
      wait_for_copies<kStages - 3>();  // chunk c + 1 is there
      if constexpr (kWarpgroup) {
        publish_to_products();
      }
      __syncthreads();  // chunk c - 1 is done with
      fetch(c + kStages - 1);
      if (c + 1 >= 0 && c + 1 < count) {
        make_pairs(c + 1);
      }
    }
  };
  if constexpr (kWarpgroup) {
    if (first_thread < 128) {
      take_registers();
      scan_all.template operator()<true>();
    } else if (first_thread >= 256) {
      leave_registers();
      work_ahead();
    } else if (scans) {
      scan_all.template operator()<false>();
    } else {
      work_ahead();
    }
  } else if (scans) {
    scan_all.template operator()<false>();
  } else {
    work_ahead();
  }
}

template <int kKey, Pass kPass, int kWarps = 4>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
         const ScanGates* gates, float* sums, const Launch& on) {
  constexpr size_t kPlain = sizeof(ScanShared<kKey, kWarps, false>);
  constexpr size_t kLarge = std::max(kPlain, sizeof(ScanShared<kKey, kWarps, true>));
  static_assert((kWarps > 4 || kPlain <= kForwardShared) && kLarge <= kWideShared);
  const auto blocks =
      static_cast<unsigned>(a.segments.count * a.heads * ceil_div(a.dim, 16 * kWarps));
  if (kWarps > 4 || launches_ahead()) {
    launch_ahead(on, "recurrence", scan_kernel<kKey, kPass, kWarps, true>, blocks, kWideThreads,
                 kLarge, a, chunks.first, kept, gates, sums);
  } else if constexpr (kWarps == 4) {
    launch(on, "recurrence", scan_kernel<kKey, kPass, kWarps, false>, blocks, kThreads, kPlain, a,
           chunks.first, kept, gates, sums);
  }
}

}  // namespace

bool scan_has_chunks(const Recurrence<bf16>& a) {
  return (a.key_dim == 64 || a.key_dim == kMostKeys || a.key_dim == 2 * kMostKeys) &&
         a.dim >= kColumns && a.dim % 16 == 0;
}

void scan_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const Launch& on) {
  auto* gates = scratch<ScanGates>(on, chunks.count * a.heads);
  launch_ahead(on, "recurrence", gates_kernel,
               static_cast<unsigned>(chunks.count * ceil_div(a.heads, kGateHeads)), 128, 0, a,
               chunks.span, gates);
  if (a.key_dim == 64) {
    run<64, Pass::kOnly>(a, chunks, kept, gates, nullptr, on);
  } else if (a.key_dim == kMostKeys && a.dim == 80 && launches_ahead()) {
    run<kMostKeys, Pass::kOnly, 5>(a, chunks, kept, gates, nullptr, on);
  } else if (a.key_dim == kMostKeys) {
    run<kMostKeys, Pass::kOnly>(a, chunks, kept, gates, nullptr, on);
  } else {
    auto* sums =
        scratch<float>(on, chunks.count * a.heads * ceil_div(a.dim, kColumns) * (kC * kColumns));
    run<kMostKeys, Pass::kFirst>(a, chunks, kept, gates, sums, on);
    run<kMostKeys, Pass::kLast>(a, chunks, kept, gates, sums, on);
  }
}

}  // namespace cambium::cuda
