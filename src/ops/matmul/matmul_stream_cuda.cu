// Products of one or two rows of bf16 with bf16 weights (with more: matmul_stream_tensor_cuda.cu)
// where the device copies in the background (sm_90): one block on each multiprocessor has a share
// of the weights' rows and streams them through a ring of tiles in shared memory. Nothing but
// memory limits such a product, so what counts is that loads never pause: the ring is filled before
// the kernels before it are done, as no kernel of a step writes weights, and so the small kernels
// between two products cost next to nothing. Of a long product the first rows are dealt evenly and
// the last ones go to whoever is in time for them, so that all blocks end together.
//
// Sixteen warps multiply: a team of them a row of the tile, every lane with its columns of x in
// registers. One more brings tiles, and another adds the warps' parts in their order and writes y:
// a warp that did both took longer over a tile than memory does.
#include "ops/matmul/matmul_stream_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int64_t kSummedRows = 2;  // of x; more are multiplied by tensor cores
constexpr int kVectors = 4;         // of 16 bytes of a row, a lane
constexpr int64_t kMostColumns = kStreamWarps * 32 * kVectors * kVector;
constexpr int kMostStages = 8;
constexpr int64_t kRingBytes = 160 * 1024;
/// So much shared memory that no two blocks share a multiprocessor, whatever else is on the others.
constexpr size_t kLeastShared = 116 * 1024;
/// Less is done before streaming has begun.
constexpr int64_t kLeastBytes = 256 * 1024;
/// Of a block's share, from which on rows are drawn: what it costs that tiles are not known
/// beforehand is more than what a short product wins.
constexpr int64_t kDrawFromBytes = 400 * 1024;
/// Drawn at once, in whole tiles: an answer takes less than such rows do.
constexpr int64_t kDrawnBytes = 20 * 1024;
/// Larger tiles (of short rows) are not drawn: the end would be as uneven.
constexpr int64_t kMostDrawnBytes = 32 * 1024;
/// On its way of a block that draws: enough for memory, and less that a slow one has yet to wait
/// for when the last rows are gone.
constexpr int64_t kAheadBytes = 96 * 1024;

/// Numbers the draws of all blocks. It is zero between products: each block draws in vain once, and
/// the last draw there is makes it zero again. One is enough for all products of a device, as they
/// have one stream and nobody draws before the kernels before this one are done.
__device__ unsigned turn;

__device__ __forceinline__ float dot(const uint4& w, const uint4& x, float sum) {
  sum = fmaf(first_of(w.x), first_of(x.x), sum);
  sum = fmaf(second_of(w.x), second_of(x.x), sum);
  sum = fmaf(first_of(w.y), first_of(x.y), sum);
  sum = fmaf(second_of(w.y), second_of(x.y), sum);
  sum = fmaf(first_of(w.z), first_of(x.z), sum);
  sum = fmaf(second_of(w.z), second_of(x.z), sum);
  sum = fmaf(first_of(w.w), first_of(x.w), sum);
  return fmaf(second_of(w.w), second_of(x.w), sum);
}

// Who sums a row does not change its sum: memory serves some multiprocessors faster than others,
// and with kDraws those take more of the rows that are not dealt.
template <int kM, bool kDraws, class Y>
__global__ void __launch_bounds__(kStreamThreads)
    stream_kernel(const __grid_constant__ StreamRows<Y> a) {
  extern __shared__ __align__(128) uint4 ring[];
  __shared__ TileRows told[kMostStages];   // by the bringer, where rows are drawn
  __shared__ uint64_t known[kMostStages];  // which tile it will be
  __shared__ uint64_t full[kMostStages];   // the tile is there
  __shared__ uint64_t ready[kMostStages];  // its parts are
  __shared__ uint64_t empty[kMostStages];  // and have been read
  __shared__ __align__(16) float parts[kMostStages][kM][kStreamWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int vectors = a.k / kVector;  // of a row
  const int tile_vectors = vectors * (kStreamWarps >> a.team_bits);
  if (threadIdx.x == 0) {
    for (int s = 0; s < a.stages; ++s) {
      if (kDraws) {
        init_barrier(&known[s], 1);
      }
      init_barrier(&full[s], 1);
      init_barrier(&ready[s], kStreamWarps);
      init_barrier(&empty[s], 1);
    }
    barriers_ready();
  }
  __syncthreads();
  Tile tile(a, a.dealt);
  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == a.stages) {
      stage = 0;
      parity ^= 1;
    }
  };

  if (warp == kBringer) {
    if (lane > 0) {
      return;
    }
    if (a.before_inputs == 0) {
      await_inputs();
    }
    int64_t drawn = -1;  // the number
    for (int brought = 0; kDraws || tile.exists(); ++brought, advance()) {
      const int done = brought - (drawn >= 0 ? a.ahead : a.stages);
      if (done >= 0) {
        await_phase(&empty[done % a.stages], done / a.stages % 2);
      }
      if constexpr (kDraws) {
        if (!tile.exists() && drawn >= 0) {
          const auto row = static_cast<int>(min(a.dealt + drawn * a.drawn, int64_t{a.rows}));
          tile.take(a, row, min(row + a.drawn, a.rows));
        }
        told[stage] = tile;
        arrive(&known[stage]);
        if (!tile.exists()) {
          arrive(&full[stage]);
          break;
        }
      }
      const StreamProduct<Y>& p = a.each[tile.product];
      const auto bytes = static_cast<uint32_t>(tile.rows * vectors * sizeof(uint4));
      arrive_expecting(&full[stage], bytes);
      copy_bulk_once(ring + stage * tile_vectors,
                     p.weight + static_cast<int64_t>(tile.row - p.first_row) * a.k, bytes,
                     &full[stage]);
      tile.next(a);
      if (kDraws && !tile.exists()) {
        // The answer is there when the next one is wanted.
        await_inputs();
        drawn = atomicInc(&turn, static_cast<unsigned>(a.last_draw));
      }
    }
    return;
  }

  await_inputs();
  if (warp == kFinisher) {
    const int team_warps = 1 << a.team_bits;
    const int teams = kStreamWarps >> a.team_bits;
    const int row = lane & (teams - 1);
    const int m = lane >> (4 - a.team_bits);
    for (;; tile.next(a), advance()) {
      if (kDraws) {
        await_phase(&known[stage], parity);
      }
      const TileRows its = kDraws ? told[stage] : tile;
      if (its.rows == 0) {
        break;
      }
      const StreamProduct<Y>& p = a.each[its.product];
      const int n = its.row - p.first_row + row;
      const bool exists = row < its.rows;
      const float bias = exists && p.bias != nullptr ? p.bias[n] : 0.0F;
      await_phase(&ready[stage], parity);
      // Lane by lane a row of the tile and one of x.
      float sum = 0.0F;
      if (m < kM) {
        const float* part = &parts[stage][m][row << a.team_bits];
#pragma unroll 4
        for (int w = 0; w < team_warps; ++w) {
          sum += part[w];
        }
      }
      __syncwarp();
      if (lane == 0) {
        arrive(&empty[stage]);
      }
      if (m < kM && exists) {
        Y* y = p.y + m * p.y_stride + n;
        store(y, (p.accumulate != 0 ? load(y) : 0.0F) + bias + sum);
      }
    }
    return;
  }

  const int team = warp >> a.team_bits;
  const int step = 32 << a.team_bits;
  const int first = threadIdx.x & (step - 1);
  uint4 x[kM][kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      x[m][v] =
          first + v * step < vectors
              ? *reinterpret_cast<const uint4*>(a.x + m * a.x_stride + (first + v * step) * kVector)
              : uint4{};
    }
  }
  for (;; tile.next(a), advance()) {
    if (kDraws) {
      await_phase(&full[stage], parity);
    }
    const int rows = kDraws ? told[stage].rows : tile.rows;
    if (rows == 0) {
      break;
    }
    if (!kDraws) {
      await_phase(&full[stage], parity);
    }
    if (team < rows) {
      const uint4* row = ring + stage * tile_vectors + team * vectors;
      float sum[kM] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (first + v * step < vectors) {
          const uint4 w = row[first + v * step];
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            sum[m] = dot(w, x[m][v], sum[m]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        sum[m] = warp_sum(sum[m]);
        if (lane == 0) {
          parts[stage][m][warp] = sum[m];
        }
      }
    }
    __syncwarp();
    if (lane == 0) {
      arrive(&ready[stage]);
    }
  }
}

}  // namespace

namespace {

/// Whether rows are drawn. Then half of the rows are dealt to `blocks` blocks,
/// and at least what the ring holds, since it is filled before draws may be made.
template <class Y>
bool deal_half(StreamRows<Y>& a, int64_t blocks, int64_t row_bytes) {
  a.dealt = a.rows;
  if (a.rows * row_bytes < kDrawFromBytes * blocks) {
    return false;
  }
  const int64_t tile_rows = kStreamWarps >> a.team_bits;
  const int64_t tile_bytes = tile_rows * row_bytes;
  if (tile_bytes > kMostDrawnBytes) {
    return false;
  }
  const int64_t tiles = tile_bytes < kDrawnBytes ? kDrawnBytes / tile_bytes : 1;
  a.drawn = static_cast<int32_t>(tiles * tile_rows);
  const int64_t ahead = kAheadBytes / (a.drawn * row_bytes);
  a.ahead = static_cast<int32_t>(ahead < a.stages ? ahead : a.stages);
  const int64_t half = int64_t{a.rows} / 2 / (blocks * tile_rows);
  a.dealt = static_cast<int32_t>(blocks * tile_rows * (half > a.stages ? half : a.stages));
  a.last_draw = static_cast<int32_t>(ceil_div(a.rows - a.dealt, a.drawn) + blocks - 1);
  return true;
}

}  // namespace

template <class Y>
bool stream_rows(const MatmulsTo<bf16, Y>& all, const Launch& on) {
  static_assert(kSummedRows * kStreamWarps == 32, "a lane finishes one element");
  const MatmulTo<bf16, Y>& first = all.each[0];
  StreamRows<Y> a{};
  const int64_t k = first.weight.inputs();
  a.x = first.x.data;
  a.x_stride = first.x.rows.outer_stride;
  a.before_inputs = on.recorder != nullptr ? 1 : 0;
  if (!launches_ahead() || k % kVector != 0 || k > kMostColumns || !aligned(first.x)) {
    return false;
  }
  int64_t rows = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    const MatmulTo<bf16, Y>& p = all.each[i];
    const bf16* weight = p.weight.narrow.data;
    if (weight == nullptr || !aligned(weight)) {
      return false;
    }
    a.each[i] = {weight,
                 p.bias.data,
                 p.y.data,
                 p.y.rows.outer_stride,
                 static_cast<int32_t>(rows),
                 p.accumulate ? 1 : 0};
    rows += p.y.channels;
  }
  const int64_t row_bytes = k * static_cast<int64_t>(sizeof(bf16));
  if (rows * row_bytes < kLeastBytes || rows > INT32_MAX) {
    return false;
  }
  a.rows = static_cast<int32_t>(rows);
  a.k = static_cast<int32_t>(k);
  a.count = static_cast<int32_t>(all.count);
  if (first.x.count() > kSummedRows) {
    return stream_by_tensor_cores(a, first.x.count(), on);
  }
  while ((32 * kVectors * kVector << a.team_bits) < k) {
    ++a.team_bits;
  }
  const int64_t tile_bytes = (kStreamWarps >> a.team_bits) * row_bytes;
  const int64_t stages = kRingBytes / tile_bytes;
  a.stages = static_cast<int32_t>(stages < kMostStages ? stages : kMostStages);
  const size_t ring = static_cast<size_t>(a.stages * tile_bytes);
  const size_t shared = ring < kLeastShared ? kLeastShared : ring;
  if (shared > most_shared()) {
    return false;
  }
  const auto with = [&](auto dealing, auto drawing) {
    const int64_t resident = resident_blocks(dealing, kStreamThreads, shared);
    const int64_t blocks = rows < resident ? rows : resident;
    const bool draws = deal_half(a, blocks, row_bytes);
    launch_ahead(on, "matmul", draws ? drawing : dealing, dim3(static_cast<unsigned>(blocks)),
                 dim3(kStreamThreads), shared, a);
  };
  if (first.x.count() == 1) {
    with(stream_kernel<1, false, Y>, stream_kernel<1, true, Y>);
  } else {
    with(stream_kernel<2, false, Y>, stream_kernel<2, true, Y>);
  }
  return true;
}
template bool stream_rows(const Matmuls<bf16>&, const Launch&);
template bool stream_rows(const UnroundedMatmuls<bf16>&, const Launch&);

}  // namespace cambium::cuda
