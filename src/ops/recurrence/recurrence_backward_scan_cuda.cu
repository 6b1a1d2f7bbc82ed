// The gradients in chunks with one decay a head and no delta rule (Mamba-2), in the notation of
// recurrence_backward_keys_cuda.cu. There du needs no inverse, so that nothing but dS waits for the
// chunk after it:
//
//   du_j = sum_(i >= j) P_ij dy_i + exp(G_last - G_j) dS' k_j,   P_ij = exp(G_i - G_j) q_i . k_j
//
// 1. sums_kernel: G.
// 2. chain_kernel, over the chunks of a segment from its end: dS at the ends of chunks.
// 3. heads_kernel, for all chunks and key heads at once: everything else. A block goes through the
//    value heads that share keys, or through a share of them. It reads q and k and multiplies them
//    with each other once, and the gradients by q and k stay in registers until all have added to
//    them. Of eight warps each has 16 tokens and half of the channels; where it is about pairs of
//    tokens, and not about channels, one half has those and the other du.
#include "ops/recurrence/recurrence_backward_cuda.cuh"
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr const char* kName = "recurrence (backward)";
constexpr int kDim = 64;
constexpr int kDimTiles = kDim / 16;
constexpr int kDimRow = kDim + 8;
constexpr int64_t kBlocksWanted = 6 * 132;  // three rounds of two on each multiprocessor of an H100
constexpr int64_t kHeadsWanted = 3;         // of a block: for fewer q and k are not worth reading

// --- G of all chunks and heads, in units of log 2: (chunks, heads, 64). A warp has a chunk and
// head.
__global__ void __launch_bounds__(256)
    sums_kernel(Recurrence<bf16> a, const ChunkSpan* spans, int64_t count, float* sums) {
  const int64_t part = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (part >= count) {
    return;
  }
  const ChunkSpan span = spans[part / a.heads];
  const int64_t h = part % a.heads;
  const int i = static_cast<int>(threadIdx.x) % 32 * 2;
  float x[2] = {log_decay_of(a, span.token, span.tokens, i, h),
                log_decay_of(a, span.token, span.tokens, i + 1, h)};
  sum_decays(x);
  *reinterpret_cast<float2*>(sums + part * kC + i) = make_float2(x[0] * kLog2E, x[1] * kLog2E);
}

// --- dS at the ends of chunks: (chunks, heads, K / 16, V / 16), (key, value), left. Of four warps
// each has half of the keys and half of the values.
constexpr int kChainStages = 3;
constexpr int kChainThreads = 128;

template <int kKey>
struct ChainStage {
  bf16 q[kC * (kKey + 8)];
  bf16 dy[kC * kDimRow];
  float sums[kC];
};

template <int kKey>
__global__ void __launch_bounds__(kChainThreads)
    chain_kernel(Recurrence<bf16> a, const ChunkSpan* spans, const int32_t* first_chunk,
                 const float* sums, Tile* dstates) {
  extern __shared__ float4 shared[];
  auto* stages = reinterpret_cast<ChainStage<kKey>*>(shared);
  constexpr int kRow = kKey + 8;
  constexpr int kKeyTiles = kKey / 16;
  constexpr int kOwnKeys = kKeyTiles / 2;
  constexpr int kOwnDims = kDimTiles / 2;
  const int64_t segment = blockIdx.x / a.heads;
  const int64_t h = blockIdx.x % a.heads;
  const int64_t key_offset = a.key_head(h) * kKey;
  const int thread = static_cast<int>(threadIdx.x);
  const int key_tile = thread / 64 * kOwnKeys;
  const int dim_tile = thread / 32 % 2 * kOwnDims;
  const int first = first_chunk[segment];
  const int count = first_chunk[segment + 1] - first;
  const auto fetch = [&](int c) {
    if (c >= 0) {
      auto& stage = stages[c % kChainStages];
      const ChunkSpan span = spans[first + c];
      copy_rows<kKey, kChainThreads>(a.q.at(span.token, key_offset), a.q.rows.outer_stride,
                                     span.tokens, thread, stage.q);
      copy_rows<kDim, kChainThreads>(a.y.grad_at(span.token, h * kDim), a.heads * kDim, span.tokens,
                                     thread, stage.dy);
      if (thread < kC / 4) {
        copy_16(stage.sums + 4 * thread, sums + ((first + c) * a.heads + h) * kC + 4 * thread,
                true);
      }
    }
    commit_copies();
  };
  for (int c = 1; c < kChainStages; ++c) {
    fetch(count - c);
  }
  float ds[kOwnKeys][kOwnDims][2][4] = {};
  for (int c = count - 1; c >= 0; --c) {
    wait_for_copies<kChainStages - 2>();
    __syncthreads();
    fetch(c + 1 - kChainStages);
    const auto& stage = stages[c % kChainStages];
    Tile* to = dstates + ((first + c) * a.heads + h) * (kKeyTiles * kDimTiles);
    const float total = fast_exp2(stage.sums[kC - 1]);
#pragma unroll
    for (int t = 0; t < kOwnKeys; ++t) {
#pragma unroll
      for (int n = 0; n < kOwnDims; ++n) {
        uint32_t tile[4];
        round_left(ds[t][n], tile);
        store_tile(to + (key_tile + t) * kDimTiles + dim_tile + n, tile);
        scale_tile(ds[t][n], total);
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      float start[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        start[x] = fast_exp2(stage.sums[16 * m + tile_column(x / 2, x % 2)]);
      }
      uint32_t right[kOwnDims][4];
#pragma unroll
      for (int n = 0; n < kOwnDims; ++n) {
        load_right(stage.dy + 16 * m * kDimRow + 16 * (dim_tile + n), kDimRow, right[n]);
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          right[n][x] = scale_pair(right[n][x], start[x % 2 * 2], start[x % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int t = 0; t < kOwnKeys; ++t) {
        uint32_t left[4];
        load_left_transposed(stage.q + 16 * m * kRow + 16 * (key_tile + t), kRow, left);
#pragma unroll
        for (int n = 0; n < kOwnDims; ++n) {
          multiply_tiles(ds[t][n], left, right[n]);
        }
      }
    }
  }
}

// --- All else.
constexpr int kHeadsThreads = 256;

template <int kKey>
struct HeadsShared {
  static constexpr int kRow = kKey + 8;
  bf16 q[kC * kRow];
  bf16 k[kC * kRow];
  // Of a head. Tiles left.
  Tile states[kKey / 16][kDimTiles];   // S, (key, value)
  Tile dstates[kKey / 16][kDimTiles];  // dS
  bf16 dy[kC * kDimRow];
  bf16 v[kC * kDimRow];
  float4 products[kPairTiles][2][32];  // q . k, as accumulators hold it
  Tile pairs[kPairTiles];              // P
  Tile dpairs[kPairTiles];             // dP exp(G_i - G_j)
  float sums[kC];
  float weight[kC];
  float by_query[2][kC];              // by halves of the channels: q . the part of dq by S
  float by_key[2][kC];                // k . the part of col by dS
  float row_pairs[kC];                // sums over the pairs' q . k dP, by i
  float column_pairs[kRowTiles][kC];  // by blocks of i, and j
  float change[kRowTiles];            // exp(G_last) (S . dS), in parts
  float by_skip[kRowTiles];           // v . dy, by blocks
};

/// The left operand X to the left operand X'.
__device__ __forceinline__ void transpose_left(uint32_t (&x)[4]) {
  transpose_to_right(x);
  left_to_right(x);
}

__device__ __forceinline__ float sum_quad(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

/// S of a head, as kept (K, V), to tiles; by all warps.
template <int kKey>
__device__ __forceinline__ void round_states(const float* from, HeadsShared<kKey>& s) {
  constexpr int kTiles = kKey / 16 * kDimTiles;
  constexpr int kEach = kTiles / (kHeadsThreads / 32);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float2 x[kEach][4];
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int tile = warp * kEach + n;
    const float* at = from + (tile / kDimTiles * 16 + tile_row(0)) * kDim + tile % kDimTiles * 16 +
                      tile_column(0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[n][i] = *reinterpret_cast<const float2*>(at + i % 2 * 8 * kDim + i / 2 * 8);
    }
  }
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int tile = warp * kEach + n;
    const uint32_t rounded[4] = {pack(x[n][0].x, x[n][0].y), pack(x[n][1].x, x[n][1].y),
                                 pack(x[n][2].x, x[n][2].y), pack(x[n][3].x, x[n][3].y)};
    store_tile(&s.states[tile / kDimTiles][tile % kDimTiles], rounded);
  }
}

/// q . k of all pairs.
template <int kKey>
__device__ __forceinline__ void multiply_pairs(HeadsShared<kKey>& s) {
  constexpr int kRow = HeadsShared<kKey>::kRow;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int tile = static_cast<int>(threadIdx.x) / 32; tile < kPairTiles; tile += 8) {
    const int i = tile < 1 ? 0 : tile < 3 ? 1 : tile < 6 ? 2 : 3;
    const int j = tile - pair_tile(i, 0);
    float sum[2][4] = {};
#pragma unroll
    for (int t = 0; t < kKey / 16; ++t) {
      uint32_t left[4];
      uint32_t right[4];
      load_left(s.q + 16 * i * kRow + 16 * t, kRow, left);
      load_right_of_rows(s.k + 16 * j * kRow + 16 * t, kRow, right);
      multiply_tiles(sum, left, right);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      s.products[tile][n][lane] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
    }
  }
}

/// P and dP of the pairs whose i is in a block of 16, by a warp; and a quarter of S . dS.
template <int kKey>
__device__ __forceinline__ void make_pairs(int block, HeadsShared<kKey>& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t left[kDimTiles][4];
#pragma unroll
  for (int c = 0; c < kDimTiles; ++c) {
    load_left(s.dy + 16 * block * kDimRow + 16 * c, kDimRow, left[c]);
  }
  const float row_sums[2] = {s.sums[16 * block + tile_row(0)], s.sums[16 * block + tile_row(2)]};
  float by_row[2] = {};
  float by_skip = 0.0F;
#pragma unroll 1
  for (int m = 0; m <= block; ++m) {
    const int tile = pair_tile(block, m);
    float x[2][4] = {};
#pragma unroll
    for (int c = 0; c < kDimTiles; ++c) {
      uint32_t right[4];
      load_right_of_rows(s.v + 16 * m * kDimRow + 16 * c, kDimRow, right);
      multiply_tiles(x, left[c], right);
    }
    float p[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4 product = s.products[tile][n][lane];
      const float products[4] = {product.x, product.y, product.z, product.w};
      float by_column[2] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 16 * m + tile_column(n, e);
        const float decay = m < block || tile_column(n, e) <= tile_row(e)
                                ? fast_exp2(row_sums[e / 2] - s.sums[column])
                                : 0.0F;
        p[n][e] = decay * products[e];
        by_skip += m == block && tile_column(n, e) == tile_row(e) ? x[n][e] : 0.0F;
        x[n][e] *= decay * s.weight[column];
        const float both = x[n][e] * products[e];
        by_row[e / 2] += both;
        by_column[e % 2] += both;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          by_column[e] += __shfl_xor_sync(kWholeWarp, by_column[e], lanes);
        }
        if (lane < 4) {
          s.column_pairs[block][16 * m + tile_column(n, e)] = by_column[e];
        }
      }
    }
    uint32_t rounded[4];
    round_left(p, rounded);
    store_tile(&s.pairs[tile], rounded);
    round_left(x, rounded);
    store_tile(&s.dpairs[tile], rounded);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    by_row[i] = sum_quad(by_row[i]);
    if (lane % 4 == 0) {
      s.row_pairs[16 * block + tile_row(2 * i)] = by_row[i];
    }
  }
  float change = 0.0F;
#pragma unroll
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t state[4];
    uint32_t dstate[4];
    load_tile(&s.states[t][block], state);
    load_tile(&s.dstates[t][block], dstate);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      change = fmaf(first_of(state[i]), first_of(dstate[i]), change);
      change = fmaf(second_of(state[i]), second_of(dstate[i]), change);
    }
  }
  change = warp_sum(change);
  by_skip = warp_sum(by_skip);
  if (lane == 0) {
    s.by_skip[block] = by_skip;
    s.change[block] = change * fast_exp2(s.sums[kC - 1]);
  }
}

/// The part of du by dS, of a block of 16 tokens, by a warp.
template <int kKey>
__device__ __forceinline__ void begin_values(int block, const HeadsShared<kKey>& s,
                                             float (&du)[kDimTiles][2][4]) {
  constexpr int kRow = HeadsShared<kKey>::kRow;
#pragma unroll 2
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t left[4];
    load_left(s.k + 16 * block * kRow + 16 * t, kRow, left);
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      uint32_t right[4];
      load_tile(&s.dstates[t][n], right);
      transpose_to_right(right);
      multiply_tiles(du[n], left, right);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float end = fast_exp2(s.sums[kC - 1] - s.sums[16 * block + tile_row(2 * i)]);
#pragma unroll
    for (int n = 0; n < 2 * kDimTiles; ++n) {
      du[n / 2][n % 2][2 * i] *= end;
      du[n / 2][n % 2][2 * i + 1] *= end;
    }
  }
}

/// sum += X' rows: X the pairs' tiles of column `block`, from the diagonal down; rows of kCount
/// tiles, `stride` apart.
template <int kCount>
__device__ __forceinline__ void add_column(const Tile* pairs, const bf16* rows, int stride,
                                           int block, float (&sum)[kCount][2][4]) {
#pragma unroll 1
  for (int m = block; m < kRowTiles; ++m) {
    uint32_t left[4];
    load_tile(&pairs[pair_tile(m, block)], left);
    transpose_left(left);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      uint32_t right[4];
      load_right(rows + 16 * m * stride + 16 * n, stride, right);
      multiply_tiles(sum[n], left, right);
    }
  }
}

/// The rest of it, and the gradients by v and weight.
template <int kKey>
__device__ __forceinline__ void end_values(const Recurrence<bf16>& a, const ChunkSpan& span,
                                           int64_t h, int block, const HeadsShared<kKey>& s,
                                           float (&du)[kDimTiles][2][4]) {
  add_column<kDimTiles>(s.pairs, s.dy, kDimRow, block, du);
  const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = 16 * block + tile_row(2 * half);
    const bool exists = i < span.tokens;
    const int at = i * kDimRow + tile_column(0, 0);
    float dweight = 0.0F;
#pragma unroll
    for (int n = 0; n < 2 * kDimTiles; ++n) {
      const uint32_t v = *reinterpret_cast<const uint32_t*>(s.v + at + 8 * n);
      dweight = fmaf(du[n / 2][n % 2][2 * half], first_of(v), dweight);
      dweight = fmaf(du[n / 2][n % 2][2 * half + 1], second_of(v), dweight);
    }
    dweight = sum_quad(dweight);
    if (!exists) {
      continue;
    }
    if (a.weight.grad != nullptr && threadIdx.x % 4 == 0) {
      *a.weight.grad_at(span.token + i, h) += dweight;
    }
    if (a.v.grad != nullptr) {
      const float weight = s.weight[i];
      bf16* grad = a.v.grad_at(span.token + i, h * kDim + tile_column(0, 0));
      uint32_t before[2 * kDimTiles];
#pragma unroll
      for (int n = 0; n < 2 * kDimTiles; ++n) {
        before[n] = *reinterpret_cast<const uint32_t*>(grad + 8 * n);
      }
#pragma unroll
      for (int n = 0; n < 2 * kDimTiles; ++n) {
        const uint32_t dy = *reinterpret_cast<const uint32_t*>(s.dy + at + 8 * n);
        const float* x = &du[n / 2][n % 2][2 * half];
        *reinterpret_cast<uint32_t*>(grad + 8 * n) =
            pack(fmaf(skip, first_of(dy), fmaf(weight, x[0], first_of(before[n]))),
                 fmaf(skip, second_of(dy), fmaf(weight, x[1], second_of(before[n]))));
      }
    }
  }
}

/// sum += scale (rows of x) (tiles)', 16 tokens of `x` (64, V); `by` is what the addends' products
/// with `keys` (64, K), of the warp's half of the channels, sum up to.
template <int kKey>
__device__ __forceinline__ void add_states(const bf16* x, const Tile (&tiles)[kKey / 16][kDimTiles],
                                           const float (&scale)[2], const bf16* keys, int block,
                                           int half, float* by, float (&sum)[kKey / 32][2][4]) {
  constexpr int kRow = HeadsShared<kKey>::kRow;
  uint32_t left[kDimTiles][4];
#pragma unroll
  for (int c = 0; c < kDimTiles; ++c) {
    load_left(x + 16 * block * kDimRow + 16 * c, kDimRow, left[c]);
  }
  float dot[2] = {};
#pragma unroll
  for (int n = 0; n < kKey / 32; ++n) {
    const int tile = half * (kKey / 32) + n;
    float t[2][4] = {};
#pragma unroll
    for (int c = 0; c < kDimTiles; ++c) {
      uint32_t right[4];
      load_tile(&tiles[tile][c], right);
      left_to_right(right);
      multiply_tiles(t, left[c], right);
    }
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const int row = e % 4 / 2;
      const uint32_t key = *reinterpret_cast<const uint32_t*>(
          keys + (16 * block + tile_row(e % 4)) * kRow + 16 * tile + tile_column(e / 4, 0));
      const float t0 = t[e / 4][e % 4] * scale[row];
      const float t1 = t[e / 4][e % 4 + 1] * scale[row];
      dot[row] = fmaf(first_of(key), t0, fmaf(second_of(key), t1, dot[row]));
      sum[n][e / 4][e % 4] += t0;
      sum[n][e / 4][e % 4 + 1] += t1;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    dot[i] = sum_quad(dot[i]);
    if (threadIdx.x % 4 == 0) {
      by[16 * block + tile_row(2 * i)] = dot[i];
    }
  }
}

/// The gradient by log decay, by a warp, as the file of keys has it.
template <int kKey>
__device__ __forceinline__ void add_decay_gradients(const Recurrence<bf16>& a,
                                                    const ChunkSpan& span, int64_t h,
                                                    const HeadsShared<kKey>& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int i = 2 * lane;
  float end = s.by_key[0][i] + s.by_key[1][i] + s.by_key[0][i + 1] + s.by_key[1][i + 1];
  end = warp_sum(end) + s.change[0] + s.change[1] + s.change[2] + s.change[3];
  float change[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    change[x] = s.by_query[0][i + x] + s.by_query[1][i + x] + s.row_pairs[i + x] -
                s.by_key[0][i + x] - s.by_key[1][i + x];
#pragma unroll
    for (int b = 0; b < kRowTiles; ++b) {
      change[x] -= b >= i / 16 ? s.column_pairs[b][i + x] : 0.0F;
    }
  }
  const float both = change[0] + change[1];
  float sum = both;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float after = __shfl_down_sync(kWholeWarp, sum, lanes);
    sum += lane + lanes < 32 ? after : 0.0F;
  }
  if (i < span.tokens) {
    *a.log_decay.grad_at(span.token + i, h) += end + sum;
  }
  if (i + 1 < span.tokens) {
    *a.log_decay.grad_at(span.token + i + 1, h) += end + (sum - both + change[1]);
  }
}

/// The gradient by q or k of the warp's tokens and channels, to (T, key heads, shares, K) where
/// there are shares.
template <int kKey>
__device__ __forceinline__ void add_key_gradients(const View<bf16>& to, const ChunkSpan& span,
                                                  int64_t key_head, int64_t key_heads,
                                                  int64_t share, int64_t shares, float* parts,
                                                  int block, int half,
                                                  const float (&x)[kKey / 32][2][4]) {
  if (to.grad == nullptr) {
    return;
  }
  const int column = half * (kKey / 2) + tile_column(0, 0);
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const int i = 16 * block + tile_row(e);
    if (i >= span.tokens) {
      continue;
    }
    if (parts != nullptr) {
      float* part =
          parts + (((span.token + i) * key_heads + key_head) * shares + share) * kKey + column;
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        *reinterpret_cast<float2*>(part + 8 * n) =
            make_float2(x[n / 2][n % 2][e], x[n / 2][n % 2][e + 1]);
      }
      continue;
    }
    bf16* grad = to.grad_at(span.token + i, key_head * kKey + column);
    add_pairs<kKey / 16>(
        grad, [&](int n) { return make_float2(x[n / 2][n % 2][e], x[n / 2][n % 2][e + 1]); });
  }
}

template <int kKey>
__global__ void __launch_bounds__(kHeadsThreads, 2)
    heads_kernel(Recurrence<bf16> a, const ChunkSpan* spans, const float* states, const float* sums,
                 const Tile* dstates, int64_t shares, float* dq_parts, float* dk_parts,
                 float* dskip) {
  extern __shared__ float4 shared[];
  auto& s = *reinterpret_cast<HeadsShared<kKey>*>(shared);
  constexpr int kRow = HeadsShared<kKey>::kRow;
  constexpr int kKeyTiles = kKey / 16;
  constexpr int kOwn = kKey / 32;  // tiles of channels of a warp
  const int64_t share = blockIdx.x % shares;
  const int64_t key_head = blockIdx.x / shares % a.key_heads;
  const int64_t chunk = blockIdx.x / shares / a.key_heads;
  const ChunkSpan span = spans[chunk];
  const int64_t group = a.heads / a.key_heads;
  const int64_t end = key_head * group + (share + 1) * group / shares;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int block = warp % kRowTiles;
  const int half = warp / kRowTiles;
  copy_rows<kKey, kHeadsThreads>(a.q.at(span.token, key_head * kKey), a.q.rows.outer_stride,
                                 span.tokens, thread, s.q);
  copy_rows<kKey, kHeadsThreads>(a.k.at(span.token, key_head * kKey), a.k.rows.outer_stride,
                                 span.tokens, thread, s.k);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  multiply_pairs(s);
  float dq[kOwn][2][4] = {};
  float dk[kOwn][2][4] = {};
  for (int64_t h = key_head * group + share * group / shares; h < end; ++h) {
    const int64_t part = chunk * a.heads + h;
    copy_rows<kDim, kHeadsThreads>(a.y.grad_at(span.token, h * kDim), a.heads * kDim, span.tokens,
                                   thread, s.dy);
    copy_rows<kDim, kHeadsThreads>(a.v.at(span.token, h * kDim), a.v.rows.outer_stride, span.tokens,
                                   thread, s.v);
    const auto* from = reinterpret_cast<const uint4*>(dstates + part * kKeyTiles * kDimTiles);
    auto* to = reinterpret_cast<uint4*>(s.dstates);
#pragma unroll
    for (int x = 0; x < kKeyTiles * kDimTiles * 32; x += kHeadsThreads) {
      copy_16(to + x + thread, from + x + thread, true);
    }
    if (thread < kC / 4) {
      copy_16(s.sums + 4 * thread, sums + part * kC + 4 * thread, true);
    }
    commit_copies();
    if (thread < kC) {
      s.weight[thread] = weight_of(a, span.token, span.tokens, thread, h);
    }
    round_states(states + part * kKey * kDim, s);
    wait_for_copies<0>();
    __syncthreads();
    float du[kDimTiles][2][4] = {};
    if (half == 0) {
      make_pairs(block, s);
    } else {
      begin_values(block, s, du);
    }
    __syncthreads();
    if (half != 0) {
      end_values(a, span, h, block, s, du);
    }
    float starts[2];
    float ends[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 16 * block + tile_row(2 * i);
      starts[i] = fast_exp2(s.sums[row]);
      ends[i] = s.weight[row] * fast_exp2(s.sums[kC - 1] - s.sums[row]);
    }
    add_states<kKey>(s.dy, s.states, starts, s.q, block, half, s.by_query[half], dq);
    add_states<kKey>(s.v, s.dstates, ends, s.k, block, half, s.by_key[half], dk);
#pragma unroll 1
    for (int m = 0; m <= block; ++m) {
      uint32_t left[4];
      load_tile(&s.dpairs[pair_tile(block, m)], left);
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        uint32_t right[4];
        load_right(s.k + 16 * m * kRow + 16 * (half * kOwn + n), kRow, right);
        multiply_tiles(dq[n], left, right);
      }
    }
    add_column<kOwn>(s.dpairs, s.q + 16 * half * kOwn, kRow, block, dk);
    __syncthreads();
    if (warp == 0 && a.log_decay.grad != nullptr) {
      add_decay_gradients(a, span, h, s);
    }
    if (thread == 32 && dskip != nullptr) {
      dskip[part] = s.by_skip[0] + s.by_skip[1] + s.by_skip[2] + s.by_skip[3];
    }
  }
  add_key_gradients<kKey>(a.q, span, key_head, a.key_heads, share, shares, dq_parts, block, half,
                          dq);
  add_key_gradients<kKey>(a.k, span, key_head, a.key_heads, share, shares, dk_parts, block, half,
                          dk);
}

// The gradient by skip of its parts (chunks, heads): a warp has a head.
__global__ void __launch_bounds__(32)
    skip_parts_kernel(const float* dskip, int64_t chunks, int64_t heads, float* grad) {
  const int64_t h = blockIdx.x;
  float sum = 0.0F;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += 32) {
    sum += dskip[chunk * heads + h];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) {
    grad[h] += sum;
  }
}

}  // namespace

bool recurrence_has_backward_scan(const Recurrence<bf16>& a) {
  return !a.delta && !a.decay_per_channel && a.dim == kDim && (a.key_dim == 64 || a.key_dim == 128);
}

int64_t recurrence_backward_shares(const Recurrence<bf16>& a, const DeviceChunks& chunks) {
  const int64_t wanted = ceil_div(kBlocksWanted, chunks.count * a.key_heads);
  const int64_t most = ceil_div(a.heads / a.key_heads, kHeadsWanted);
  return wanted < most ? wanted : most;
}

void recurrence_backward_scan(const Recurrence<bf16>& a, const DeviceChunks& chunks, int64_t shares,
                              float* dq_parts, float* dk_parts, const Launch& on) {
  const int64_t count = chunks.count * a.heads;
  auto* sums = scratch<float>(on, count * kC);
  auto* dstates = scratch<Tile>(on, count * (a.key_dim / 16) * kDimTiles);
  auto* dskip = a.skip.grad != nullptr ? scratch<float>(on, count) : nullptr;
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  launch(on, kName, sums_kernel, static_cast<unsigned>(ceil_div(count, 8)), 256, 0, a, chunks.span,
         count, sums);
  const auto with_key = [&]<int kKey>() {
    constexpr size_t kChainShared = kChainStages * sizeof(ChainStage<kKey>);
    constexpr size_t kHeadsShared = sizeof(HeadsShared<kKey>);
    static_assert(kChainShared <= kBackwardShared);
    static_assert(kHeadsShared <= (228 / 2 - 1) * 1024, "two blocks on a multiprocessor");
    launch(on, kName, chain_kernel<kKey>, static_cast<unsigned>(a.segments.count * a.heads),
           kChainThreads, kChainShared, a, chunks.span, chunks.first, sums, dstates);
    launch(on, kName, heads_kernel<kKey>,
           static_cast<unsigned>(chunks.count * a.key_heads * shares), kHeadsThreads, kHeadsShared,
           a, chunks.span, kept.states, sums, dstates, shares, dq_parts, dk_parts, dskip);
  };
  a.key_dim == 64 ? with_key.template operator()<64>() : with_key.template operator()<128>();
  if (dskip != nullptr) {
    launch(on, kName, skip_parts_kernel, static_cast<unsigned>(a.heads), 32, 0, dskip, chunks.count,
           a.heads, a.skip.grad);
  }
}

}  // namespace cambium::cuda
