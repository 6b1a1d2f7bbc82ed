// Products of three to eight rows of bf16 with bf16 weights where the device copies in the
// background (sm_90): streamed as in matmul_stream_cuda.cu, multiplied by tensor cores, for which
// eight rows of x cost what one does.
//
// A tile is eight rows of a weight. It comes in slices, of which each of the sixteen multiplying
// warps takes chunks of 32 columns; its columns of x stay in registers, and its sums until the last
// slice, when the finisher adds those of all warps in their order. A lane reads 16 bytes of a row
// at once and gives the tensor cores the columns in an order of its own, the same for the weight
// and for x. Rows wider than registers hold of x are multiplied in passes, between which the
// finisher keeps the sums. What copies bring of a row is long: with slices of 1,024 columns, memory
// did not keep up.
#include "ops/matmul/matmul_stream_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kTileRows = 8;
constexpr int kTeamBits = 1;  // as Tile counts rows
static_assert(kStreamWarps >> kTeamBits == kTileRows);
constexpr int kChunk = 32;       // columns that a warp takes at once
constexpr int kSliceChunks = 5;  // of a warp
constexpr int kSliceColumns = kStreamWarps * kChunk * kSliceChunks;
constexpr int kSlices = 3;  // of a pass at most
constexpr int64_t kPassColumns = int64_t{kSlices} * kSliceColumns;
/// Rows of a slice lie so that two neighbours' chunks share no bank.
constexpr int kRowVectors = (kSliceColumns + kChunk) / kVector;
constexpr int kStageVectors = kTileRows * kRowVectors;
constexpr int kStages = 5;
constexpr size_t kShared = sizeof(uint4) * kStages * kStageVectors;
constexpr int kParts = 2;       // tiles whose parts there is room for
constexpr int kHeldTiles = 32;  // of a block's share, between passes

struct StreamPasses {
  int32_t count;
  int32_t columns;  // of one that is not the last
  int32_t x_rows;
};

template <class Y>
__global__ void __launch_bounds__(kStreamThreads, 1)
    stream_tensor_kernel(const __grid_constant__ StreamRows<Y> a,
                         const __grid_constant__ StreamPasses passes) {
  extern __shared__ __align__(128) uint4 ring[];  // (kStages, kTileRows, kRowVectors)
  __shared__ uint64_t full[kStages];              // the slice is there
  __shared__ uint64_t empty[kStages];             // and has been read
  __shared__ uint64_t ready[kParts];              // the tile's parts are there
  __shared__ uint64_t taken[kParts];              // and have been read
  // Lane (g, q) of a warp: row g of x by rows 2 q and 2 q + 1 of the tile.
  __shared__ float2 parts[kParts][kStreamWarps][32];
  __shared__ float2 held[kHeldTiles][32];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&full[s], 1);
      init_barrier(&empty[s], kStreamWarps);
    }
    for (int p = 0; p < kParts; ++p) {
      init_barrier(&ready[p], kStreamWarps);
      init_barrier(&taken[p], 1);
    }
    barriers_ready();
  }
  __syncthreads();
  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };
  const auto columns_of = [&](int pass) {
    return min(passes.columns, a.k - pass * passes.columns);
  };

  if (warp == kBringer) {
    if (a.before_inputs == 0) {
      await_inputs();
    }
    int brought = 0;
    for (int pass = 0; pass < passes.count; ++pass) {
      const int columns = columns_of(pass);
      for (Tile tile(a, a.rows); tile.exists(); tile.next(a)) {
        const StreamProduct<Y>& p = a.each[tile.product];
        const bf16* row = p.weight + static_cast<int64_t>(tile.row - p.first_row + lane) * a.k +
                          pass * passes.columns;
        for (int first = 0; first < columns; first += kSliceColumns, ++brought, advance()) {
          if (brought >= kStages) {
            await_phase(&empty[stage], parity ^ 1);
          }
          const auto bytes =
              static_cast<uint32_t>(min(kSliceColumns, columns - first) * sizeof(bf16));
          if (lane == 0) {
            arrive_expecting(&full[stage], bytes * tile.rows);
          }
          __syncwarp();
          if (lane < tile.rows) {
            copy_bulk_once(ring + stage * kStageVectors + lane * kRowVectors, row + first, bytes,
                           &full[stage]);
          }
        }
      }
    }
    return;
  }

  await_inputs();
  if (warp == kFinisher) {
    int finished = 0;
    for (int pass = 0; pass < passes.count; ++pass) {
      int i = 0;
      for (Tile tile(a, a.rows); tile.exists(); tile.next(a), ++finished, ++i) {
        const StreamProduct<Y>& p = a.each[tile.product];
        const int slot = finished % kParts;
        await_phase(&ready[slot], finished / kParts % 2);
        float2 sum = pass > 0 ? held[i][lane] : float2{};
#pragma unroll
        for (int w = 0; w < kStreamWarps; ++w) {
          const float2 part = parts[slot][w][lane];
          sum.x += part.x;
          sum.y += part.y;
        }
        __syncwarp();
        if (lane == 0) {
          arrive(&taken[slot]);
        }
        if (pass + 1 < passes.count) {
          held[i][lane] = sum;
          continue;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 2 * q + e;
          if (row < tile.rows && g < passes.x_rows) {
            const int n = tile.row - p.first_row + row;
            Y* y = p.y + g * p.y_stride + n;
            const float bias = p.bias != nullptr ? p.bias[n] : 0.0F;
            store(y, (p.accumulate != 0 ? load(y) : 0.0F) + bias + (e == 0 ? sum.x : sum.y));
          }
        }
      }
    }
    return;
  }

  int finished = 0;
  for (int pass = 0; pass < passes.count; ++pass) {
    const int columns = columns_of(pass);
    // Row g of x.
    uint4 x[kSlices][kSliceChunks];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int c = 0; c < kSliceChunks; ++c) {
        const int first = s * kSliceColumns + (c * kStreamWarps + warp) * kChunk;
        x[s][c] = g < passes.x_rows && first < columns
                      ? *reinterpret_cast<const uint4*>(a.x + g * a.x_stride +
                                                        pass * passes.columns + first + q * kVector)
                      : uint4{};
      }
    }
    for (Tile tile(a, a.rows); tile.exists(); tile.next(a), ++finished) {
      float sum[2][4] = {};  // of either half of a chunk; rows 8 to 15 of the product stay zero
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        if (s * kSliceColumns >= columns) {
          break;
        }
        await_phase(&full[stage], parity);
        const uint4* row = ring + stage * kStageVectors + g * kRowVectors + q;
#pragma unroll
        for (int c = 0; c < kSliceChunks; ++c) {
          const int chunk = c * kStreamWarps + warp;
          if (s * kSliceColumns + chunk * kChunk < columns) {
            const uint4 w = row[chunk * (kChunk / kVector)];
            mma(sum[0], {x[s][c].x, 0, x[s][c].y, 0}, w.x, w.y);
            mma(sum[1], {x[s][c].z, 0, x[s][c].w, 0}, w.z, w.w);
          }
        }
        __syncwarp();
        if (lane == 0) {
          arrive(&empty[stage]);
        }
        advance();
      }
      const int slot = finished % kParts;
      if (finished >= kParts) {
        await_phase(&taken[slot], (finished / kParts - 1) % 2);
      }
      parts[slot][warp][lane] = make_float2(sum[0][0] + sum[1][0], sum[0][1] + sum[1][1]);
      __syncwarp();
      if (lane == 0) {
        arrive(&ready[slot]);
      }
    }
  }
}

}  // namespace

template <class Y>
bool stream_by_tensor_cores(StreamRows<Y> a, int64_t x_rows, const Launch& on) {
  if (kShared > most_shared()) {
    return false;
  }
  const int64_t blocks =
      std::min(int64_t{a.rows}, resident_blocks(stream_tensor_kernel<Y>, kStreamThreads, kShared));
  const int64_t passes = ceil_div(a.k, kPassColumns);
  // Every weight may leave a tile that is not full.
  const int64_t tiles = ceil_div(ceil_div(a.rows, blocks), kTileRows) + 2 * a.count;
  if (a.k % kChunk != 0 || (passes > 1 && tiles > kHeldTiles)) {
    return false;
  }
  const StreamPasses of = {
      .count = static_cast<int32_t>(passes),
      .columns = static_cast<int32_t>(ceil_div(ceil_div(a.k, passes), kChunk) * kChunk),
      .x_rows = static_cast<int32_t>(x_rows)};
  a.team_bits = kTeamBits;
  launch_ahead(on, "matmul", stream_tensor_kernel<Y>, dim3(static_cast<unsigned>(blocks)),
               dim3(kStreamThreads), kShared, a, of);
  return true;
}
template bool stream_by_tensor_cores(StreamRows<bf16>, int64_t, const Launch&);
template bool stream_by_tensor_cores(StreamRows<float>, int64_t, const Launch&);

}  // namespace cambium::cuda
