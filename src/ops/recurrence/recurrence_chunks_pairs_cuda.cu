// What the delta rule's walk over chunks takes beside q, k and v, for all chunks and heads at once:
// P, T - I, what becomes of the decays and keys as the walk takes them, in the notation of
// recurrence_chunks_delta_cuda.cu.
#include "ops/recurrence/recurrence_chunks_delta_cuda.cuh"

namespace cambium::cuda {
namespace {

template <int kKey>
struct PrepareShared {
  union {
    bf16 q[kC * (kKey + 8)];
    float x[kC * kInversePad];  // A, when q is used up
  };
  DeltaKeys<kKey> k;
  float sums[kC];  // G in units of log 2
  float weight[kC];
};

template <int kKey>
__global__ void __launch_bounds__(128)
    prepare_kernel(Recurrence<bf16> a, const ChunkSpan* spans, const int32_t* first, int head_walks,
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
  if (chunk == first[span.segment] && thread < head_walks) {
    parts.walked[(span.segment * a.heads + h) * head_walks + thread] = 0;
  }
  const int64_t key_offset = a.key_head(h) * kKey;
  copy_rows<kKey, 128>(a.q.at(span.token, key_offset), a.q.rows.outer_stride, span.tokens, thread,
                       s.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_offset), a.k.rows.outer_stride, span.tokens, thread,
                       s.k.row);
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
  DeltaGates& gates = parts.step[part].gates;
  if (thread < kC) {
    gates.ends[thread] = fast_exp2(last - s.sums[thread]) * s.weight[thread];
  } else {
    gates.starts[thread - kC] = fast_exp2(s.sums[thread - kC]);
  }
  if (thread == 0) {
    gates.decay = fast_exp2(last);
  }
  if (parts.keys != nullptr && h % (a.heads / a.key_heads) == 0) {
    auto* keys = static_cast<DeltaKeys<kKey>*>(parts.keys) + chunk * a.key_heads + a.key_head(h);
    constexpr int kPieces = sizeof(*keys) / 16;
    for (int x = thread; x < kPieces; x += 128) {
      reinterpret_cast<uint4*>(keys)[x] = reinterpret_cast<const uint4*>(&s.k)[x];
    }
  }
  const int warp = thread / 32;
  float p[kRowTiles][2][4] = {};
  float r[kRowTiles][2][4] = {};
#pragma unroll
  for (int t = 0; t < kKey / 16; ++t) {
    uint32_t query[4];
    uint32_t key[4];
    load_left(s.q + 16 * warp * kRow + 16 * t, kRow, query);
    load_left(s.k.row + 16 * warp * kRow + 16 * t, kRow, key);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (j <= warp) {
        uint32_t right[4];
        load_right_of_rows(s.k.row + 16 * j * kRow + 16 * t, kRow, right);
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
      store_tile(parts.step[part].inverse + pair_tile(warp, j), tile);
    }
  }
}

template <int kKey>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, int64_t head_walks,
         const DeltaParts& parts, const Launch& on) {
  launch_ahead(on, "recurrence", prepare_kernel<kKey>,
               static_cast<unsigned>(chunks.count * a.heads), 128, sizeof(PrepareShared<kKey>), a,
               chunks.span, chunks.first, static_cast<int>(head_walks), parts);
}

}  // namespace

void prepare_delta(const Recurrence<bf16>& a, const DeviceChunks& chunks, int64_t head_walks,
                   const DeltaParts& parts, const Launch& on) {
  a.key_dim == 64 ? run<64>(a, chunks, head_walks, parts, on)
                  : run<128>(a, chunks, head_walks, parts, on);
}

}  // namespace cambium::cuda
