// Chunks with one decay a head and the delta rule (Gated DeltaNet). In the notation of
// recurrence_chunks_cuda.cu, with T = (I + A)^-1:
//
//   e = T (v - exp(G) k S)      y = exp(G) q S + P e      S = exp(G_last) S + k' (f e)
//
// with f = exp(G_last - G) w. T is applied to what k has read of the state, not to k and v before:
// then all that a chunk takes beside q, k and v is two triangles of 64 x 64 a head.
//
// 1. prepare_delta(), for all chunks and heads at once: P, T - I, what becomes of the decays, and k
//    as one range a chunk where heads share it (else that costs more than it gives). Where few
//    blocks walk, others of walk_kernel, the first in the order of turns, do that beside them.
// 2. walk_kernel, whose blocks take their work in turn. The first ones walk: a block for each
//    segment, head and 16 or 32 columns of the value, over the chunks. It leaves e and the states
//    at chunk starts. The others read: y of a chunk and two heads each, as soon as those that walk
//    have left what it takes. So where the heads of a few sequences occupy a part of the device,
//    the rest of it does what does not wait for the chunk before. That one who waits has all it
//    waits for at work before it, the order of turns makes sure, whatever the device holds at once.
//
// Where that is a small part, long segments are walked in pieces at once (recurrence_pieces.h). A
// later piece is walked from a state of zero, with as many columns more, v = 0, as the identity
// has: its state M at a chunk's start is what becomes of the state S that came to the piece, and
// with R = exp(G) q M + P e of those columns, y is that of the columns of the value and R S. Who
// walks the first piece makes the states that come to the others, one after another, and the last.
// Decays are at most 1 and steps of the delta rule shrink what lies along a key, so M's columns are
// never longer than the identity's, and R never than q: R is rounded to bf16 like q and S beside
// it. What is handed on is multiplied by halves of bf16, high and low, as a state is kept in fp32.
#include <algorithm>
#include <vector>

#include "ops/recurrence/recurrence_chunks_delta_fetch.cuh"
#include "ops/recurrence/recurrence_chunks_delta_prepare.cuh"
#include "ops/recurrence/recurrence_chunks_delta_read.cuh"

namespace cambium::cuda {
namespace {

constexpr int kFewBlocks = 66;  // half as many as an H100 has multiprocessors

// --- The walk (its warps: recurrence_chunks_delta_fetch.cuh).

/// A warp's tiles of a state as they lie in its registers.
template <int kOwn>
__device__ __forceinline__ void store_tiles(const float (&state)[kOwn][2][4], float4* to) {
#pragma unroll
  for (int x = 0; x < 2 * kOwn; ++x) {
    const auto& of = state[x / 2][x % 2];
    to[32 * x + threadIdx.x % 32] = make_float4(of[0], of[1], of[2], of[3]);
  }
}
__device__ __forceinline__ void load_tile_of_state(const float4* from, float (&x)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float4 of = from[32 * n + threadIdx.x % 32];
    x[n][0] = of.x;
    x[n][1] = of.y;
    x[n][2] = of.z;
    x[n][3] = of.w;
  }
}
/// A tile in halves of bf16: what `high` leaves of it is rounded to `low`.
__device__ __forceinline__ void split_left(const float (&x)[2][4], uint32_t (&high)[4],
                                           uint32_t (&low)[4]) {
  float rest[2][4];
  round_left(x, high);
  widen_left(high, rest);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    rest[i / 4][i % 4] = x[i / 4][i % 4] - rest[i / 4][i % 4];
  }
  round_left(rest, low);
}

/// From the state after the first piece that after the last: S' <- Z' + S' M', piece by piece. It
/// leaves each that comes to a piece, and says so.
template <class Form>
__device__ __forceinline__ void pass_pieces(const DeltaParts& parts, const WalkPlace<Form>& at,
                                            int32_t* done,
                                            float (&state)[Form::kParts][Form::kKeyTiles / 4][2][4],
                                            WalkShared<Form>& s) {
  constexpr int kKeyTiles = Form::kKeyTiles;
  constexpr int kParts = Form::kParts;
  constexpr int kOwn = kKeyTiles / 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int key_tile = thread / 32 * kOwn;
  const int64_t value_tile = at.slice * kParts;
  Tile* low_states = reinterpret_cast<Tile*>(&s.stage);  // no chunk is in need of it any more
  for (int64_t piece = 1; piece < at.of.count; ++piece) {
    sync_threads(1, 128);  // stages, and states of the piece before, are done with
    Tile* to = at.of.starts(parts, piece) + value_tile * kKeyTiles + key_tile;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
        uint32_t high[4];
        uint32_t low[4];
        split_left(state[p][t], high, low);
        store_tile(to + p * kKeyTiles + t, high);
        store_tile(&s.states[p][key_tile + t], high);
        store_tile(low_states + p * kKeyTiles + key_tile + t, low);
      }
    }
    // One warp asks for all walks of M and that of its own columns of Z.
    if (thread <= Form::kKeySlices) {
      const int64_t slice = thread < Form::kKeySlices ? Form::kSlices + thread : at.slice;
      await_more_than(parts.walked + at.of.walk(piece, slice),
                      static_cast<int32_t>(at.of.chunks_in(piece) - 1));
    }
    sync_threads(1, 128);
    if (thread == 0) {
      publish_in_block(done, at.count + static_cast<int>(piece) - 1);
    }
    const float4* ends = at.of.ends(parts, piece) + key_tile * kStateTile;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
        load_tile_of_state(ends + ((value_tile + p) * kKeyTiles + t) * kStateTile, state[p][t]);
      }
    }
#pragma unroll 2
    for (int j = 0; j < kKeyTiles; ++j) {
      uint32_t left[kParts][4];
      uint32_t low_left[kParts][4];
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        load_tile(&s.states[p][j], left[p]);
        load_tile(low_states + p * kKeyTiles + j, low_left[p]);
      }
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
        float of[2][4];
        uint32_t right[4];
        uint32_t low_right[4];
        load_tile_of_state(ends + ((Form::kDimTiles + j) * kKeyTiles + t) * kStateTile, of);
        split_left(of, right, low_right);
        transpose_to_right(right);
        transpose_to_right(low_right);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          multiply_tiles(state[p][t], low_left[p], right);
          multiply_tiles(state[p][t], left[p], low_right);
          multiply_tiles(state[p][t], left[p], right);
        }
      }
    }
  }
}

template <class Form>
__device__ __forceinline__ void walk(const Recurrence<bf16>& a, const RecurrenceKept& kept,
                                     const DeltaParts& parts, const WalkPlace<Form>& at,
                                     int32_t* done, WalkShared<Form>& s) {
  using Shared = WalkShared<Form>;
  constexpr int kKey = Form::kKey;
  constexpr int kParts = Form::kParts;
  constexpr int kRow = Shared::kRow;
  constexpr int kKeyTiles = Form::kKeyTiles;
  constexpr int64_t kColumnTiles = Form::kColumnTiles;
  constexpr int kOwn = kKeyTiles / 4;  // tiles of keys of a warp
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int key_tile = warp * kOwn;
  const int64_t value_tile = at.slice * kParts;
  const int64_t part = at.first * a.heads + at.of.h;
  Tile* states_at = parts.states + (part * kColumnTiles + value_tile) * kKeyTiles + key_tile;
  Tile* errors_at = parts.errors + (part * kColumnTiles + value_tile) * kRowTiles + warp;
  float* slot = a.state_of(at.of.segment, at.of.h);
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
  if (Form::kPieces && at.piece > 0) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int64_t column_tile = value_tile + p - Form::kDimTiles;  // below 0: of the value
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          const int64_t column = 16 * column_tile + tile_row(x % 4);
          const int64_t key = 16 * (key_tile + t) + tile_column(x / 4, x % 4);
          state[p][t][x / 4][x % 4] = column == key ? 1.0F : 0.0F;
        }
      }
    }
  } else {
    const bool continues = a.segments.continues(at.of.segment);
    each([&](float& x, int64_t i) { x = continues ? slot[i] : 0.0F; });
  }
  uint32_t keys[kKeyTiles][4];  // of the warp's tokens
  uint32_t inverse[kRowTiles][4];
  uint32_t values[kParts][4];
  float start[2][2];
  float end[2][2];
  float decay;
  // What a chunk takes is loaded while products of the chunk before are made: loads leave in order,
  // and none of these stands before what the other warps wait for. A barrier keeps them before the
  // products, behind which the compiler would move them.
  const auto load_rows = [&](int c) {
    const auto& stage = s.stage[c % kStages];
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
      load_right_of_rows(stage.k.row + 16 * warp * kRow + 16 * t, kRow, keys[t]);
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      load_right(stage.v + 16 * warp * Shared::kValueRow + 16 * p, Shared::kValueRow, values[p]);
    }
  };
  const auto load_gates = [&](int c) {
    const auto& stage = s.stage[c % kStages];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        load_tile(&stage.step.inverse[pair_tile(warp, j)], inverse[j]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_n<2>(stage.step.gates.starts + 16 * warp + tile_column(n, 0), start[n]);
      load_n<2>(stage.step.gates.ends + 16 * warp + tile_column(n, 0), end[n]);
    }
    decay = stage.step.gates.decay;
  };
  sync_walk();
  load_rows(0);
  load_gates(0);
  for (int c = 0; c < at.count; ++c) {
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
    states_at += a.heads * kColumnTiles * kKeyTiles;
    if (!Form::kPieces && kept.states != nullptr) {
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
    uint32_t own_keys[kOwn][kRowTiles][4];  // of all tokens
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        load_right(s.stage[c % kStages].k.row + 16 * j * kRow + 16 * (key_tile + t), kRow,
                   own_keys[t][j]);
      }
    }
    sync_threads(1, 128);
    {
      float odd[kParts][2][4] = {};
      uint32_t left[kRowTiles][kParts][4];
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (j <= warp) {
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            load_tile(&s.reads[p][j], left[j][p]);
          }
        }
      }
      load_rows(c + 1);  // after the last one: nobody uses it
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (j <= warp) {
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            multiply_tiles(j % 2 == 0 ? e[p] : odd[p], left[j][p], inverse[j]);
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
    uint32_t written[kRowTiles][kParts][4];
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        load_tile(&s.written[p][j], written[j][p]);
      }
    }
    load_gates(c + 1);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int t = 0; t < kOwn; ++t) {
          multiply_tiles(state[p][t], written[j][p], own_keys[t][j]);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      uint32_t tile[4];
      round_left(e[p], tile);
      store_tile(errors_at + p * kRowTiles, tile);
    }
    errors_at += a.heads * kColumnTiles * kRowTiles;
    if (!Form::kPieces && kept.errors != nullptr) {
      const int tokens = at.tokens(c);
      float* to = kept.errors + (at.token(c) * a.heads + at.of.h) * a.dim + 16 * value_tile;
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
  if constexpr (Form::kPieces) {
    if (at.piece > 0) {
      float4* to = at.of.ends(parts, at.piece) + (value_tile * kKeyTiles + key_tile) * kStateTile;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        store_tiles<kOwn>(state[p], to + p * kKeyTiles * kStateTile);
      }
    } else {
      pass_pieces<Form>(parts, at, done, state, s);
    }
  }
  sync_threads(1, 128);
  if (threadIdx.x == 0) {
    publish_in_block(done, at.marks());
  }
  if (at.piece == 0 && slot != nullptr) {
    each([&](float x, int64_t i) { slot[i] = x; });
  }
}

template <class Form>
constexpr size_t kWalkBytes =
    std::max({sizeof(WalkShared<Form>), 2 * sizeof(ReadShared<Form>),
              Form::kPrepares ? 2 * sizeof(PrepareShared<Form::kKey, kItemHeads>) : 0});

/// That nobody has begun and nothing is prepared.
__global__ void clear_kernel(int32_t* x, int64_t count) {
  await_inputs();
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count) {
    x[i] = 0;
  }
}

template <class Form>
__global__ void __launch_bounds__(kWalkThreads, 1)
    walk_kernel(Recurrence<bf16> a, DeltaCall call, RecurrenceKept kept, DeltaParts parts) {
  await_inputs();
  extern __shared__ float4 shared[];
  __shared__ int32_t begun;
  __shared__ int32_t done;
  __shared__ uint64_t ready[kStages];
  if (threadIdx.x == 0) {
    done = 0;
    begun = atomicAdd(parts.turn, 1);
    for (uint64_t& barrier : ready) {
      init_barrier(&barrier, 1);
    }
    barriers_ready();
  }
  __syncthreads();
  int turn = begun;
  if constexpr (Form::kPrepares) {
    // The first ones, as all others wait for what is prepared (PreparedChunks::await_next()).
    if (turn < call.workers) {
      prepare_items(a, call, parts, turn,
                    reinterpret_cast<PrepareShared<Form::kKey, kItemHeads>*>(shared));
      return;
    }
    turn -= call.workers;
  }
  const int64_t walks = call.walked_count * a.heads * Form::head_walks(call.pieces);
  if (turn < walks) {
    auto& s = *reinterpret_cast<WalkShared<Form>*>(shared);
    const WalkPlace<Form> at(a, call, turn);
    if (!at.exists()) {
      return;
    }
    if (threadIdx.x < 128) {
      walk<Form>(a, kept, parts, at, &done, s);
    } else if (threadIdx.x < 160) {
      fetch_ranges<Form>(a, call.count, parts, at, &done, ready, s);
    } else if (threadIdx.x < 192) {
      fetch_values<Form>(a, at, s);
    } else if (threadIdx.x == 192) {
      tell_walked(&done, at.marks(), parts.walked + at.of.walk(at.piece, at.slice));
    }
  } else {
    // Those who wait for a first piece to end come when nobody is left who does not.
    auto* s = reinterpret_cast<ReadShared<Form>*>(shared);
    const int half = static_cast<int>(threadIdx.x) / 128;
    const int64_t blocks = (call.count * a.heads + 1) / 2;
    const int64_t index = turn - walks;
    const bool later = index >= blocks;
    const int64_t part = 2 * (later ? index - blocks : index) + half;
    if (part < call.count * a.heads) {
      read<Form>(a, call, parts, part, later, s[half]);
    }
  }
}

/// The segments of a call that are walked chunk by chunk.
struct WalkedSegments {
  struct Key {
    int64_t segments;
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray index;            // of them among all
  std::vector<int64_t> chunks;  // of each
};

WalkedSegments walked_segments(const SegmentWalk& segments, const Launch& on) {
  std::vector<int32_t> index;
  std::vector<int64_t> chunks;
  for (int64_t s = 0; s < segments.count; ++s) {
    if (segments.length(s) >= kLeastChunked) {
      index.push_back(static_cast<int32_t>(s));
      chunks.push_back(chunks_of(segments.position[s], segments.length(s)));
    }
  }
  return {{segments.count},
          DeviceArray(index.data(), static_cast<int64_t>(index.size() * sizeof(int32_t)), on),
          std::move(chunks)};
}

/// In how many pieces at most they are walked. 1 where results must not depend on what else is in
/// the call, and where all states are kept: the gradient takes them as they are.
template <class Form>
int64_t pieces_for(const Recurrence<bf16>& a, const WalkedSegments& walked,
                   const RecurrenceKept& kept, const Launch& on) {
  if (on.batch_invariant || kept.states != nullptr) {
    return 1;
  }
  return most_pieces(walked.chunks, {.heads = a.heads,
                                     .first_blocks = Form::kSlices,
                                     .later_blocks = Form::kAllSlices,
                                     .resident_blocks = resident_blocks(
                                         walk_kernel<Form>, kWalkThreads, kWalkBytes<Form>)});
}

template <class Form>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const WalkedSegments& walked,
         int64_t pieces, const RecurrenceKept& kept, const Launch& on) {
  static_assert(kWalkBytes<Form> <= kForwardShared);
  const int64_t count = chunks.count * a.heads;
  const int64_t head_walks = Form::head_walks(pieces);
  const int64_t later = pieces > 1 ? (piece_place(chunks.count - 1) + 1) * a.heads : 0;
  const auto walked_count = static_cast<int64_t>(walked.chunks.size());
  const int64_t walks = walked_count * a.heads * head_walks;
  const int64_t items = Form::kPrepares ? chunks.count * PrepareItems(a).of_chunk : 0;
  int64_t workers = 0;
  if (items > 0) {
    const int64_t resident = resident_blocks(walk_kernel<Form>, kWalkThreads, kWalkBytes<Form>);
    // All that those who walk leave of the device, and not less than a part of it.
    workers = std::min(std::max(resident - walks, ceil_div(resident, 4)), ceil_div(items, 2));
  }
  // By what those at work tell each other how far they are.
  const int64_t walked_numbers = a.segments.count * a.heads * head_walks;
  const int64_t numbers = walked_numbers + 1 + items;
  auto* number = scratch<int32_t>(on, numbers);
  const DeltaParts parts{
      .pairs = scratch<Tile>(on, count * kPairTiles),
      .step = scratch<DeltaStep>(on, count),
      .keys = a.key_heads < a.heads ? scratch<DeltaKeys<Form::kKey>>(on, chunks.count * a.key_heads)
                                    : nullptr,
      .states = scratch<Tile>(on, count * Form::kColumnTiles * Form::kKeyTiles),
      .errors = scratch<Tile>(on, count * Form::kColumnTiles * kRowTiles),
      .walked = number,
      .turn = number + walked_numbers,
      .prepared = number + walked_numbers + 1,
      .ends = scratch<float4>(on, later * Form::kColumnTiles * Form::kKeyTiles * kStateTile),
      .starts = scratch<Tile>(on, later * Form::kDimTiles * Form::kKeyTiles),
  };
  const DeltaCall call{.first = chunks.first,
                       .span = chunks.span,
                       .walked = walked.index.as<int32_t>(),
                       .count = chunks.count,
                       .walked_count = walked_count,
                       .pieces = static_cast<int>(pieces),
                       .workers = static_cast<int>(workers)};
  if (Form::kPrepares) {
    launch_ahead(on, "recurrence", clear_kernel, static_cast<unsigned>(ceil_div(numbers, 256)), 256,
                 0, number, numbers);
  } else {
    prepare_delta(a, chunks, head_walks, parts, on);
  }
  const int64_t readers = (Form::kPieces ? 2 : 1) * ceil_div(count, 2);
  launch_ahead(on, "recurrence", walk_kernel<Form>,
               static_cast<unsigned>(workers + walks + readers), kWalkThreads, kWalkBytes<Form>, a,
               call, kept, parts);
}

}  // namespace

void delta_chunks(const Recurrence<bf16>& a, const SegmentWalk& segments,
                  const DeviceChunks& chunks, const RecurrenceKept& kept, const Launch& on) {
  const auto walked = plan_for<WalkedSegments>(segments.plans, {segments.count},
                                               [&] { return walked_segments(segments, on); });
  // With 32 columns what a chunk takes is loaded half as often; with 16 a step is shorter, which
  // is what counts while those that walk leave room for those who read.
  // Batch-invariant: always the one.
  const bool wide = on.batch_invariant ||
                    static_cast<int64_t>(walked->chunks.size()) * a.heads * a.dim > kFewBlocks * 16;
  const auto with_dims = [&]<int kKey, int kDim>() {
    using InPieces = WalkForm<kKey, kDim, 2, true>;
    const int64_t pieces = pieces_for<InPieces>(a, *walked, kept, on);
    if (pieces > 1) {
      run<InPieces>(a, chunks, *walked, pieces, kept, on);
    } else if (wide) {
      run<WalkForm<kKey, kDim, 2, false>>(a, chunks, *walked, 1, kept, on);
    } else {
      run<WalkForm<kKey, kDim, 1, false>>(a, chunks, *walked, 1, kept, on);
    }
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
