// Products of experts in bf16 by tensor cores, fed by copies in the background.
//
// Tiles of the result are dealt to as many blocks as the device holds. How many rows an expert has
// only the device knows: every block counts the tiles of the experts before it begins. A block goes
// through the steps of depth of one tile after another without a pause, its copies some steps ahead
// of its products, over the ends of tiles too. Beside each other run tiles of one expert that share
// columns of its weight, so that memory gives each weight once.
//
// Few rows take narrow tiles, for which reading the weights is what takes time; many take tiles of
// 128 rows, or 192, and where the device has them products of warpgroups: L2 gives the numbers of
// larger tiles fewer times. An element is summed in the order of the depth, 16 at a time; where the
// call must not depend on its batch, always by the tiles for many rows.
#include <algorithm>

#include "ops/experts/experts_tiles_cuda.cuh"

namespace cambium::cuda {
namespace {

using namespace expert_tiles;

using Rows16 = Shape<16, 64, 128, 4, 1, 4, 2>;
using Rows32 = Shape<32, 64, 128, 4, 1, 4, 2>;
using Rows64 = Shape<64, 128, 64, 4, 2, 2, 2>;
using Rows128 = Shape<128, 128, 64, 3, 4, 2, 1>;
using Wide = Shape<128, 256, 64, 4, 2, 4, 1, true>;
using Wider = Shape<192, 256, 64, 4, 3, 4, 1, true>;

template <class S>
size_t shared_bytes(int64_t experts) {
  return sizeof(bf16) * S::kStages * S::kStage + tile_count_bytes<S::kThreads>(experts);
}

template <class S, ExpertsUse kUse, class C>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    grouped_product(const __grid_constant__ ExpertsProduct<C> g) {
  constexpr bool kATurned = kRowsInDepth<kUse>;
  constexpr bool kBTurned = kUse == ExpertsUse::kGradInput || kUse == ExpertsUse::kGradWeight;
  extern __shared__ __align__(1024) uint4 shared[];
  auto* stages = reinterpret_cast<bf16*>(shared);
  int* first_tile = reinterpret_cast<int*>(stages + S::kStages * S::kStage);
  await_inputs();
  count_tiles<S::kThreads>(g.start, g.experts, first_tile,
                           [&](int rows) { return tiles_of<S, kUse>(g, rows); });
  using At = Step<S, kUse, C>;
  At ahead(g, first_tile);
  int ahead_stage = 0;
  const auto copy = [&] {
    if (ahead.exists) {
      copy_step(g, ahead, stages + ahead_stage * S::kStage);
      ahead.next(g, first_tile);
      ahead_stage = ahead_stage + 1 == S::kStages ? 0 : ahead_stage + 1;
    }
    commit_copies();
  };
  At at = ahead;
#pragma unroll 1
  for (int i = 0; i < S::kAhead; ++i) {
    copy();
  }
  int stage = 0;
  for (; at.exists; at.next_tile(g, first_tile)) {
    Sums<S> sums;
    sums.clear();
    // The same for a warp, and known to be: products of a warpgroup are not to diverge. Of one
    // without rows nothing is stored.
    const bool has_rows = __shfl_sync(kAll, Sums<S>::row() / 64 * 64 < at.rows, 0) != 0;
    const int depths = __shfl_sync(kAll, at.depths, 0);
    int depth = 0;
#pragma unroll 1
    do {
      wait_for_copies<S::kAhead - 1>();
      if constexpr (S::kWarpgroups) {
        publish_to_products();
      }
      __syncthreads();  // the step is here; what is written next has been read
      const bf16* a = stages + stage * S::kStage;
      const bf16* b = a + S::kM * S::kDepth;
      if constexpr (S::kWarpgroups) {
        pin(sums.of[0]);
        if (has_rows) {
          begin_multiply<S, kATurned, kBTurned>(a, b, sums);
          commit_products();
        }
        copy();
        wait_for_products<1>();
      } else {
        copy();
        multiply<S, kATurned, kBTurned>(a, b, sums);
      }
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
      depth += S::kDepth;
    } while (depth < depths);
    if constexpr (S::kWarpgroups) {
      wait_for_products<0>();
      pin(sums.of[0]);
    }
    if (g.bias != nullptr || g.accumulate) {
      put<true>(g, at, sums);
    } else {
      put<false>(g, at, sums);
    }
  }
}

template <class S, ExpertsUse kUse, class C>
bool run_shape(const ExpertsProduct<C>& p, const ExpertLists& lists, const Launch& on) {
  const size_t shared = shared_bytes<S>(p.experts);
  if (shared > most_shared()) {
    return false;
  }
  // Every expert that has rows may have a tile of rows that is not full.
  const int64_t row_tiles = kRowsInDepth<kUse>
                                ? p.experts * ceil_div(p.m, S::kM)
                                : lists.rows() / S::kM + std::min(lists.rows(), lists.experts);
  const int64_t tiles = row_tiles * ceil_div(p.n, kColumns<S, kUse>);
  const auto kernel = grouped_product<S, kUse, C>;
  const int64_t blocks = std::min(tiles, resident_blocks(kernel, S::kThreads, shared));
  constexpr const char* kOperation = kUse == ExpertsUse::kHidden    ? "experts_hidden"
                                     : kUse == ExpertsUse::kForward ? "experts_matmul"
                                                                    : "experts_matmul's gradient";
  launch_ahead(on, kOperation, kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads),
               shared, p);
  return true;
}

/// The rows that an expert has evenly: most have little more.
int64_t even_rows(const ExpertLists& lists) {
  return ceil_div(lists.rows(), lists.experts);
}

template <ExpertsUse kUse, class C>
bool run_many_rows(const ExpertsProduct<C>& p, const ExpertLists& lists, const Launch& on) {
  if (!has_warpgroups()) {
    return run_shape<Rows128, kUse>(p, lists, on);
  }
  if constexpr (!kRowsInDepth<kUse>) {
    // Where one tile has most experts' rows, their weights are read once.
    const int64_t even = even_rows(lists);
    if (!on.batch_invariant && even > 112 && even <= 176 && run_shape<Wider, kUse>(p, lists, on)) {
      return true;
    }
  }
  return run_shape<Wide, kUse>(p, lists, on);
}

template <ExpertsUse kUse>
bool run_rows(const ExpertsProduct<bf16>& p, const ExpertLists& lists, const Launch& on) {
  const int64_t even = even_rows(lists);
  if (!on.batch_invariant && even <= 8) {
    return run_shape<Rows16, kUse>(p, lists, on);
  }
  if (!on.batch_invariant && even <= 20) {
    return run_shape<Rows32, kUse>(p, lists, on);
  }
  if (!on.batch_invariant && even <= 48) {
    return run_shape<Rows64, kUse>(p, lists, on);
  }
  return run_many_rows<kUse>(p, lists, on);
}

}  // namespace

bool experts_by_tensor_cores(ExpertsUse use, const ExpertsProduct<bf16>& p,
                             const ExpertLists& lists, const Launch& on) {
  if (!on.batch_invariant && even_rows(lists) >= experts_pair_rows &&
      experts_by_pairs(use, p, lists, on)) {
    return true;
  }
  switch (use) {
    case ExpertsUse::kForward:
      return run_rows<ExpertsUse::kForward>(p, lists, on);
    case ExpertsUse::kHidden:
      return run_rows<ExpertsUse::kHidden>(p, lists, on);
    case ExpertsUse::kGradInput:
      return run_many_rows<ExpertsUse::kGradInput>(p, lists, on);
    case ExpertsUse::kGradWeight:
      break;
  }
  return false;
}

bool experts_by_tensor_cores(const ExpertsProduct<float>& p, const ExpertLists& lists,
                             const Launch& on) {
  return run_many_rows<ExpertsUse::kGradWeight>(p, lists, on);
}

}  // namespace cambium::cuda
