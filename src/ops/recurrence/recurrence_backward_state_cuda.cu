// The pass of the gradients in chunks over the chunks of a segment from its end, in the notation of
// recurrence_backward_chunks_cuda.cu:
//
//   du = values + keys dS       dS before the chunk = exp(G_last) dS + queries' dy + reads' du
//
// A warp holds 16 columns of dS in fp32, transposed, so that dS and du go from one product into the
// next in registers.
#include "ops/recurrence/recurrence_backward_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr const char* kName = "recurrence (backward)";
constexpr int kSliceColumns = 32;  // of the value, in a block of two warps
constexpr int kSliceRow = kSliceColumns + 8;
constexpr int kStateStages = 2;

template <int kKey, bool kDelta>
struct StateStage {
  bf16 queries[kChunkTokens * (kKey + 8)];
  bf16 keys[kChunkTokens * (kKey + 8)];
  bf16 reads[kDelta ? kChunkTokens * (kKey + 8) : 8];
  bf16 dy[kChunkTokens * kSliceRow];
  bf16 values[kChunkTokens * kSliceRow];
  float totals[kKey];
};

template <int kKey, int kDim, bool kDelta>
__global__ void __launch_bounds__(64)
    state_kernel(Recurrence<bf16> a, const int32_t* first_chunk, BackwardParts parts) {
  extern __shared__ float4 shared[];
  using Stage = StateStage<kKey, kDelta>;
  auto* stages = reinterpret_cast<Stage*>(shared);
  constexpr int kRow = kKey + 8;
  constexpr int64_t kSlices = kDim / kSliceColumns;
  const int64_t slice = blockIdx.x % kSlices;
  const int64_t h = blockIdx.x / kSlices % a.heads;
  const int64_t segment = blockIdx.x / kSlices / a.heads;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_column = thread / 32 * 16;
  const int64_t column = slice * kSliceColumns + warp_column + lane / 4;  // and 8 after
  const int pair = lane % 4 * 2;
  const int64_t first = first_chunk[segment];
  const int64_t count = first_chunk[segment + 1] - first;
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const int64_t position = a.segments.position[segment];
  const auto fetch = [&](int64_t c) {
    if (c >= 0) {
      Stage& stage = stages[c % kStateStages];
      const int64_t part = (first + c) * a.heads + h;
      const int64_t from = chunk_begin(position, c);
      const int64_t end = c + 1 == count ? length : chunk_begin(position, c + 1);
      copy_rows_to<kKey, 64>(parts.queries + part * kChunkTokens * kKey, kKey, kChunkTokens,
                             kChunkTokens, stage.queries, kRow);
      copy_rows_to<kKey, 64>(parts.keys + part * kChunkTokens * kKey, kKey, kChunkTokens,
                             kChunkTokens, stage.keys, kRow);
      if constexpr (kDelta) {
        copy_rows_to<kKey, 64>(parts.reads + part * kChunkTokens * kKey, kKey, kChunkTokens,
                               kChunkTokens, stage.reads, kRow);
      }
      copy_rows_to<kSliceColumns, 64>(a.y.grad_at(begin + from, h * kDim + slice * kSliceColumns),
                                      a.heads * kDim, static_cast<int>(end - from), kChunkTokens,
                                      stage.dy, kSliceRow);
      copy_rows_to<kSliceColumns, 64>(
          parts.values + part * kChunkTokens * kDim + slice * kSliceColumns, kDim, kChunkTokens,
          kChunkTokens, stage.values, kSliceRow);
      if (thread < kKey / 4) {
        copy_16(stage.totals + 4 * thread, parts.totals + part * kKey + 4 * thread, true);
      }
    }
    commit_copies();
  };

  float ds[kKey / 8][4] = {};  // (16 columns of the value, key)
  for (int64_t c = 1; c < kStateStages; ++c) {
    fetch(count - c);
  }
  for (int64_t c = count - 1; c >= 0; --c) {
    Stage& stage = stages[c % kStateStages];
    const int64_t part = (first + c) * a.heads + h;
    fetch(c + 1 - kStateStages);
    wait_for_copies<kStateStages - 1>();
    __syncthreads();
    uint32_t after[kKey / 16][4];
    bf16* end = parts.states + (part * kDim + column) * kKey + pair;
#pragma unroll
    for (int n = 0; n < kKey / 8; ++n) {
      after[n / 2][n % 2 * 2] = pack(ds[n][0], ds[n][1]);
      after[n / 2][n % 2 * 2 + 1] = pack(ds[n][2], ds[n][3]);
      *reinterpret_cast<uint32_t*>(end + 8 * n) = after[n / 2][n % 2 * 2];
      *reinterpret_cast<uint32_t*>(end + 8 * kKey + 8 * n) = after[n / 2][n % 2 * 2 + 1];
    }
    float du[kChunkTokens / 8][4];  // (16 columns, tokens)
#pragma unroll
    for (int n = 0; n < kChunkTokens / 8; n += 2) {
      uint32_t u[4];
      load_left_transposed(stage.values + 8 * n * kSliceRow + warp_column, kSliceRow, u);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        du[n + x / 2][x % 2 * 2] = first_of(u[x]);
        du[n + x / 2][x % 2 * 2 + 1] = second_of(u[x]);
      }
    }
#pragma unroll
    for (int m = 0; m < kKey / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kChunkTokens / 16; ++n) {
        uint32_t b[4];
        load_right_of_rows(stage.keys + 16 * n * kRow + 16 * m, kRow, b);
        mma(du[2 * n], after[m], b[0], b[1]);
        mma(du[2 * n + 1], after[m], b[2], b[3]);
      }
    }
    bf16* out = parts.du + (part * kDim + column) * kChunkTokens + pair;
    uint32_t left[kChunkTokens / 16][4];
#pragma unroll
    for (int n = 0; n < kChunkTokens / 8; ++n) {
      left[n / 2][n % 2 * 2] = pack(du[n][0], du[n][1]);
      left[n / 2][n % 2 * 2 + 1] = pack(du[n][2], du[n][3]);
      *reinterpret_cast<uint32_t*>(out + 8 * n) = left[n / 2][n % 2 * 2];
      *reinterpret_cast<uint32_t*>(out + 8 * kChunkTokens + 8 * n) = left[n / 2][n % 2 * 2 + 1];
    }
#pragma unroll
    for (int n = 0; n < kKey / 8; ++n) {
      const float2 total = *reinterpret_cast<const float2*>(stage.totals + 8 * n + pair);
      ds[n][0] *= total.x;
      ds[n][1] *= total.y;
      ds[n][2] *= total.x;
      ds[n][3] *= total.y;
    }
#pragma unroll
    for (int m = 0; m < kChunkTokens / 16; ++m) {
      uint32_t dy[4];
      load_left_transposed(stage.dy + 16 * m * kSliceRow + warp_column, kSliceRow, dy);
#pragma unroll
      for (int n = 0; n < kKey / 16; ++n) {
        uint32_t b[4];
        load_right(stage.queries + 16 * m * kRow + 16 * n, kRow, b);
        mma(ds[2 * n], dy, b[0], b[1]);
        mma(ds[2 * n + 1], dy, b[2], b[3]);
        if constexpr (kDelta) {
          load_right(stage.reads + 16 * m * kRow + 16 * n, kRow, b);
          mma(ds[2 * n], left[m], b[0], b[1]);
          mma(ds[2 * n + 1], left[m], b[2], b[3]);
        }
      }
    }
    __syncthreads();  // before the stage is filled again
  }
}

template <int kKey, int kDim, bool kDelta>
void walk_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks, const BackwardParts& parts,
                 const Launch& on) {
  constexpr size_t kShared = kStateStages * sizeof(StateStage<kKey, kDelta>);
  static_assert(kShared <= kBackwardShared);
  launch(on, kName, state_kernel<kKey, kDim, kDelta>,
         static_cast<unsigned>(a.segments.count * a.heads * (kDim / kSliceColumns)), 64, kShared, a,
         chunks.first, parts);
}

}  // namespace

void recurrence_backward_walk(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                              const BackwardParts& parts, const Launch& on) {
  with_head_dims(a.key_dim, a.dim, [&]<int kKey, int kDim>() {
    a.delta ? walk_chunks<kKey, kDim, true>(a, chunks, parts, on)
            : walk_chunks<kKey, kDim, false>(a, chunks, parts, on);
  });
}

}  // namespace cambium::cuda
