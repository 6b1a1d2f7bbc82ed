// The rows of experts: slots ordered by expert, by counting and without atomics, so that the order
// of an expert's slots is kept.
#include "ops/experts/experts_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffU;
constexpr int kOrderThreads = 256;

/// Block e places the slots of expert e: after those of lower experts, in their order.
__global__ void __launch_bounds__(kOrderThreads) rows_of_expert(ExpertLists lists) {
  constexpr int kWarps = kOrderThreads / 32;
  __shared__ int below_of[kWarps];
  __shared__ int own_of[kWarps];
  await_inputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int expert = static_cast<int>(blockIdx.x);
  const int64_t slots = lists.rows();
  int below = 0;
  int own = 0;
  for (int64_t s = threadIdx.x; s < slots; s += kOrderThreads) {
    below += lists.expert[s] < expert ? 1 : 0;
    own += lists.expert[s] == expert ? 1 : 0;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    below += __shfl_xor_sync(kAll, below, lanes);
    own += __shfl_xor_sync(kAll, own, lanes);
  }
  if (lane == 0) {
    below_of[warp] = below;
    own_of[warp] = own;
  }
  __syncthreads();
  below = 0;
  own = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    below += below_of[w];
    own += own_of[w];
  }
  if (threadIdx.x == 0) {
    lists.start[expert] = below;
    if (expert + 1 == lists.experts) {
      lists.start[lists.experts] = below + own;
    }
  }
  if (own == 0) {
    return;
  }
  int base = below;
  for (int64_t first = 0; first < slots; first += kOrderThreads) {
    const int64_t s = first + threadIdx.x;
    const bool mine = s < slots && lists.expert[s] == expert;
    const unsigned here = __ballot_sync(kAll, mine);
    __syncthreads();  // the array is not read any more
    if (lane == 0) {
      own_of[warp] = __popc(here);
    }
    __syncthreads();
    int before = 0;
    int total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? own_of[w] : 0;
      total += own_of[w];
    }
    if (mine) {
      const int row = base + before + __popc(here & ((1U << lane) - 1U));
      lists.row[s] = row;
      lists.slot[row] = static_cast<int32_t>(s);
    }
    base += total;
  }
}

// --- Many slots: chunks of them are counted, the counts are added up, and each chunk places its
// own. counts (chunks, E): of a chunk's slots, then of those of chunks before it.

constexpr int kSlotsOfChunk = 256;  // a warp's
constexpr int kChunkWarps = 4;
constexpr int kAddedExperts = 32;  // of a block

/// Calls f(slot, next[expert]) for the slots of this warp's chunk in order, 32 at a time, and
/// counts next[expert] on.
template <class F>
__device__ __forceinline__ void each_slot(const ExpertLists& lists, int chunk, int* next,
                                          const F& f) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int first = 0; first < kSlotsOfChunk; first += 32) {
    const int64_t s = int64_t{chunk} * kSlotsOfChunk + first + lane;
    const bool exists = s < lists.rows();
    const int expert = exists ? lists.expert[s] : -1;
    const unsigned same = __match_any_sync(kAll, expert);
    const int at = exists ? next[expert] + __popc(same & ((1U << lane) - 1U)) : 0;
    __syncwarp();  // all have read
    if (exists) {
      f(static_cast<int>(s), at);
    }
    if (exists && same >> lane == 1U) {
      next[expert] = at + 1;
    }
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kChunkWarps * 32)
    count_chunks(ExpertLists lists, int chunks, int* counts) {
  extern __shared__ int shared_counts[];  // (kChunkWarps, E)
  await_inputs();
  const int experts = static_cast<int>(lists.experts);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int chunk = static_cast<int>(blockIdx.x) * kChunkWarps + static_cast<int>(threadIdx.x / 32);
  int* own = shared_counts + static_cast<int>(threadIdx.x / 32) * experts;
  if (chunk >= chunks) {
    return;
  }
  for (int e = lane; e < experts; e += 32) {
    own[e] = 0;
  }
  __syncwarp();
  each_slot(lists, chunk, own, [](int, int) {});
  for (int e = lane; e < experts; e += 32) {
    counts[int64_t{chunk} * experts + e] = own[e];
  }
}

/// Warps take ranges of chunks, lanes experts. totals (E): the rows of each.
__global__ void __launch_bounds__(1024)
    add_chunks(int experts, int chunks, int* counts, int* totals) {
  __shared__ int sums[32][kAddedExperts];
  await_inputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int expert = static_cast<int>(blockIdx.x) * kAddedExperts + lane;
  const int each = (chunks + 31) / 32;
  const int begin = min(warp * each, chunks);
  const int end = min(begin + each, chunks);
  int sum = 0;
  if (expert < experts) {
#pragma unroll 4
    for (int c = begin; c < end; ++c) {
      sum += counts[int64_t{c} * experts + expert];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (expert >= experts) {
    return;
  }
  int below = 0;
  for (int w = 0; w < warp; ++w) {
    below += sums[w][lane];
  }
  if (warp == 31) {
    totals[expert] = below + sum;
  }
  for (int c = begin; c < end; ++c) {
    int* at = counts + int64_t{c} * experts + expert;
    const int own = *at;
    *at = below;
    below += own;
  }
}

__global__ void __launch_bounds__(kChunkWarps * 32)
    place_chunks(ExpertLists lists, int chunks, const int* counts, const int* totals) {
  extern __shared__ int next_row[];  // (kChunkWarps, E)
  __shared__ int sums[kChunkWarps];
  await_inputs();
  const int experts = static_cast<int>(lists.experts);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  // Every block adds up the totals for itself: those of experts of earlier threads and warps.
  const int each = (experts + kChunkWarps * 32 - 1) / (kChunkWarps * 32);
  const int begin = min(static_cast<int>(threadIdx.x) * each, experts);
  const int end = min(begin + each, experts);
  int own = 0;
  for (int e = begin; e < end; ++e) {
    own += totals[e];
  }
  int below = own;  // and own
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(kAll, below, lanes);
    below += lane >= lanes ? other : 0;
  }
  if (lane == 31) {
    sums[warp] = below;
  }
  __syncthreads();
  below -= own;
  for (int w = 0; w < warp; ++w) {
    below += sums[w];
  }
  for (int e = begin; e < end; ++e) {
    for (int w = 0; w < kChunkWarps; ++w) {
      next_row[w * experts + e] = below;
    }
    if (blockIdx.x == 0) {
      lists.start[e] = below;
    }
    below += totals[e];
    if (blockIdx.x == 0 && e + 1 == experts) {
      lists.start[experts] = below;
    }
  }
  __syncthreads();
  const int chunk = static_cast<int>(blockIdx.x) * kChunkWarps + warp;
  if (chunk >= chunks) {
    return;
  }
  int* next = next_row + warp * experts;
  for (int e = lane; e < experts; e += 32) {
    next[e] += counts[int64_t{chunk} * experts + e];
  }
  __syncwarp();
  each_slot(lists, chunk, next, [&](int slot, int row) {
    lists.row[slot] = row;
    lists.slot[row] = slot;
  });
}

/// More slots than that are ordered by chunks: rows_of_expert looks at all of them for every
/// expert.
constexpr int64_t kManySlots = 4096;

}  // namespace

void order_rows(const ExpertLists& lists, const Launch& on) {
  const auto experts = static_cast<int>(lists.experts);
  if (lists.rows() <= kManySlots) {
    launch_ahead(on, "route", rows_of_expert, static_cast<unsigned>(experts), kOrderThreads, 0,
                 lists);
    return;
  }
  const auto chunks = static_cast<int>(ceil_div(lists.rows(), kSlotsOfChunk));
  const auto blocks = static_cast<unsigned>(ceil_div(chunks, kChunkWarps));
  const size_t shared = sizeof(int) * kChunkWarps * static_cast<size_t>(experts);
  int* counts = scratch<int>(on, int64_t{chunks} * experts);
  int* totals = scratch<int>(on, experts);
  launch_ahead(on, "route", count_chunks, blocks, kChunkWarps * 32, shared, lists, chunks, counts);
  launch_ahead(on, "route", add_chunks, static_cast<unsigned>(ceil_div(experts, kAddedExperts)),
               1024, 0, experts, chunks, counts, totals);
  launch_ahead(on, "route", place_chunks, blocks, kChunkWarps * 32, shared, lists, chunks,
               static_cast<const int*>(counts), static_cast<const int*>(totals));
}

}  // namespace cambium::cuda
