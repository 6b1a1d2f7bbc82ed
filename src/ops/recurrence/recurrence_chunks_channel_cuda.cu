// Chunks with a decay per channel of the key (Kimi Delta Attention): what recurrence_chunks_cuda.cu
// takes of q, k and the decays alone, for all chunks and heads at once.
//
//   P_ij = sum_c q_ic exp(G_ic - G_jc) k_jc w_j,  j <= i     A_ij with k_i for q_i,  j < i
//
// exp(G_i - G_j) does not factor into exp(G_i) exp(-G_j), which overflows. Rows are taken in blocks
// of 16: columns before the block through its first row r, exp(G_i - G_r) times exp(G_r - G_j),
// neither of which is above 1, on tensor cores; the pairs inside the block one by one, in fp32.
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kBlock = 16;

template <int kKey, int kDim>
struct ChannelShared {
  static constexpr int kRow = kKey + 8;
  bf16 q[kC * kRow];      // then (I + A)^-1, row stride kPairPad
  bf16 k[kC * kRow];      // then exp(G) k
  float sums[kC * kKey];  // G
  union {
    struct {
      bf16 query[kBlock * kRow];          // exp(G_i - G_r) q_i
      bf16 key[kBlock * kRow];            // exp(G_i - G_r) k_i
      bf16 before[(kC - kBlock) * kRow];  // exp(G_r - G_j) k_j
    };
    bf16 v[kC * (kDim + 8)];
  };
  float inverse[kC * kInversePad];
  float weight[kC];
};

template <int kKey, int kDim, bool kDelta>
__global__ void __launch_bounds__(128)
    prepare_channels_kernel(Recurrence<bf16> a, const ChunkSpan* spans, ChunkParts parts) {
  extern __shared__ float4 shared[];
  using Shared = ChannelShared<kKey, kDim>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kRow = Shared::kRow;
  const int64_t chunk = blockIdx.x / a.heads;
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int64_t part = chunk * a.heads + h;
  const int64_t key_offset = a.key_head(h) * kKey;
  copy_rows<kKey, 128>(a.q.at(span.token, key_offset), a.q.rows.outer_stride, span.tokens, kC, s.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_offset), a.k.rows.outer_stride, span.tokens, kC, s.k);
  commit_copies();
  if (thread < kC) {
    s.weight[thread] = thread >= span.tokens ? 0.0F
                       : a.weight.defined()  ? *a.weight.at(span.token + thread, h)
                                             : 1.0F;
  }
  if (thread < kKey) {
    float sum = 0.0F;
#pragma unroll 16
    for (int i = 0; i < kC; ++i) {
      if (i < span.tokens) {
        sum += fmaxf(*a.log_decay.at(span.token + i, h * kKey + thread), kLowestLogDecay);
      }
      s.sums[i * kKey + thread] = sum;
    }
    parts.ends[part * (kC + kKey) + kC + thread] = expf(sum);
  }
  wait_for_copies<0>();
  __syncthreads();
  if (thread < kC) {
    parts.ends[part * (kC + kKey) + thread] = s.weight[thread];
  }
  bf16* pairs = parts.pairs + part * kC * kC;
  // Pairs inside blocks: a warp has a block, a lane kKey / 32 channels.
  {
    constexpr int kEach = kKey / 32;
    const int first = warp * kBlock;
    for (int j = 0; j < kBlock; ++j) {
      float key[kEach];
      float sum[kEach];
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        key[c] = load(s.k + (first + j) * kRow + lane + 32 * c) * s.weight[first + j];
        sum[c] = s.sums[(first + j) * kKey + lane + 32 * c];
      }
      for (int i = 0; i < kBlock; ++i) {
        float p = 0.0F;
        float r = 0.0F;
        if (i >= j) {
#pragma unroll
          for (int c = 0; c < kEach; ++c) {
            const int at = (first + i) * kRow + lane + 32 * c;
            const float x = key[c] * expf(s.sums[(first + i) * kKey + lane + 32 * c] - sum[c]);
            p = fmaf(load(s.q + at), x, p);
            r = fmaf(load(s.k + at), x, r);
          }
          p = warp_sum(p);
          r = kDelta ? warp_sum(r) : 0.0F;
        }
        if (lane == 0) {
          store(pairs + (first + i) * kC + first + j, p);
          if constexpr (kDelta) {
            s.inverse[(first + i) * kInversePad + first + j] = i > j ? r : 0.0F;
          }
        }
      }
    }
  }
  for (int block = 0; block < kC / kBlock; ++block) {
    const int first = block * kBlock;
    const float* from = s.sums + first * kKey;  // G_r
    __syncthreads();
    for (int x = thread; x < kBlock * kKey; x += 128) {
      const int i = x / kKey;
      const int c = x % kKey;
      const int at = (first + i) * kRow + c;
      const float decay = expf(s.sums[(first + i) * kKey + c] - from[c]);
      store(s.query + i * kRow + c, decay * load(s.q + at));
      store(s.key + i * kRow + c, decay * load(s.k + at));
    }
    for (int x = thread; x < first * kKey; x += 128) {
      const int j = x / kKey;
      const int c = x % kKey;
      store(s.before + j * kRow + c, expf(from[c] - s.sums[x]) * load(s.k + j * kRow + c));
    }
    __syncthreads();
    // A warp has 16 columns; those after the block are zero.
    if (warp == block) {
      continue;
    }
    float p[2][4] = {};
    float r[2][4] = {};
    if (warp < block) {
#pragma unroll
      for (int c = 0; c < kKey; c += 16) {
        uint32_t query[4];
        uint32_t b[4];
        load_left(s.query + c, kRow, query);
        load_right_of_rows(s.before + warp * 16 * kRow + c, kRow, b);
        mma(p[0], query, b[0], b[1]);
        mma(p[1], query, b[2], b[3]);
        if constexpr (kDelta) {
          uint32_t key[4];
          load_left(s.key + c, kRow, key);
          mma(r[0], key, b[0], b[1]);
          mma(r[1], key, b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first + lane / 4 + 8 * half;
        const int j = 16 * warp + 8 * n + lane % 4 * 2;
        const float w0 = s.weight[j];
        const float w1 = s.weight[j + 1];
        *reinterpret_cast<uint32_t*>(pairs + i * kC + j) =
            pack(p[n][2 * half] * w0, p[n][2 * half + 1] * w1);
        if constexpr (kDelta) {
          s.inverse[i * kInversePad + j] = r[n][2 * half] * w0;
          s.inverse[i * kInversePad + j + 1] = r[n][2 * half + 1] * w1;
        }
      }
    }
  }
  __syncthreads();
  copy_rows<kDim, 128>(a.v.at(span.token, h * kDim), a.v.rows.outer_stride, span.tokens, kC, s.v);
  commit_copies();
  for (int x = thread; x < kC * kKey / 2; x += 128) {
    const int i = x / (kKey / 2);
    const int c = x % (kKey / 2) * 2;
    float q[2];
    float k[2];
    load_n<2>(s.q + i * kRow + c, q);
    load_n<2>(s.k + i * kRow + c, k);
    const float g[2] = {s.sums[i * kKey + c], s.sums[i * kKey + c + 1]};
    const float last[2] = {s.sums[(kC - 1) * kKey + c], s.sums[(kC - 1) * kKey + c + 1]};
    const float start[2] = {expf(g[0]), expf(g[1])};
    const int64_t at = (part * kC + i) * kKey + c;
    *reinterpret_cast<uint32_t*>(parts.queries + at) = pack(q[0] * start[0], q[1] * start[1]);
    *reinterpret_cast<uint32_t*>(parts.keys + at) =
        pack(k[0] * expf(last[0] - g[0]), k[1] * expf(last[1] - g[1]));
    if constexpr (kDelta) {
      *reinterpret_cast<uint32_t*>(s.k + i * kRow + c) = pack(-k[0] * start[0], -k[1] * start[1]);
    }
  }
  __syncthreads();
  bf16* solve = s.q;
  static_assert(sizeof(s.q) >= kC * kPairPad * sizeof(bf16));
  static_assert(sizeof(s.q) >= 32 * kInversePad * sizeof(float));
  if constexpr (kDelta) {
    invert(s.inverse, reinterpret_cast<float*>(s.q));
  }
  for (int x = thread; x < kC * kC; x += 128) {
    const int i = x / kC;
    const int j = x % kC;
    float t = i == j ? 1.0F : 0.0F;
    if constexpr (kDelta) {
      t = j < i ? s.inverse[i * kInversePad + j] : t;
    }
    store(solve + i * kPairPad + j, t);
  }
  wait_for_copies<0>();
  __syncthreads();
  solve_values<kDim>(s.v, solve, parts.errors + part * kDim * kC);
  if constexpr (kDelta) {
    solve_keys<kKey>(s.k, solve, parts.reads + part * kC * kKey);
  }
}

template <int kKey, int kDim>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const ChunkParts& parts,
         const Launch& on) {
  const auto blocks = static_cast<unsigned>(chunks.count * a.heads);
  constexpr size_t kShared = sizeof(ChannelShared<kKey, kDim>);
  if (a.delta) {
    launch(on, "recurrence", prepare_channels_kernel<kKey, kDim, true>, blocks, 128, kShared, a,
           chunks.span, parts);
  } else {
    launch(on, "recurrence", prepare_channels_kernel<kKey, kDim, false>, blocks, 128, kShared, a,
           chunks.span, parts);
  }
}

}  // namespace

void prepare_channels(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                      const ChunkParts& parts, const Launch& on) {
  if (a.key_dim == 64) {
    a.dim == 64 ? run<64, 64>(a, chunks, parts, on) : run<64, 128>(a, chunks, parts, on);
  } else {
    a.dim == 64 ? run<128, 64>(a, chunks, parts, on) : run<128, 128>(a, chunks, parts, on);
  }
}

}  // namespace cambium::cuda
