// The recurrence in chunks of 64 tokens on tensor cores: bf16, one decay per head, dims of 64 or
// 128. In the notation of chunk.h, with G the running sum of log decays in the chunk:
//
//   P_ij = q_i . k_j exp(G_i - G_j) w_j, j <= i      A_ij = k_i . k_j exp(G_i - G_j) w_j, j < i
//   e    = (I + A)^-1 (v - exp(G) k S) = U - W S     (delta; else e = v)
//   y    = exp(G) q S + P e
//   S    = exp(G_last) S + k' (exp(G_last - G) w e)
//
// 1. prepare_kernel, for all chunks and heads at once: P, U and W. The inverse is taken in fp32.
//    (prepare_channels_kernel where every channel has its decay.)
// 2. state_kernel, over the chunks of a segment in turn: a warp holds 16 columns of the state in
//    fp32, transposed, so that the state and e go from one product into the next in registers.
// 3. output_kernel, for all chunks and heads at once: y.
//
// exp(G_i - G_j) is one exponential of a difference that is never positive. A chunk is cut at
// multiples of 64 of absolute position; rows past its tokens are zero, which is exact.
#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {
namespace {

template <int kKey, int kDim>
struct PrepareShared {
  bf16 q[kC * (kKey + 8)];
  bf16 k[kC * (kKey + 8)];
  bf16 v[kC * (kDim + 8)];
  bf16 solve[kC * kPairPad];        // (I + A)^-1
  bf16 solve_state[kC * kPairPad];  // -(I + A)^-1 exp(G)
  float inverse[kC * kInversePad];
  float sums[kC];
  float weight[kC];
};

template <int kKey, int kDim, bool kDelta>
__global__ void __launch_bounds__(128)
    prepare_kernel(Recurrence<bf16> a, const ChunkSpan* spans, ChunkParts parts) {
  extern __shared__ float4 shared[];
  using Shared = PrepareShared<kKey, kDim>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kKeyStride = kKey + 8;
  const int64_t chunk = blockIdx.x / a.heads;
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int64_t key_offset = a.key_head(h) * kKey;
  copy_rows<kKey, 128>(a.q.at(span.token, key_offset), a.q.rows.outer_stride, span.tokens, kC, s.q);
  copy_rows<kKey, 128>(a.k.at(span.token, key_offset), a.k.rows.outer_stride, span.tokens, kC, s.k);
  copy_rows<kDim, 128>(a.v.at(span.token, h * kDim), a.v.rows.outer_stride, span.tokens, kC, s.v);
  commit_copies();
  sum_decays(a, span.token, span.tokens, h, s.sums);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= 64) {
    const int row = thread - 64;
    s.weight[row] = row >= span.tokens   ? 0.0F
                    : a.weight.defined() ? *a.weight.at(span.token + row, h)
                                         : 1.0F;
  }
  wait_for_copies<0>();
  __syncthreads();
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int row = 16 * warp + lane / 4;  // and 8 below
  const int64_t part = chunk * a.heads + h;
  if (thread <= kC) {
    parts.ends[part * (kC + kKey) + thread] =
        thread < kC ? expf(s.sums[kC - 1] - s.sums[thread]) * s.weight[thread]
                    : expf(s.sums[kC - 1]);
  }
  {
    float p[kC / 8][4] = {};
    float r[kC / 8][4] = {};
#pragma unroll
    for (int c = 0; c < kKey; c += 16) {
      uint32_t query[4];
      uint32_t key[4];
      load_left(s.q + 16 * warp * kKeyStride + c, kKeyStride, query);
      load_left(s.k + 16 * warp * kKeyStride + c, kKeyStride, key);
#pragma unroll
      for (int n = 0; n < kC / 16; ++n) {
        if (n <= warp) {
          uint32_t b[4];
          load_right_of_rows(s.k + 16 * n * kKeyStride + c, kKeyStride, b);
          mma(p[2 * n], query, b[0], b[1]);
          mma(p[2 * n + 1], query, b[2], b[3]);
          if constexpr (kDelta) {
            mma(r[2 * n], key, b[0], b[1]);
            mma(r[2 * n + 1], key, b[2], b[3]);
          }
        }
      }
    }
    bf16* pairs = parts.pairs + part * kC * kC;
#pragma unroll
    for (int n = 0; n < kC / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row + 8 * half;
        float read[2];
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int j = 8 * n + lane % 4 * 2 + x;
          const float decay = j <= i ? expf(s.sums[i] - s.sums[j]) * s.weight[j] : 0.0F;
          read[x] = decay * p[n][2 * half + x];
          if constexpr (kDelta) {
            s.inverse[i * kInversePad + j] = j < i ? decay * r[n][2 * half + x] : 0.0F;
          }
        }
        *reinterpret_cast<uint32_t*>(pairs + i * kC + 8 * n + lane % 4 * 2) =
            pack(read[0], read[1]);
      }
    }
  }
  __syncthreads();
  if constexpr (kDelta) {
    // q is no longer needed.
    static_assert(sizeof(s.q) >= 32 * kInversePad * sizeof(float));
    invert(s.inverse, reinterpret_cast<float*>(s.q));
  }
  for (int x = thread; x < kC * kC; x += 128) {
    const int i = x / kC;
    const int j = x % kC;
    float t = i == j ? 1.0F : 0.0F;
    if constexpr (kDelta) {
      t = j < i ? s.inverse[i * kInversePad + j] : t;
      store(s.solve_state + i * kPairPad + j, j <= i ? -t * expf(s.sums[j]) : 0.0F);
    }
    store(s.solve + i * kPairPad + j, t);
  }
  __syncthreads();
  solve_values<kDim>(s.v, s.solve, parts.errors + part * kDim * kC);
  if constexpr (kDelta) {
    solve_keys<kKey>(s.k, s.solve_state, parts.reads + part * kC * kKey);
  }
}

template <int kKey, bool kPerChannel, bool kDelta>
struct StateStage {
  bf16 k[kC * (kKey + 8)];
  bf16 reads[kDelta ? kC * (kKey + 8) : 8];
  bf16 errors[kStateColumns * kPairPad];
  float ends[kC + kKey];
};

template <int kKey, int kDim, bool kPerChannel, bool kDelta>
__global__ void __launch_bounds__(64) state_kernel(Recurrence<bf16> a, const int32_t* first_chunk,
                                                   RecurrenceKept kept, ChunkParts parts) {
  extern __shared__ float4 shared[];
  using Stage = StateStage<kKey, kPerChannel, kDelta>;
  auto* stages = reinterpret_cast<Stage*>(shared);
  constexpr int kKeyStride = kKey + 8;
  constexpr int64_t kSlices = kDim / kStateColumns;
  const int64_t slice = blockIdx.x % kSlices;
  const int64_t h = blockIdx.x / kSlices % a.heads;
  const int64_t segment = blockIdx.x / kSlices / a.heads;
  if (!in_chunks(a.segments, segment)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_column = thread / 32 * 16;
  const int64_t column = slice * kStateColumns + warp_column + lane / 4;  // and 8 after
  const int pair = lane % 4 * 2;
  const int64_t first = first_chunk[segment];
  const int64_t count = first_chunk[segment + 1] - first;
  const int64_t key_offset = a.key_head(h) * kKey;

  // Chunk c: its first token in the segment, and how many it has.
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const int64_t position = a.segments.position[segment];
  const auto first_token = [&](int64_t c) { return chunk_begin(position, c); };
  const auto tokens_of = [&](int64_t c) {
    return static_cast<int>((c + 1 == count ? length : first_token(c + 1)) - first_token(c));
  };
  const auto fetch = [&](int64_t c) {
    if (c < count) {
      Stage& stage = stages[c % kStages];
      const int64_t part = (first + c) * a.heads + h;
      if constexpr (kPerChannel) {
        copy_rows<kKey, 64>(parts.keys + part * kC * kKey, kKey, kC, kC, stage.k);
      } else {
        copy_rows<kKey, 64>(a.k.at(begin + first_token(c), key_offset), a.k.rows.outer_stride,
                            tokens_of(c), kC, stage.k);
      }
      if constexpr (kDelta) {
        copy_rows<kKey, 64>(parts.reads + part * kC * kKey, kKey, kC, kC, stage.reads);
      }
      copy_rows<kC, 64>(parts.errors + (part * kDim + slice * kStateColumns) * kC, kC,
                        kStateColumns, kStateColumns, stage.errors);
      if (thread < (kC + (kPerChannel ? kKey : 4)) / 4) {
        copy_16(stage.ends + 4 * thread, parts.ends + part * (kC + kKey) + 4 * thread, true);
      }
    }
    commit_copies();
  };

  float s[kKey / 8][4];  // (16 columns of the value, key)
  float* state = a.state_of(segment, h);
  const bool continues = a.segments.continues(segment);
#pragma unroll
  for (int n = 0; n < kKey / 8; ++n) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      s[n][x] = continues ? state[(8 * n + pair + x % 2) * kDim + column + x / 2 * 8] : 0.0F;
    }
  }
  for (int64_t c = 0; c + 1 < kStages; ++c) {
    fetch(c);
  }
  for (int64_t c = 0; c < count; ++c) {
    Stage& stage = stages[c % kStages];
    const int64_t part = (first + c) * a.heads + h;
    wait_for_copies<kStages - 2>();
    __syncthreads();  // and the stage of the chunk before is free
    fetch(c + kStages - 1);
    uint32_t before[kKey / 16][4];
    bf16* start = parts.states + (part * kDim + column) * kKey + pair;
#pragma unroll
    for (int n = 0; n < kKey / 8; ++n) {
      before[n / 2][n % 2 * 2] = pack(s[n][0], s[n][1]);
      before[n / 2][n % 2 * 2 + 1] = pack(s[n][2], s[n][3]);
      *reinterpret_cast<uint32_t*>(start + 8 * n) = before[n / 2][n % 2 * 2];
      *reinterpret_cast<uint32_t*>(start + 8 * kKey + 8 * n) = before[n / 2][n % 2 * 2 + 1];
    }
    if (kept.states != nullptr) {
      float* to = kept.states + part * kKey * kDim + column;
#pragma unroll
      for (int n = 0; n < kKey / 8; ++n) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          to[(8 * n + pair + x % 2) * kDim + x / 2 * 8] = s[n][x];
        }
      }
    }
    float e[kC / 8][4];  // (16 columns, tokens)
#pragma unroll
    for (int n = 0; n < kC / 8; n += 2) {
      uint32_t u[4];
      load_left(stage.errors + warp_column * kPairPad + 8 * n, kPairPad, u);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        e[n + x / 2][x % 2 * 2] = __uint_as_float(u[x] << 16);
        e[n + x / 2][x % 2 * 2 + 1] = __uint_as_float(u[x] & 0xffff0000U);
      }
    }
    if constexpr (kDelta) {
#pragma unroll
      for (int m = 0; m < kKey / 16; ++m) {
#pragma unroll
        for (int n = 0; n < kC / 16; ++n) {
          uint32_t b[4];
          load_right_of_rows(stage.reads + 16 * n * kKeyStride + 16 * m, kKeyStride, b);
          mma(e[2 * n], before[m], b[0], b[1]);
          mma(e[2 * n + 1], before[m], b[2], b[3]);
        }
      }
      bf16* errors = parts.errors + (part * kDim + column) * kC + pair;
#pragma unroll
      for (int n = 0; n < kC / 8; ++n) {
        *reinterpret_cast<uint32_t*>(errors + 8 * n) = pack(e[n][0], e[n][1]);
        *reinterpret_cast<uint32_t*>(errors + 8 * kC + 8 * n) = pack(e[n][2], e[n][3]);
      }
      if (kept.errors != nullptr) {
        const int tokens = tokens_of(c);
        const int64_t token_begin = begin + first_token(c);
#pragma unroll
        for (int n = 0; n < kC / 8; ++n) {
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const int token = 8 * n + pair + x % 2;
            if (token < tokens) {
              kept.errors[((token_begin + token) * a.heads + h) * kDim + column + x / 2 * 8] =
                  e[n][x];
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kKey / 8; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        s[n][x] *= stage.ends[kC + (kPerChannel ? 8 * n + pair + x % 2 : 0)];
      }
    }
#pragma unroll
    for (int m = 0; m < kC / 16; ++m) {
      uint32_t written[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float f0 = stage.ends[16 * m + 8 * i + pair];
        const float f1 = stage.ends[16 * m + 8 * i + pair + 1];
        written[2 * i] = pack(e[2 * m + i][0] * f0, e[2 * m + i][1] * f1);
        written[2 * i + 1] = pack(e[2 * m + i][2] * f0, e[2 * m + i][3] * f1);
      }
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        uint32_t b[4];
        load_right(stage.k + 16 * m * kKeyStride + 16 * n, kKeyStride, b);
        mma(s[2 * n], written, b[0], b[1]);
        mma(s[2 * n + 1], written, b[2], b[3]);
      }
    }
  }
  if (state != nullptr) {
#pragma unroll
    for (int n = 0; n < kKey / 8; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        state[(8 * n + pair + x % 2) * kDim + column + x / 2 * 8] = s[n][x];
      }
    }
  }
}

template <int kKey, int kDim>
struct OutputShared {
  bf16 q[kC * (kKey + 8)];
  bf16 states[kDim * (kKey + 8)];
  bf16 errors[kDim * kPairPad];
  bf16 pairs[kC * kPairPad];
  float sums[kC];
};

template <int kKey, int kDim, bool kPerChannel>
__global__ void __launch_bounds__(128)
    output_kernel(Recurrence<bf16> a, const ChunkSpan* spans, ChunkParts parts) {
  extern __shared__ float4 shared[];
  using Shared = OutputShared<kKey, kDim>;
  Shared& s = *reinterpret_cast<Shared*>(shared);
  constexpr int kKeyStride = kKey + 8;
  const int64_t chunk = blockIdx.x / a.heads;
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  const int64_t part = chunk * a.heads + h;
  if constexpr (kPerChannel) {
    copy_rows<kKey, 128>(parts.queries + part * kC * kKey, kKey, kC, kC, s.q);
  } else {
    copy_rows<kKey, 128>(a.q.at(span.token, a.key_head(h) * kKey), a.q.rows.outer_stride,
                         span.tokens, kC, s.q);
    sum_decays(a, span.token, span.tokens, h, s.sums);
  }
  copy_rows<kKey, 128>(parts.states + part * kDim * kKey, kKey, kDim, kDim, s.states);
  copy_rows<kC, 128>(parts.errors + part * kDim * kC, kC, kDim, kDim, s.errors);
  copy_rows<kC, 128>(parts.pairs + part * kC * kC, kC, kC, kC, s.pairs);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = 16 * warp + lane / 4;
  float y[kDim / 8][4] = {};
#pragma unroll
  for (int c = 0; c < kKey; c += 16) {
    uint32_t query[4];
    load_left(s.q + 16 * warp * kKeyStride + c, kKeyStride, query);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      load_right_of_rows(s.states + 16 * n * kKeyStride + c, kKeyStride, b);
      mma(y[2 * n], query, b[0], b[1]);
      mma(y[2 * n + 1], query, b[2], b[3]);
    }
  }
  if constexpr (!kPerChannel) {
    const float from_start[2] = {expf(s.sums[row]), expf(s.sums[row + 8])};
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        y[n][x] *= from_start[x / 2];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kC; c += 16) {
    if (c <= 16 * warp) {
      uint32_t left[4];
      load_left(s.pairs + 16 * warp * kPairPad + c, kPairPad, left);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        load_right_of_rows(s.errors + 16 * n * kPairPad + c, kPairPad, b);
        mma(y[2 * n], left, b[0], b[1]);
        mma(y[2 * n + 1], left, b[2], b[3]);
      }
    }
  }
  const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + 8 * half;
    if (i < span.tokens) {
      const int64_t at = h * kDim + lane % 4 * 2;
      const bf16* v = a.v.at(span.token + i, at);
      bf16* to = a.y.at(span.token + i, at);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        float out[2] = {y[n][2 * half], y[n][2 * half + 1]};
        if (a.skip.defined()) {
          out[0] = fmaf(skip, load(v + 8 * n), out[0]);
          out[1] = fmaf(skip, load(v + 8 * n + 1), out[1]);
        }
        *reinterpret_cast<uint32_t*>(to + 8 * n) = pack(out[0], out[1]);
      }
    }
  }
}

template <int kKey, int kDim, bool kPerChannel, bool kDelta>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
         const Launch& on) {
  const int64_t count = chunks.count * a.heads;
  ChunkParts parts{
      .pairs = scratch<bf16>(on, count * kC * kC),
      .errors = scratch<bf16>(on, count * kDim * kC),
      .reads = kDelta ? scratch<bf16>(on, count * kC * kKey) : nullptr,
      .states = scratch<bf16>(on, count * kDim * kKey),
      .ends = scratch<float>(on, count * (kC + kKey)),
  };
  if constexpr (kPerChannel) {
    parts.queries = scratch<bf16>(on, count * kC * kKey);
    parts.keys = scratch<bf16>(on, count * kC * kKey);
    prepare_channels(a, chunks, parts, on);
  } else {
    launch(on, "recurrence", prepare_kernel<kKey, kDim, kDelta>, static_cast<unsigned>(count), 128,
           sizeof(PrepareShared<kKey, kDim>), a, chunks.span, parts);
  }
  launch(on, "recurrence", state_kernel<kKey, kDim, kPerChannel, kDelta>,
         static_cast<unsigned>(a.segments.count * a.heads * (kDim / kStateColumns)), 64,
         kStages * sizeof(StateStage<kKey, kPerChannel, kDelta>), a, chunks.first, kept, parts);
  launch(on, "recurrence", output_kernel<kKey, kDim, kPerChannel>, static_cast<unsigned>(count),
         128, sizeof(OutputShared<kKey, kDim>), a, chunks.span, parts);
}

template <int kKey, int kDim>
void pick_kind(const Recurrence<bf16>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
               const Launch& on) {
  if (a.decay_per_channel) {
    a.delta ? run<kKey, kDim, true, true>(a, chunks, kept, on)
            : run<kKey, kDim, true, false>(a, chunks, kept, on);
  } else {
    a.delta ? run<kKey, kDim, false, true>(a, chunks, kept, on)
            : run<kKey, kDim, false, false>(a, chunks, kept, on);
  }
}

bool rows_aligned(const View<bf16>& x) {
  return aligned(x.data, 16) && x.rows.outer_stride % 8 == 0;
}

}  // namespace

bool recurrence_has_chunks(const Recurrence<bf16>& a) {
  const auto fits = [](int64_t dim) { return dim == 64 || dim == 128; };
  return fits(a.key_dim) && fits(a.dim) && rows_aligned(a.q) && rows_aligned(a.k) &&
         rows_aligned(a.v) && rows_aligned(a.y);
}

void recurrence_chunks(const Recurrence<bf16>& a, const DeviceSegments& segments,
                       const DeviceChunks& chunks, const Launch& on) {
  Recurrence<bf16> device = a;
  device.segments = segments.walk;
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  if (a.key_dim == 64) {
    a.dim == 64 ? pick_kind<64, 64>(device, chunks, kept, on)
                : pick_kind<64, 128>(device, chunks, kept, on);
  } else {
    a.dim == 64 ? pick_kind<128, 64>(device, chunks, kept, on)
                : pick_kind<128, 128>(device, chunks, kept, on);
  }
}

}  // namespace cambium::cuda
