// The pass with a decay per channel over the chunks of a segment in turn, the only part that waits
// for the chunk before. In the notation of recurrence_chunks_cuda.cu, with S transposed (V, K):
//
//   e' = U' - S' W'          S' = S' exp(G_last) + (w e') exp(G_last - G) k'
//
// A block has 16 or 32 columns of the value (rows of S') of a head. Its 4 warps share both
// products: warp w has 16 tokens of e and a quarter of the keys of S, in fp32 in registers, and
// gives the others what they multiply next, rounded, through shared memory: two barriers a chunk.
// The tiles a warp needs of W and k are its own; it loads them straight to registers as soon as
// those of the chunk before are used, and they were asked into L2 some chunks ahead.
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int64_t kAhead = 3;  // chunks

__device__ __forceinline__ void ask_into_l2(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(line)));
}

template <int kKey, int kParts, bool kDelta>
__global__ void __launch_bounds__(128) state_kernel(Recurrence<bf16> a, const int32_t* first_chunk,
                                                    RecurrenceKept kept, ChunkTiles parts) {
  constexpr int kKeyTiles = kKey / 16;
  constexpr int kOwn = kKeyTiles / 4;  // tiles of keys of a warp
  __shared__ Tile before[kDelta ? kParts : 1][kKeyTiles];
  __shared__ Tile written[kParts][kRowTiles];
  const int64_t slices = a.dim / (16 * kParts);
  const int64_t slice = blockIdx.x % slices;
  const int64_t h = blockIdx.x / slices % a.heads;
  const int64_t segment = blockIdx.x / slices / a.heads;
  if (!in_chunks(a.segments, segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int64_t first = first_chunk[segment];
  const int64_t count = first_chunk[segment + 1] - first;
  const int64_t value_tile = slice * kParts;
  const int key_tile = warp * kOwn;

  // Of a chunk, and how far that of the next is.
  const int64_t part = first * a.heads + h;
  const int64_t dim_tiles = a.dim / 16;
  const Tile* reads_at = parts.reads + (part * kRowTiles + warp) * kKeyTiles;
  const int64_t reads_step = a.heads * kRowTiles * kKeyTiles;
  const Tile* keys_at = parts.keys + (part * kKeyTiles + key_tile) * kRowTiles;
  const int64_t keys_step = a.heads * kRowTiles * kKeyTiles;
  Tile* errors_at = parts.errors + (part * dim_tiles + value_tile) * kRowTiles + warp;
  const int64_t errors_step = a.heads * dim_tiles * kRowTiles;
  Tile* states_at = parts.states + (part * dim_tiles + value_tile) * kKeyTiles + key_tile;
  const int64_t states_step = a.heads * dim_tiles * kKeyTiles;
  const float* ends_at = parts.ends + part * (kEnds + kKey);
  const float* decays_at = ends_at + kEnds;
  const int64_t ends_step = a.heads * (kEnds + kKey);

  // Of the chunk at hand, or the next where this one's are used up.
  uint32_t values[kParts][4];
  uint32_t reads[kDelta ? kKeyTiles : 1][4];
  uint32_t keys[kOwn][kRowTiles][4];
  float end[2][2];  // f of a lane's tokens
  float decay[kOwn][2][2];
  const auto load_first = [&](const Tile* errors) {
    if constexpr (kDelta) {
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
        load_tile(reads_at + t, reads[t]);
      }
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      load_tile(errors + p * kRowTiles, values[p]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_n<2>(ends_at + 16 * warp + tile_column(n, 0), end[n]);
    }
  };
  const auto load_second = [&] {
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        load_tile(keys_at + t * kRowTiles + j, keys[t][j]);
      }
    }
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_n<2>(decays_at + 16 * (key_tile + t) + tile_column(n, 0), decay[t][n]);
      }
    }
  };
  // A line a thread; the slices of a head share them out.
  constexpr int64_t kLine = 128;
  constexpr int64_t kLines = kRowTiles * kKeyTiles * sizeof(Tile) / kLine;
  const int64_t line = slice * 128 + thread;
  const bool asks = line < kLines || (kDelta && line < 2 * kLines);
  const int64_t ask_step = (line < kLines ? keys_step : reads_step) * sizeof(Tile);
  const char* ask_at =
      (line < kLines
           ? reinterpret_cast<const char*>(keys_at - key_tile * kRowTiles) + line * kLine
           : reinterpret_cast<const char*>(reads_at - warp * kKeyTiles) + (line - kLines) * kLine) +
      kAhead * ask_step;

  float s[kParts][kOwn][2][4];
  float* state = a.state_of(segment, h);
  const bool continues = a.segments.continues(segment);
  // Element e of accumulator (p, t, n) in a state (K, V).
  const auto at = [&](int p, int t, int n, int e) {
    return (16 * (key_tile + t) + tile_column(n, e)) * a.dim + 16 * (value_tile + p) + tile_row(e);
  };
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[p][t][n][e] = continues ? state[at(p, t, n, e)] : 0.0F;
        }
      }
    }
  }
  load_first(errors_at);
  load_second();
  for (int64_t c = 0; c < count; ++c) {
    const bool more = c + 1 < count;
    if (asks && c + kAhead < count) {
      ask_into_l2(ask_at);
      ask_at += ask_step;
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
        uint32_t tile[4];
        if constexpr (kDelta) {
          round_left(s[p][t], tile);
          store_tile(&before[p][key_tile + t], tile);
        }
        round_right(s[p][t], tile);
        store_tile(states_at + p * kKeyTiles + t, tile);
      }
    }
    states_at += states_step;
    if (kept.states != nullptr) {
      float* to = kept.states + (part + c * a.heads) * kKey * a.dim;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int t = 0; t < kOwn; ++t) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              to[at(p, t, n, e)] = s[p][t][n][e];
            }
          }
        }
      }
    }
    __syncthreads();  // all read what was written in the chunk before
    float e[kParts][2][4];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      widen_right(values[p], e[p]);
    }
    if constexpr (kDelta) {
      float odd[kParts][2][4] = {};  // half as long a chain of products
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          uint32_t left[4];
          load_tile(&before[p][t], left);
          multiply_tiles(t % 2 == 0 ? e[p] : odd[p], left, reads[t]);
        }
      }
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          e[p][x / 4][x % 4] += odd[p][x / 4][x % 4];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      float scaled[2][4];
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        scaled[x / 4][x % 4] = e[p][x / 4][x % 4] * end[x / 4][x % 2];
      }
      uint32_t tile[4];
      round_left(scaled, tile);
      store_tile(&written[p][warp], tile);
    }
    Tile* errors_before = errors_at;
    if (more) {
      reads_at += reads_step;
      errors_at += errors_step;
      ends_at += ends_step;
      load_first(errors_at);
    }
    if constexpr (kDelta) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        uint32_t tile[4];
        round_right(e[p], tile);
        store_tile(errors_before + p * kRowTiles, tile);
      }
      if (kept.errors != nullptr) {
        const int64_t position = a.segments.position[segment];
        const int64_t begin = chunk_begin(position, c);
        const int64_t tokens =
            (c + 1 == count ? a.segments.length(segment) : chunk_begin(position, c + 1)) - begin;
        float* to = kept.errors + ((a.segments.begin(segment) + begin) * a.heads + h) * a.dim +
                    16 * value_tile;
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
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          s[p][t][x / 4][x % 4] *= decay[t][x / 4][x % 2];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        uint32_t left[4];
        load_tile(&written[p][j], left);
#pragma unroll
        for (int t = 0; t < kOwn; ++t) {
          multiply_tiles(s[p][t], left, keys[t][j]);
        }
      }
    }
    if (more) {
      keys_at += keys_step;
      decays_at += ends_step;
      load_second();
    }
  }
  if (state != nullptr) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < kOwn; ++t) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            state[at(p, t, n, e)] = s[p][t][n][e];
          }
        }
      }
    }
  }
}

template <int kKey, int kParts>
void run(const Recurrence<bf16>& a, const int32_t* first, const RecurrenceKept& kept,
         const ChunkTiles& parts, const Launch& on) {
  const auto pass = [&](auto kernel) {
    launch(on, "recurrence", kernel,
           static_cast<unsigned>(a.segments.count * a.heads * (a.dim / (16 * kParts))), 128, 0, a,
           first, kept, parts);
  };
  a.delta ? pass(state_kernel<kKey, kParts, true>) : pass(state_kernel<kKey, kParts, false>);
}

}  // namespace

void pass_states(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                 const ChunkTiles& parts, const Launch& on) {
  // With 32 columns a tile of W and k is loaded half as often; with 16 twice the blocks have less
  // to do each, which is faster while the device is not full. Batch-invariant: one of them.
  const bool wide = on.batch_invariant || a.segments.count * a.heads * a.dim >= 64 * 32;
  if (a.key_dim == 64) {
    wide ? run<64, 2>(a, chunks.first, kept, parts, on)
         : run<64, 1>(a, chunks.first, kept, parts, on);
  } else {
    wide ? run<128, 2>(a, chunks.first, kept, parts, on)
         : run<128, 1>(a, chunks.first, kept, parts, on);
  }
}

}  // namespace cambium::cuda
