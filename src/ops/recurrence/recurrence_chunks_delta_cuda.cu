// Chunks with one decay a head and the delta rule (Gated DeltaNet). In the notation of
// recurrence_chunks_cuda.cu, with T = (I + A)^-1:
//
//   e = T (v - exp(G) k S)      y = exp(G) q S + P e      S = exp(G_last) S + k' (f e)
//
// with f = exp(G_last - G) w. T is applied to what k has read of the state, not to k and v before:
// then all that a chunk takes beside q, k and v is two triangles of 64 x 64 a head.
//
// 1. prepare_kernel, for all chunks and heads at once: P, T - I and what becomes of the decays.
// 2. walk_kernel, whose blocks take their work in turn. The first ones walk: a block for each
//    segment, head and 16 or 32 columns of the value, over the chunks. It leaves e and the states
//    at chunk starts. The others read: y of a chunk and two heads each, as soon as those that walk
//    have left what it takes. So where the heads of a few sequences occupy a part of the device,
//    the rest of it does what does not wait for the chunk before. That one who waits has all it
//    waits for at work before it, the order of turns makes sure, whatever the device holds at once.
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

/// What the kernels hand on, per chunk and head; the tiles of triangles as pair_tile() counts them.
struct DeltaParts {
  Tile* pairs;        // (kPairTiles), (tokens, tokens), left: P
  Tile* inverse;      // (kPairTiles), (tokens, tokens), right: T - I
  DeltaGates* gates;  // ()
  Tile* states;       // (V / 16, K / 16), (value, key), left: the state at the start
  Tile* errors;       // (V / 16, 4), (value, tokens), left: e
  int32_t* walked;    // (segments, heads, slices): chunks of which states and errors are there
  int32_t* turn;      // how many blocks of walk_kernel have begun
};

template <int kKey>
struct PrepareShared {
  union {
    bf16 q[kC * (kKey + 8)];
    float x[kC * kInversePad];  // A, when q is used up
  };
  bf16 k[kC * (kKey + 8)];
  float sums[kC];  // G in units of log 2
  float weight[kC];
};

template <int kKey>
__global__ void __launch_bounds__(128)
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
  const int64_t key_offset = a.key_head(h) * kKey;
  copy_rows<kKey, 128>(a.q.at(span.token, key_offset), a.q.rows.outer_stride, span.tokens, thread,
                       s.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_offset), a.k.rows.outer_stride, span.tokens, thread,
                       s.k);
  commit_copies();
  if (thread < 32) {
    float sums[2] = {log_decay_of(a, span.token, span.tokens, 2 * thread, h),
                     log_decay_of(a, span.token, span.tokens, 2 * thread + 1, h)};
    sum_decays(sums);
    s.sums[2 * thread] = sums[0] * kLog2E;
    s.sums[2 * thread + 1] = sums[1] * kLog2E;
  } else if (thread >= kC) {
    s.weight[thread - kC] = weight_of(a, span.token, span.tokens, thread - kC, h);
  }
  wait_for_copies<0>();
  __syncthreads();
  const int64_t part = chunk * a.heads + h;
  const float last = s.sums[kC - 1];
  DeltaGates& gates = parts.gates[part];
  if (thread < kC) {
    gates.ends[thread] = fast_exp2(last - s.sums[thread]) * s.weight[thread];
  } else {
    gates.starts[thread - kC] = fast_exp2(s.sums[thread - kC]);
  }
  if (thread == 0) {
    gates.decay = fast_exp2(last);
  }
  const int warp = thread / 32;
  float p[kRowTiles][2][4] = {};
  float r[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t query[4];
    uint32_t key[4];
    load_left(s.q + 16 * warp * kRow + 16 * t, kRow, query);
    load_left(s.k + 16 * warp * kRow + 16 * t, kRow, key);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(s.k + 16 * j * kRow + 16 * t, kRow, right);
        multiply_tiles(p[j], query, right);
        multiply_tiles(r[j], key, right);
      }
    }
  }
  __syncthreads();  // q is used up
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
    if (j <= warp) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 16 * warp + tile_row(e);
          const int column = 16 * j + tile_column(n, e);
          const float decay =
              column <= i ? fast_exp2(s.sums[i] - s.sums[column]) * s.weight[column] : 0.0F;
          p[j][n][e] *= decay;
          s.x[i * kInversePad + column] = column < i ? decay * r[j][n][e] : 0.0F;
        }
      }
      uint32_t tile[4];
      round_left(p[j], tile);
      store_tile(parts.pairs + part * kPairTiles + pair_tile(warp, j), tile);
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
// shared memory. Four more fetch what chunks take, some chunks ahead. One more tells those who read
// how far the walk is: that takes a fence of the whole device, which lasts as long as a chunk and
// longer, so that nobody whom the walk waits for may stand at it.
constexpr int kStages = 5;
constexpr int kWalkThreads = 288;
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

/// Barrier of the warps that walk and those that fetch.
__device__ __forceinline__ void sync_walk() {
  sync_threads(2, 256);
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

/// The warps that fetch, and say how many chunks are done. Barriers are those of walk().
template <int kKey, int kParts>
__device__ __forceinline__ void fetch_chunks(const Recurrence<bf16>& a, const DeltaParts& parts,
                                             const WalkPlace& at, int32_t* done,
                                             WalkShared<kKey, kParts>& s) {
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const bf16* k = a.k.at(0, a.key_head(at.h) * kKey);
  const bf16* v = a.v.at(0, at.h * a.dim + at.slice * 16 * kParts);
  const auto fetch = [&](int c) {
    if (c < at.count) {
      auto& stage = s.stage[c % kStages];
      const int64_t token = at.token(c);
      const int tokens = at.tokens(c);
      const int64_t part = (at.first + c) * a.heads + at.h;
      copy_rows<kKey, 128>(k + token * a.k.rows.outer_stride, a.k.rows.outer_stride, tokens, thread,
                           stage.k);
      copy_rows<16 * kParts, 128>(v + token * a.v.rows.outer_stride, a.v.rows.outer_stride, tokens,
                                  thread, stage.v);
      const auto copy = [&](auto* to, const auto* from) {
        constexpr int kPieces = sizeof(*to) / 16;
#pragma unroll
        for (int x = 0; x < kPieces; x += 128) {
          if (x + thread < kPieces) {
            copy_16(reinterpret_cast<uint4*>(to) + x + thread,
                    reinterpret_cast<const uint4*>(from) + x + thread, true);
          }
        }
      };
      copy(&stage.inverse, parts.inverse + part * kPairTiles);
      copy(&stage.gates, parts.gates + part);
    }
    commit_copies();
  };
  for (int c = 0; c < kStages - 1; ++c) {
    fetch(c);
  }
  wait_for_copies<kStages - 2>();
  sync_walk();
  for (int c = 0; c < at.count; ++c) {
    wait_for_copies<kStages - 3>();  // chunk c + 1 is there
    sync_walk();
    if (thread == 0) {  // not by who walks: the order it asks for waits for what was written
      publish_in_block(done, c);
    }
    fetch(c + kStages - 1);
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
  sync_walk();
  for (int c = 0; c < at.count; ++c) {
    const auto& stage = s.stage[c % kStages];
    uint32_t keys[kKeyTiles][4];  // of the warp's tokens
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
      load_right_of_rows(stage.k + 16 * warp * kRow + 16 * t, kRow, keys[t]);
    }
    uint32_t inverse[kRowTiles][4];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        load_tile(&stage.inverse[pair_tile(warp, j)], inverse[j]);
      }
    }
    float start[2][2];
    float end[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_n<2>(stage.gates.starts + 16 * warp + tile_column(n, 0), start[n]);
      load_n<2>(stage.gates.ends + 16 * warp + tile_column(n, 0), end[n]);
    }
    const float decay = stage.gates.decay;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
        uint32_t tile[4];
        round_left(state[p][t], tile);
        store_tile(&s.states[p][key_tile + t], tile);
        store_tile(states_at + p * kKeyTiles + t, tile);
      }
    }
    states_at += a.heads * dim_tiles * kKeyTiles;
    if (kept.states != nullptr) {
      float* to = kept.states + (part + c * a.heads) * kKey * a.dim;
      each([&](float x, int64_t i) { to[i] = x; });
    }
    sync_walk();  // states are there, and the next chunk's stage
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
        uint32_t values[4];
        load_right(stage.v + 16 * warp * Shared::kValueRow + 16 * p, Shared::kValueRow, values);
        widen_right(values, e[p]);
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
    uint32_t own_keys[kOwn][kRowTiles][4];  // of all tokens
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        load_right(stage.k + 16 * j * kRow + 16 * (key_tile + t), kRow, own_keys[t][j]);
      }
    }
    sync_threads(1, 128);
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
    each([&](float& x, int64_t) { x *= decay; });
    sync_threads(1, 128);
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
  Tile pairs[kPairTiles];
  float starts[kC];
};

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
  copy_rows<kKey, 128>(a.q.at(span.token, a.key_head(h) * kKey), a.q.rows.outer_stride, span.tokens,
                       thread, s.q);
  for (int x = thread; x < kPairTiles * 32; x += 128) {
    copy_16(&s.pairs[x / 32].lane[x % 32], &parts.pairs[part * kPairTiles + x / 32].lane[x % 32],
            true);
  }
  if (thread < kC / 4) {
    copy_16(s.starts + 4 * thread, parts.gates[part].starts + 4 * thread, true);
  }
  commit_copies();
  if (thread < kSlices) {  // one warp asks: the numbers lie together
    await_more_than(parts.walked + (span.segment * a.heads + h) * kSlices + thread,
                    static_cast<int32_t>(chunk - first[span.segment]));
  }
  wait_for_copies<0>();
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
    const float start[2] = {s.starts[16 * i + tile_row(0)], s.starts[16 * i + tile_row(2)]};
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
    if (threadIdx.x < 128) {
      walk<kKey, kParts>(a, kept, parts, at, &done, s);
    } else if (threadIdx.x < 256) {
      fetch_chunks<kKey, kParts>(a, parts, at, &done, s);
    } else if (threadIdx.x == 256) {
      tell_walked(&done, at.count, parts.walked + turn);
    }
  } else if (threadIdx.x < 256) {
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
      .pairs = scratch<Tile>(on, count * kPairTiles),
      .inverse = scratch<Tile>(on, count * kPairTiles),
      .gates = scratch<DeltaGates>(on, count),
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
