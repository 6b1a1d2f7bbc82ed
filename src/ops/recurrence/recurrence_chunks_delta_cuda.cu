// Chunks with one decay a head and the delta rule (Gated DeltaNet). In the notation of
// recurrence_chunks_cuda.cu, with T = (I + A)^-1:
//
//   e = T (v - exp(G) k S)      y = exp(G) q S + P e      S = exp(G_last) S + k' (f e)
//
// with f = exp(G_last - G) w. T is applied to what k has read of the state, not to k and v before:
// then all that the walk takes beside k and v is a triangle of 64 x 64 a head.
//
// 1. prepare_kernel, for all chunks and heads at once: T - I and what becomes of the decays. Few
//    registers and little shared memory, so that a device holds a thousand of its blocks at once.
// 2. walk_kernel, whose blocks take their work in turn. The first ones walk: a block for each
//    segment, head and 16 or 32 columns of the value, over the chunks. It leaves e and the states
//    at chunk starts. The others read: y of a chunk and two heads each, as soon as those that walk
//    have left what it takes; they make P before. So where the heads of a few sequences occupy a
//    part of the device, the rest of it does what does not wait for the chunk before. That one who
//    waits has all it waits for at work before it, the order of turns makes sure, whatever the
//    device holds at once.
#include "ops/cuda_bulk.cuh"
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

// Of a chunk and head.
struct DeltaGates {
  float starts[kC];  // exp(G)
  float ends[kC];    // f
  float decay;       // exp(G_last)
  float unused[3];   // whole pieces of 16 bytes
};

// What P takes of them.
struct PairGates {
  float sums[kC];  // G in units of log 2
  float weights[kC];
};

/// What the kernels hand on, per chunk and head; the tiles of triangles as pair_tile() counts them.
struct DeltaParts {
  Tile* inverse;        // (kPairTiles), (tokens, tokens), right: T - I
  DeltaGates* gates;    // ()
  PairGates* of_pairs;  // ()
  Tile* states;         // (V / 16, K / 16), (value, key), left: the state at the start
  Tile* errors;         // (V / 16, 4), (value, tokens), left: e
  int32_t* walked;      // (segments, heads, slices): chunks of which states and errors are there
  int32_t* turn;        // how many blocks of walk_kernel have begun
};

template <int kKey>
struct PrepareShared {
  union {
    bf16 k[kC * (kKey + 8)];
    float x[kC * kInversePad];  // A, when k is used up
  };
  PairGates gates;
};

template <int kKey>
__global__ void __launch_bounds__(128, 8)
    prepare_kernel(Recurrence<bf16> a, const ChunkSpan* spans, const int32_t* first, int slices,
                   DeltaParts parts) {
  await_inputs();
  extern __shared__ float4 shared[];
  using Shared = PrepareShared<kKey>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kRow = kKey + 8;
  const int64_t chunk = last_first(a.heads);
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0 && thread == 0) {
    *parts.turn = 0;
  }
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  if (chunk == first[span.segment] && thread < slices) {
    parts.walked[(span.segment * a.heads + h) * slices + thread] = 0;
  }
  copy_rows<kKey, 128>(a.k.at(span.token, a.key_head(h) * kKey), a.k.rows.outer_stride, span.tokens,
                       thread, s.k);
  commit_copies();
  float* sums = s.gates.sums;
  float* weights = s.gates.weights;
  if (thread < 32) {
    float of_two[2] = {log_decay_of(a, span.token, span.tokens, 2 * thread, h),
                       log_decay_of(a, span.token, span.tokens, 2 * thread + 1, h)};
    sum_decays(of_two);
    sums[2 * thread] = of_two[0] * kLog2E;
    sums[2 * thread + 1] = of_two[1] * kLog2E;
  } else if (thread >= kC) {
    weights[thread - kC] = weight_of(a, span.token, span.tokens, thread - kC, h);
  }
  wait_for_copies<0>();
  __syncthreads();
  const int64_t part = chunk * a.heads + h;
  const float last = sums[kC - 1];
  DeltaGates& gates = parts.gates[part];
  PairGates& of_pairs = parts.of_pairs[part];
  if (thread < kC) {
    gates.ends[thread] = fast_exp2(last - sums[thread]) * weights[thread];
    of_pairs.sums[thread] = sums[thread];
  } else {
    gates.starts[thread - kC] = fast_exp2(sums[thread - kC]);
    of_pairs.weights[thread - kC] = weights[thread - kC];
  }
  if (thread == 0) {
    gates.decay = fast_exp2(last);
  }
  const int warp = thread / 32;
  float r[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t key[4];
    load_left(s.k + 16 * warp * kRow + 16 * t, kRow, key);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(s.k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(r[j], key, right);
      }
    }
  }
  __syncthreads();  // k is used up
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 16 * warp + tile_row(e);
          const int column = 16 * j + tile_column(n, e);
          s.x[i * kInversePad + column] =
              column < i ? r[j][n][e] * fast_exp2(sums[i] - sums[column]) * weights[column] : 0.0F;
        }
      }
    }
  }
  float t[kRowTiles][2][4];
  invert_tiles(s.x, t);
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          t[j][n][e] = j == warp && tile_row(e) == tile_column(n, e) ? 0.0F : t[j][n][e];
        }
      }
      uint32_t tile[4];
      round_right(t[j], tile);
      store_tile(parts.inverse + part * kPairTiles + pair_tile(warp, j), tile);
    }
  }
}

// --- The walk. Four warps walk: S' (value, key), with a quarter of the keys each, and e of 16
// tokens each, in fp32 in registers; what the others multiply next they give them, rounded, through
// shared memory. A chunk is three such exchanges. A warp says that its part is there, then does
// what nobody waits for (it leaves results, loads of the next chunk what registers hold), and only
// then waits for the others. Three more warps fetch what chunks take, some chunks ahead. One thread
// tells those who read how far the walk is: that takes a fence of the whole device, which lasts as
// long as a chunk and longer, so that nobody whom the walk waits for may stand at it.
constexpr int kStages = 5;
constexpr int kWalking = 128;  // threads
constexpr int kFetching = 96;
constexpr int kWalkThreads = 256;
constexpr int kFewBlocks = 66;  // half as many as an H100 has multiprocessors

template <int kKey, int kParts>
struct WalkShared {
  static constexpr int kRow = kKey + 8;
  static constexpr int kValueRow = 16 * kParts + 8;
  struct Stage {
    bf16 k[kC * kRow];
    bf16 v[kC * kValueRow];
    Tile inverse[kPairTiles];
    DeltaGates gates;
  };
  Stage stage[kStages];
  Tile states[kParts][kKey / 16];
  Tile reads[kParts][kRowTiles];    // v - exp(G) k S
  Tile written[kParts][kRowTiles];  // f e
  // Barriers in shared memory: of stages that are full and used up, and of the three exchanges.
  uint64_t full[kStages];
  uint64_t used[kStages];
  uint64_t has_states, has_reads, has_written;
};

__device__ __forceinline__ void sync_threads(int id, int count) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(count) : "memory");
}
/// What this thread and those it met at a barrier wrote is there for who finds the number.
__device__ __forceinline__ void publish(int32_t* at, int32_t x) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(at), "r"(x) : "memory");
}
/// The same within a block, of numbers that grow, and how its counterpart finds them: atomically,
/// as no barrier lies between the two.
__device__ __forceinline__ void publish_in_block(int32_t* at, int32_t x) {
  asm volatile("red.release.cta.shared.max.s32 [%0], %1;"
               :
               : "r"(shared_address(at)), "r"(x)
               : "memory");
}
__device__ __forceinline__ int32_t find_in_block(int32_t* at) {
  int32_t x;
  asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;"
               : "=r"(x)
               : "r"(shared_address(at))
               : "memory");
  return x;
}
__device__ __forceinline__ void await_more_than(const int32_t* at, int32_t x) {
  for (;;) {
    int32_t found;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(at) : "memory");
    if (found > x) {
      return;
    }
    __nanosleep(200);
  }
}

/// A block's slice of a head and segment.
struct WalkPlace {
  int64_t segment, h, slice;
  int64_t first;  // the first chunk
  int count;      // chunks
  int64_t begin, length, position;

  __device__ WalkPlace(const Recurrence<bf16>& a, const int32_t* first_chunk, int64_t index,
                       int64_t slices)
      : segment(index / slices / a.heads), h(index / slices % a.heads), slice(index % slices) {
    first = first_chunk[segment];
    count = static_cast<int>(first_chunk[segment + 1] - first);
    begin = a.segments.begin(segment);
    length = a.segments.length(segment);
    position = a.segments.position[segment];
  }
  __device__ int64_t token(int c) const { return begin + chunk_begin(position, c); }
  __device__ int tokens(int c) const {
    const int64_t end = c + 1 == count ? length : chunk_begin(position, c + 1);
    return static_cast<int>(end - chunk_begin(position, c));
  }
};

/// One thread calls.
template <class Shared>
__device__ __forceinline__ void init_walk(Shared& s) {
  for (int i = 0; i < kStages; ++i) {
    init_barrier(&s.full[i], kFetching);
    init_barrier(&s.used[i], kWalking / 32);
  }
  for (uint64_t* barrier : {&s.has_states, &s.has_reads, &s.has_written}) {
    init_barrier(barrier, kWalking / 32);
  }
  barriers_ready();
}
/// A warp arrives.
__device__ __forceinline__ void arrive_as_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    arrive(barrier);
  }
}
/// This thread arrives when its copies so far are there.
__device__ __forceinline__ void arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
}
/// The i-th completion of a barrier, on any device.
__device__ __forceinline__ void await_completion(uint64_t* barrier, int i) {
#if __CUDA_ARCH__ >= 900
  await_phase(barrier, static_cast<uint32_t>(i) % 2);
#else
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(static_cast<uint32_t>(i) % 2)
        : "memory");
  }
#endif
}

/// The thread that tells those who read how far the walk is: `done` chunks of `count`. Where it
/// comes late it leaves numbers out.
__device__ __forceinline__ void tell_walked(int32_t* done, int count, int32_t* walked) {
  for (int32_t told = 0; told < count;) {
    const int32_t found = find_in_block(done);
    if (found > told) {
      told = found;
      publish(walked, told);
    } else {
      __nanosleep(100);
    }
  }
}

/// The warps that fetch.
template <int kKey, int kParts>
__device__ __forceinline__ void fetch_chunks(const Recurrence<bf16>& a, const DeltaParts& parts,
                                             const WalkPlace& at, WalkShared<kKey, kParts>& s) {
  using Shared = WalkShared<kKey, kParts>;
  const int thread = static_cast<int>(threadIdx.x) - kWalking;
  const bf16* k = a.k.at(0, a.key_head(at.h) * kKey);
  const bf16* v = a.v.at(0, at.h * a.dim + at.slice * 16 * kParts);
  for (int c = 0; c < at.count; ++c) {
    const int index = c % kStages;
    auto& stage = s.stage[index];
    if (c >= kStages) {
      await_completion(&s.used[index], c / kStages - 1);
    }
    const int64_t token = at.token(c);
    const int tokens = at.tokens(c);
    const int64_t part = (at.first + c) * a.heads + at.h;
    copy_pieces<kKey, kFetching>(k + token * a.k.rows.outer_stride, a.k.rows.outer_stride, tokens,
                                 kKey, thread, stage.k,
                                 [](int row, int piece) { return row * Shared::kRow + 8 * piece; });
    copy_pieces<16 * kParts, kFetching>(
        v + token * a.v.rows.outer_stride, a.v.rows.outer_stride, tokens, 16 * kParts, thread,
        stage.v, [](int row, int piece) { return row * Shared::kValueRow + 8 * piece; });
    const auto copy = [&](auto* to, const auto* from) {
      constexpr int kPieces = sizeof(*to) / 16;
#pragma unroll
      for (int x = 0; x < kPieces; x += kFetching) {
        if (x + thread < kPieces) {
          copy_16(reinterpret_cast<uint4*>(to) + x + thread,
                  reinterpret_cast<const uint4*>(from) + x + thread, true);
        }
      }
    };
    copy(&stage.inverse, parts.inverse + part * kPairTiles);
    copy(&stage.gates, parts.gates + part);
    arrive_with_copies(&s.full[index]);
  }
}

template <int kKey, int kParts>
__device__ __forceinline__ void walk(const Recurrence<bf16>& a, const RecurrenceKept& kept,
                                     const DeltaParts& parts, const WalkPlace& at, int32_t* done,
                                     WalkShared<kKey, kParts>& s) {
  using Shared = WalkShared<kKey, kParts>;
  constexpr int kRow = Shared::kRow;
  constexpr int kKeyTiles = kKey / 16;
  constexpr int kOwn = kKeyTiles / 4;  // tiles of keys of a warp
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int key_tile = warp * kOwn;
  const int64_t value_tile = at.slice * kParts;
  const int64_t dim_tiles = a.dim / 16;
  const int64_t part = at.first * a.heads + at.h;
  Tile* states_at = parts.states + (part * dim_tiles + value_tile) * kKeyTiles + key_tile;
  Tile* errors_at = parts.errors + (part * dim_tiles + value_tile) * kRowTiles + warp;
  float* slot = a.state_of(at.segment, at.h);
  const bool continues = a.segments.continues(at.segment);
  // Element e of accumulator (p, t, n) in a state (K, V).
  const auto place = [&](int p, int t, int n, int e) {
    return (16 * (key_tile + t) + tile_column(n, e)) * a.dim + 16 * (value_tile + p) + tile_row(e);
  };
  float state[kParts][kOwn][2][4];
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          f(state[p][t][x / 4][x % 4], place(p, t, x / 4, x % 4));
        }
      }
    }
  };
  each([&](float& x, int64_t i) { x = continues ? slot[i] : 0.0F; });
  // Of a chunk, in registers before it begins.
  uint32_t keys[kKeyTiles][4];  // of the warp's tokens
  uint32_t values[kParts][4];
  uint32_t inverse[kRowTiles][4];
  float start[2][2];
  float end[2][2];
  float decay;
  const auto load_keys = [&](int c) {
    const auto& stage = s.stage[c % kStages];
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
      load_right_of_rows(stage.k + 16 * warp * kRow + 16 * t, kRow, keys[t]);
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      load_right(stage.v + 16 * warp * Shared::kValueRow + 16 * p, Shared::kValueRow, values[p]);
    }
  };
  const auto load_inverse = [&](int c) {
    const auto& stage = s.stage[c % kStages];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        load_tile(&stage.inverse[pair_tile(warp, j)], inverse[j]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_n<2>(stage.gates.starts + 16 * warp + tile_column(n, 0), start[n]);
      load_n<2>(stage.gates.ends + 16 * warp + tile_column(n, 0), end[n]);
    }
    decay = stage.gates.decay;
  };
  await_completion(&s.full[0], 0);
  load_keys(0);
  load_inverse(0);
  for (int c = 0; c < at.count; ++c) {
    const bool goes_on = c + 1 < at.count;
    uint32_t own_keys[kOwn][kRowTiles][4];  // of all tokens
    {
      uint32_t tile[kParts][kOwn][4];
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int t = 0; t < kOwn; ++t) {
          round_left(state[p][t], tile[p][t]);
          store_tile(&s.states[p][key_tile + t], tile[p][t]);
        }
      }
      arrive_as_warp(&s.has_states);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int t = 0; t < kOwn; ++t) {
          store_tile(states_at + p * kKeyTiles + t, tile[p][t]);
        }
      }
    }
    states_at += a.heads * dim_tiles * kKeyTiles;
    if (kept.states != nullptr) {
      float* to = kept.states + (part + c * a.heads) * kKey * a.dim;
      each([&](float x, int64_t i) { to[i] = x; });
    }
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        load_right(s.stage[c % kStages].k + 16 * j * kRow + 16 * (key_tile + t), kRow,
                   own_keys[t][j]);
      }
    }
    await_completion(&s.has_states, c);
    float e[kParts][2][4];
    {
      float read[2][kParts][2][4] = {};  // two chains of products are half as long
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          uint32_t left[4];
          load_tile(&s.states[p][t], left);
          multiply_tiles(read[t % 2][p], left, keys[t]);
        }
      }
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        widen_right(values[p], e[p]);
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          const float sum = read[0][p][x / 4][x % 4] + read[1][p][x / 4][x % 4];
          e[p][x / 4][x % 4] = fmaf(-start[x / 4][x % 2], sum, e[p][x / 4][x % 4]);
        }
        uint32_t tile[4];
        round_left(e[p], tile);
        store_tile(&s.reads[p][warp], tile);
      }
    }
    arrive_as_warp(&s.has_reads);
    if (threadIdx.x % 32 == 0) {
      arrive(&s.used[c % kStages]);  // the warp has all it takes of it in registers
    }
    if (goes_on) {
      await_completion(&s.full[(c + 1) % kStages], (c + 1) / kStages);
      load_keys(c + 1);
    }
    await_completion(&s.has_reads, c);
    {
      float odd[kParts][2][4] = {};
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (j <= warp) {
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            uint32_t left[4];
            load_tile(&s.reads[p][j], left);
            multiply_tiles(j % 2 == 0 ? e[p] : odd[p], left, inverse[j]);
          }
        }
      }
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        float scaled[2][4];
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          e[p][x / 4][x % 4] += odd[p][x / 4][x % 4];
          scaled[x / 4][x % 4] = e[p][x / 4][x % 4] * end[x / 4][x % 2];
        }
        uint32_t tile[4];
        round_left(scaled, tile);
        store_tile(&s.written[p][warp], tile);
      }
    }
    arrive_as_warp(&s.has_written);
    each([&](float& x, int64_t) { x *= decay; });
    if (goes_on) {
      load_inverse(c + 1);
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      uint32_t tile[4];
      round_left(e[p], tile);
      store_tile(errors_at + p * kRowTiles, tile);
    }
    errors_at += a.heads * dim_tiles * kRowTiles;
    if (kept.errors != nullptr) {
      const int tokens = at.tokens(c);
      float* to = kept.errors + (at.token(c) * a.heads + at.h) * a.dim + 16 * value_tile;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int token = 16 * warp + tile_column(n, x);
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            if (token < tokens) {
              to[token * a.heads * a.dim + 16 * p + tile_row(x)] = e[p][n][x];
            }
          }
        }
      }
    }
    if (threadIdx.x == 0) {
      publish_in_block(done, c);  // what all left before they gave what they read of chunk c
    }
    await_completion(&s.has_written, c);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        uint32_t left[4];
        load_tile(&s.written[p][j], left);
#pragma unroll
        for (int t = 0; t < kOwn; ++t) {
          multiply_tiles(state[p][t], left, own_keys[t][j]);
        }
      }
    }
  }
  sync_threads(1, 128);
  if (threadIdx.x == 0) {
    publish_in_block(done, at.count);
  }
  if (slot != nullptr) {
    each([&](float x, int64_t i) { slot[i] = x; });
  }
}

// --- Those who read: four warps have a chunk and head, a quarter of the columns of the value each.
template <int kKey>
struct ReadShared {
  bf16 q[kC * (kKey + 8)];
  bf16 k[kC * (kKey + 8)];
  Tile pairs[kPairTiles];  // P, left
  PairGates gates;
};

/// The tiles of P by four warps, a row each.
template <int kKey>
__device__ __forceinline__ void make_pairs(ReadShared<kKey>& s, int warp) {
  constexpr int kRow = kKey + 8;
  float p[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t query[4];
    load_left(s.q + 16 * warp * kRow + 16 * t, kRow, query);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(s.k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(p[j], query, right);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 16 * warp + tile_row(e);
          const int column = 16 * j + tile_column(n, e);
          p[j][n][e] = column <= i
                           ? p[j][n][e] * fast_exp2(s.gates.sums[i] - s.gates.sums[column]) *
                                 s.gates.weights[column]
                           : 0.0F;
        }
      }
      uint32_t tile[4];
      round_left(p[j], tile);
      store_tile(&s.pairs[pair_tile(warp, j)], tile);
    }
  }
}

template <int kKey, int kDim, int kParts>
__device__ __forceinline__ void read(const Recurrence<bf16>& a, const ChunkSpan* spans,
                                     const int32_t* first, const DeltaParts& parts, int64_t part,
                                     ReadShared<kKey>& s) {
  constexpr int kRow = kKey + 8;
  constexpr int kKeyTiles = kKey / 16;
  constexpr int kDimTiles = kDim / 16;
  constexpr int kOwn = kDimTiles / 4;
  constexpr int kSlices = kDimTiles / kParts;
  const int64_t chunk = part / a.heads;
  const int64_t h = part % a.heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int half = static_cast<int>(threadIdx.x) / 128;
  const int value_tile = thread / 32 * kOwn;
  const int64_t key = a.key_head(h) * kKey;
  copy_rows<kKey, 128>(a.q.at(span.token, key), a.q.rows.outer_stride, span.tokens, thread, s.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key), a.k.rows.outer_stride, span.tokens, thread, s.k);
  if (thread < 2 * kC / 4) {
    copy_16(s.gates.sums + 4 * thread, parts.of_pairs[part].sums + 4 * thread, true);
  }
  commit_copies();
  wait_for_copies<0>();
  sync_threads(1 + half, 128);
  make_pairs(s, thread / 32);
  if (thread < kSlices) {  // one warp asks: the numbers lie together
    await_more_than(parts.walked + (span.segment * a.heads + h) * kSlices + thread,
                    static_cast<int32_t>(chunk - first[span.segment]));
  }
  sync_threads(1 + half, 128);
  const Tile* states = parts.states + (part * kDimTiles + value_tile) * kKeyTiles;
  const Tile* errors = parts.errors + (part * kDimTiles + value_tile) * kRowTiles;
  float y[kRowTiles][kOwn][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKeyTiles; ++t) {
    uint32_t right[kOwn][4];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      load_tile(states + n * kKeyTiles + t, right[n]);
      left_to_right(right[n]);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t left[4];
      load_left(s.q + 16 * i * kRow + 16 * t, kRow, left);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        multiply_tiles(y[i][n], left, right[n]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const float start[2] = {fast_exp2(s.gates.sums[16 * i + tile_row(0)]),
                            fast_exp2(s.gates.sums[16 * i + tile_row(2)])};
#pragma unroll
    for (int x = 0; x < 8 * kOwn; ++x) {
      y[i][x / 8][x / 4 % 2][x % 4] *= start[x % 4 / 2];
    }
  }
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    uint32_t right[kOwn][4];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      load_tile(errors + n * kRowTiles + j, right[n]);
      left_to_right(right[n]);
    }
#pragma unroll
    for (int i = j; i < kRowTiles; ++i) {
      uint32_t left[4];
      load_tile(&s.pairs[pair_tile(i, j)], left);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        multiply_tiles(y[i][n], left, right[n]);
      }
    }
  }
  store_results<kOwn>(a, span.token, span.tokens, h, h * kDim + 16 * value_tile, y);
}

template <int kKey, int kDim, int kParts>
constexpr size_t kWalkBytes = sizeof(WalkShared<kKey, kParts>) > 2 * sizeof(ReadShared<kKey>)
                                  ? sizeof(WalkShared<kKey, kParts>)
                                  : 2 * sizeof(ReadShared<kKey>);

template <int kKey, int kDim, int kParts>
__global__ void __launch_bounds__(kWalkThreads, 1)
    walk_kernel(Recurrence<bf16> a, const ChunkSpan* spans, const int32_t* first, int64_t count,
                RecurrenceKept kept, DeltaParts parts) {
  await_inputs();
  extern __shared__ float4 shared[];
  __shared__ int32_t turn;
  __shared__ int32_t done;
  if (threadIdx.x == 0) {
    done = 0;
    turn = atomicAdd(parts.turn, 1);
  }
  __syncthreads();
  constexpr int kSlices = kDim / (16 * kParts);
  const int64_t walks = a.segments.count * a.heads * kSlices;
  if (turn < walks) {
    auto& s = *reinterpret_cast<WalkShared<kKey, kParts>*>(shared);
    const WalkPlace at(a, first, turn, kSlices);
    if (!in_chunks(a.segments, at.segment)) {
      return;
    }
    if (threadIdx.x == 0) {
      init_walk(s);
    }
    __syncthreads();
    if (threadIdx.x < kWalking) {
      walk<kKey, kParts>(a, kept, parts, at, &done, s);
    } else if (threadIdx.x < kWalking + kFetching) {
      fetch_chunks<kKey, kParts>(a, parts, at, s);
    } else if (threadIdx.x == kWalking + kFetching) {
      tell_walked(&done, at.count, parts.walked + turn);
    }
  } else {
    auto* s = reinterpret_cast<ReadShared<kKey>*>(shared);
    const int half = static_cast<int>(threadIdx.x) / 128;
    const int64_t part = 2 * (turn - walks) + half;
    if (part < count * a.heads) {
      read<kKey, kDim, kParts>(a, spans, first, parts, part, s[half]);
    }
  }
}

template <int kKey, int kDim, int kParts>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
         const Launch& on) {
  constexpr int kSlices = kDim / (16 * kParts);
  static_assert(kWalkBytes<kKey, kDim, kParts> <= kForwardShared);
  const int64_t count = chunks.count * a.heads;
  const int64_t walks = a.segments.count * a.heads * kSlices;
  const DeltaParts parts{
      .inverse = scratch<Tile>(on, count * kPairTiles),
      .gates = scratch<DeltaGates>(on, count),
      .of_pairs = scratch<PairGates>(on, count),
      .states = scratch<Tile>(on, count * (kDim / 16) * (kKey / 16)),
      .errors = scratch<Tile>(on, count * (kDim / 16) * kRowTiles),
      .walked = scratch<int32_t>(on, walks),
      .turn = scratch<int32_t>(on, 1),
  };
  launch_ahead(on, "recurrence", prepare_kernel<kKey>, static_cast<unsigned>(count), 128,
               sizeof(PrepareShared<kKey>), a, chunks.span, chunks.first, kSlices, parts);
  launch_ahead(on, "recurrence", walk_kernel<kKey, kDim, kParts>,
               static_cast<unsigned>(walks + ceil_div(count, 2)), kWalkThreads,
               kWalkBytes<kKey, kDim, kParts>, a, chunks.span, chunks.first, chunks.count, kept,
               parts);
}

}  // namespace

void delta_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                  const Launch& on) {
  // With 32 columns what a chunk takes is loaded half as often; with 16 a step is shorter, which
  // is what counts while those that walk leave room for those who read.
  // Batch-invariant: always the one.
  const bool wide = on.batch_invariant || a.segments.count * a.heads * a.dim > kFewBlocks * 16;
  const auto with_dims = [&]<int kKey, int kDim>() {
    wide ? run<kKey, kDim, 2>(a, chunks, kept, on) : run<kKey, kDim, 1>(a, chunks, kept, on);
  };
  if (a.key_dim == 64) {
    a.dim == 64 ? with_dims.template operator()<64, 64>()
                : with_dims.template operator()<64, 128>();
  } else {
    a.dim == 64 ? with_dims.template operator()<128, 64>()
                : with_dims.template operator()<128, 128>();
  }
}

}  // namespace cambium::cuda
