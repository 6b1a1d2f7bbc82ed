// Backward of attention in bf16 by products of warpgroups (sm_90a), for heads of 64 and 128
// numbers; attention_backward_cuda.cu has the formulas. Sums are fp32, P and dS are rounded to bf16
// for their products.
//
// As there, scores are computed twice, seven products in all. One kernel has tiles of keys and
// walks the tokens that see them, for one head of queries after another, so that dK and dV are sums
// in a fixed order; the other has tiles of the tokens of a head and walks the keys they see for dQ.
// In both, two warpgroups have 64 rows each and share the tiles of 64 tokens that are walked, which
// one warp brings stages ahead. Rows of tiles are the first axis of every product of a warpgroup:
// P and dS go from one product to the next in registers, turned where they are of (key, token).
//
// Boxes reach over the end of a segment, into the next one's numbers: these are finite, and their
// weights 0.
#include <atomic>

#include "ops/attention/attention_backward_wgmma.cuh"
#include "ops/attention/attention_cudnn.h"
#include "ops/attention/attention_wgmma.h"

namespace cambium::cuda::attention {
namespace {

using namespace wgmma;

constexpr int kNumbersBlock = 256;

/// RowNumbers of every token and head, each by kDim / 8 lanes.
template <int kDim>
__global__ void __launch_bounds__(kNumbersBlock)
    row_numbers(const View<bf16> y, const float* largest, const float* inverse_sum, int heads,
                int tokens, RowNumbers* numbers) {
  constexpr int kLanes = kDim / 8;
  const int64_t i = (int64_t{blockIdx.x} * kNumbersBlock + threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool exists = i < int64_t{heads} * tokens;
  const int64_t head = exists ? i / tokens : 0;
  const int64_t token = exists ? i % tokens : 0;
  float out[8];
  float grad[8];
  load_n<8>(y.row(token, head) + lane * 8, out);
  load_n<8>(y.grad_row(token, head) + lane * 8, grad);
  float sum = 0.0F;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    sum = fmaf(out[e], grad[e], sum);
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, lanes);
  }
  if (exists && lane == 0) {
    const int64_t at = token * heads + head;
    numbers[i] = {largest[at] - log2f(inverse_sum[at]), sum};
  }
}

// --- dK and dV. Scores are of (key, token). A warpgroup begins, of each tile in turn, S' = K Q',
// dK += dS' Q of the tile before and dP' = V dY', takes P' while the last two are under way, begins
// dV += P' dY and takes dS' (heads of 64: meanwhile).

/// The warp that copies: a head of queries after another.
template <int kDim>
__device__ __forceinline__ void bring_tokens(const Args& a, const Boxes& boxes, const Own& own,
                                             int kv_head, int end, Shared<kDim>& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) {
    copy_own(s, boxes.k, boxes.v, kv_head, own.start + own.tile.first_key);
  }
  RingPlace<kStages<kDim>> at;
  for (int i = 0; i < a.layout.group; ++i) {
    const int head = kv_head * a.layout.group + i;
    const RowNumbers* of_head = a.numbers + int64_t{head} * a.tokens + own.start;
    for (int first = own.tile.first_key; first < end; first += kRows) {
      const int t = first + lane;
      const RowNumbers numbers[2] = {numbers_of(of_head + t, t < end),
                                     numbers_of(of_head + t + 32, t + 32 < end)};
      copy_walked(s, at, boxes.q, boxes.dy, head, own.start + first, numbers);
    }
  }
}

template <int kDim>
__device__ __forceinline__ void key_grads_of_group(const Args& a, const Own& own, int kv_head,
                                                   int end, int group, Shared<kDim>& s) {
  constexpr bool kHeld = kDim <= 64;
  const Layout& layout = a.layout;
  const int begin = own.tile.first_key;
  const int own_first = begin + group * kRows;
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  const int key = own_first + thread / 32 * 16 + thread % 32 / 4;
  const int tiles = layout.group * ((end - begin + kRows - 1) / kRows);
  const int span = span_of(layout);
  const float scale = layout.scale * kLog2E;
  await_phase(&s.own_full, 0);
  Left<kDim, kHeld> keys(s.own[group][0]);
  Left<kDim, kHeld> values(s.own[group][1]);
  float x[kRows / 8][4];   // S', P'
  float dp[kRows / 8][4];  // dP', dS'
  float dk[kDim / 8][4] = {};
  float dv[kDim / 8][4] = {};
  uint32_t p[kRows / 16][4];
  uint32_t ds[kRows / 16][4];
  RingPlace<kStages<kDim>> at;
  int before = 0;  // the stage of the tile before
  int first = begin;
  pin(dk);
  pin(dv);
  const auto step = [&]<bool kFirst>() {
    const RowNumbers* numbers = s.numbers[at.stage];
    const Rows64<kDim>& dy = s.walked[at.stage][1];
    await_phase(&s.full[at.stage], at.parity);
    keys.multiply(s.walked[at.stage][0], x);
    if constexpr (!kFirst) {
      add_product<kDim>(ds, s.walked[before][0], dk);
    }
    values.multiply(dy, dp);
    wait_for_products<kFirst ? 1 : 2>();
    pin(x);
    weigh_tokens(scale, numbers, see_all(first - own_first, span), first - key, span, x);
    wait_for_products<1>();
    if constexpr (!kFirst) {
      release(&s.empty[before]);
    }
    pack_all(x, p);
    add_product<kDim>(p, dy, dv);
    wait_for_products<kHeld ? 1 : 0>();  // of wide heads the registers of P are needed
    pin(dp);
    differ_tokens(numbers, x, dp);
    pack_all(dp, ds);
    wait_for_products<0>();
    before = at.stage;
    at.next();
    first = first + kRows < end ? first + kRows : begin;
  };
  step.template operator()<true>();
#pragma unroll 1
  for (int i = 1; i < tiles; ++i) {
    step.template operator()<false>();
  }
  add_product<kDim>(ds, s.walked[before][0], dk);
  wait_for_products<0>();
  pin(dk);
  pin(dv);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = key + 8 * half;
    if (position >= own.tile.end_key) {
      continue;
    }
    // k and v may be the same memory: one thread puts both, the one that is set first.
    const int64_t token = int64_t{own.start} + position;
    const bool values_first = a.set_v && !a.set_k;
    if (a.v.grad != nullptr && values_first) {
      put_row(a.v.grad_row(token, kv_head), true, dv, half, 1.0F);
    }
    if (a.k.grad != nullptr) {
      put_row(a.k.grad_row(token, kv_head), a.set_k, dk, half, layout.scale);
    }
    if (a.v.grad != nullptr && !values_first) {
      put_row(a.v.grad_row(token, kv_head), a.set_v, dv, half, 1.0F);
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(kBlock, 1)
    key_grads(const __grid_constant__ Args a, const __grid_constant__ Boxes boxes) {
  if constexpr (kWarpgroups) {
    extern __shared__ __align__(1024) uint4 shared[];
    auto& s = *reinterpret_cast<Shared<kDim>*>(shared);
    init_barriers(s);
    const int kv_head = static_cast<int>(blockIdx.x % a.layout.kv_heads);
    const Own own = find_own(a.layout, a.tiles[blockIdx.x / a.layout.kv_heads]);
    const int end = a.layout.end_token(own.tile, own.length);
    // The same for a warp, and known to be: products of a warpgroup are not to diverge.
    const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp >= kGroups * 4) {
      leave_registers<24>();
      if (warp == kGroups * 4) {
        bring_tokens(a, boxes, own, kv_head, end, s);
      }
    } else {
      take_registers<240>();
      key_grads_of_group(a, own, kv_head, end, warp / 4, s);
    }
  }
}

// --- dQ. Scores are of (token, key). A warpgroup begins, of each tile in turn, S = Q K', dQ += dS
// K of the tile before and dP = dY V', takes P while the last two are under way, and then dS.

/// The warp that copies.
template <int kDim>
__device__ __forceinline__ void bring_keys(const Args& a, const Boxes& boxes, const Own& own,
                                           int head, Shared<kDim>& s) {
  if (threadIdx.x % 32 == 0) {
    copy_own(s, boxes.q, boxes.dy, head, own.start + own.tile.first_row / a.layout.group);
  }
  RingPlace<kStages<kDim>> at;
  for (int first = own.tile.first_tile<kRows>(); first < own.tile.end_key; first += kRows) {
    copy_walked(s, at, boxes.k, boxes.v, head / a.layout.group, own.start + first, nullptr);
  }
}

template <int kDim>
__device__ __forceinline__ void query_grads_of_group(const Args& a, const Own& own, int head,
                                                     int group, Shared<kDim>& s) {
  const Layout& layout = a.layout;
  const int own_first = own.tile.first_row / layout.group + group * kRows;
  const int begin = own.tile.first_tile<kRows>();
  // Later keys are of the other warpgroup's tokens alone; the last stages need no release.
  const int end = min(own.tile.end_key, own_first + kRows);
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  const int position = own_first + thread / 32 * 16 + thread % 32 / 4;
  const int tiles = (end - begin + kRows - 1) / kRows;
  const int span = span_of(layout);
  const float scale = layout.scale * kLog2E;
  RowNumbers numbers[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = position + 8 * half;
    numbers[half] =
        numbers_of(a.numbers + int64_t{head} * a.tokens + own.start + t, t < own.length);
  }
  await_phase(&s.own_full, 0);
  Left<kDim, true> q(s.own[group][0]);
  Left<kDim, true> dy(s.own[group][1]);
  float x[kRows / 8][4];   // S, P
  float dp[kRows / 8][4];  // dP, dS
  float dq[kDim / 8][4] = {};
  uint32_t ds[kRows / 16][4];
  RingPlace<kStages<kDim>> at;
  int before = 0;  // the stage of the tile before
  int first = begin;
  pin(dq);
  const auto step = [&]<bool kFirst>() {
    await_phase(&s.full[at.stage], at.parity);
    q.multiply(s.walked[at.stage][0], x);
    if constexpr (!kFirst) {
      add_product<kDim>(ds, s.walked[before][0], dq);
    }
    dy.multiply(s.walked[at.stage][1], dp);
    wait_for_products<kFirst ? 1 : 2>();
    pin(x);
    weigh_keys(scale, numbers, see_all(own_first - first, span), position - first, span, x);
    wait_for_products<0>();
    if constexpr (!kFirst) {
      release(&s.empty[before]);
    }
    pin(dp);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dp[n][e] = x[n][e] * (dp[n][e] - numbers[e / 2].delta);
      }
    }
    pack_all(dp, ds);
    before = at.stage;
    at.next();
    first += kRows;
  };
  step.template operator()<true>();
#pragma unroll 1
  for (int i = 1; i < tiles; ++i) {
    step.template operator()<false>();
  }
  add_product<kDim>(ds, s.walked[before][0], dq);
  wait_for_products<0>();
  pin(dq);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = position + 8 * half;
    if (t < own.length) {
      put_row(a.q.grad_row(own.start + t, head), a.set_q, dq, half, layout.scale);
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(kBlock, 1)
    query_grads(const __grid_constant__ Args a, const __grid_constant__ Boxes boxes) {
  if constexpr (kWarpgroups) {
    extern __shared__ __align__(1024) uint4 shared[];
    auto& s = *reinterpret_cast<Shared<kDim>*>(shared);
    init_barriers(s);
    const int head = static_cast<int>(blockIdx.x % a.layout.heads);
    const Own own = find_own(a.layout, a.tiles[blockIdx.x / a.layout.heads]);
    const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp >= kGroups * 4) {
      leave_registers<24>();
      if (warp == kGroups * 4) {
        bring_keys(a, boxes, own, head, s);
      }
    } else {
      take_registers<240>();
      query_grads_of_group(a, own, head, warp / 4, s);
    }
  }
}

bool describe(const View<bf16>& x, const bf16* data, int64_t tokens, CUtensorMap& map) {
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  return describe_boxes<3>({.data = data,
                            .size = {size(x.channels), size(x.rows.inner), size(tokens)},
                            .stride = {size(x.rows.inner == 1 ? x.channels : x.rows.inner_stride),
                                       size(x.rows.outer_stride)},
                            .box = {kTileColumns, 1, kRows}},
                           map);
}

template <int kDim>
bool run_backward(const Attention<bf16>& a, const Launch& on) {
  const AttentionShape& shape = a.shape;
  const int64_t tokens = shape.start[shape.segments];
  Boxes boxes;
  if (!describe(a.q, a.q.data, tokens, boxes.q) || !describe(a.k, a.k.data, tokens, boxes.k) ||
      !describe(a.v, a.v.data, tokens, boxes.v) || !describe(a.y, a.y.grad, tokens, boxes.dy)) {
    return false;
  }
  const int64_t count = tokens * shape.heads;
  auto* numbers = scratch<RowNumbers>(on, count);
  launch(on, "attention backward", row_numbers<kDim>,
         dim3(static_cast<unsigned>(ceil_div(count * (kDim / 8), kNumbersBlock))),
         dim3(kNumbersBlock), 0, a.y, static_cast<const float*>(a.largest),
         static_cast<const float*>(a.inverse_sum), static_cast<int>(shape.heads),
         static_cast<int>(tokens), numbers);
  const DeviceLayout device = layout_of(shape, on);
  const BackwardTiles tiles =
      backward_tiles(shape, kOwn * static_cast<int>(shape.group()), kOwn, on);
  Args args = {device.layout, nullptr, numbers, static_cast<int>(tokens), a.q, a.k, a.v,
               a.set_q,       a.set_k, a.set_v};
  const auto run = [&](auto* kernel, const List<Tile>& list, int64_t heads) {
    args.tiles = list.items;
    launch(on, "attention backward", kernel, dim3(static_cast<unsigned>(list.count * heads)),
           dim3(kBlock), sizeof(Shared<kDim>), args, boxes);
  };
  // q, k and v may be the same memory: what is set goes before what is added.
  const bool keys_first = !a.set_q && (a.set_k || a.set_v);
  for (const bool keys : {keys_first, !keys_first}) {
    if (keys && (a.k.grad != nullptr || a.v.grad != nullptr)) {
      run(key_grads<kDim>, tiles.keys, shape.kv_heads);
    } else if (!keys && a.q.grad != nullptr) {
      run(query_grads<kDim>, tiles.rows, shape.heads);
    }
  }
  return true;
}

std::atomic<bool> allowed = true;
std::atomic<int64_t> calls = 0;

}  // namespace

bool warpgroups_serve(int64_t head_dim) {
  const size_t shared = head_dim == 64    ? sizeof(Shared<64>)
                        : head_dim == 128 ? sizeof(Shared<128>)
                                          : SIZE_MAX;
  return has_warpgroups() && shared <= most_shared();
}

bool backward_by_warpgroups(const Attention<bf16>& a, const Launch& on) {
  const AttentionShape& s = a.shape;
  if (!allowed || !warpgroups_serve(s.head_dim) || s.head_dim != s.value_dim ||
      s.table != nullptr || bends_softmax(a) || !aligned(a.q, 16) || !aligned(a.k, 16) ||
      !aligned(a.v, 16) || !aligned(a.y, 16)) {
    return false;
  }
  int64_t longest = 0;
  for (int64_t i = 0; i < s.segments; ++i) {
    longest = std::max(longest, s.length(i));
  }
  if (longest == 0 || s.uses_sinks(longest - 1)) {
    return false;
  }
  const bool served = s.head_dim == 64 ? run_backward<64>(a, on) : run_backward<128>(a, on);
  calls += served ? 1 : 0;
  return served;
}

void allow_warpgroups(bool now_allowed) {
  allowed = now_allowed;
}
int64_t warpgroup_calls() {
  return calls;
}

}  // namespace cambium::cuda::attention
