// The choice on CUDA: scores for some tokens at a time, on tensor cores where they suit
// (selection_mma_cuda.cu; blocks and pools: selection_pieces_cuda.cu), then for each list its best
// candidates by the digits of their scores, in ascending order. Few lists of long sequences are
// made by a cluster of blocks each, where the device has clusters: the blocks share the candidates
// evenly and read each other's counts.
#include <algorithm>

#include "ops/attention/attention_cuda.cuh"
#include "ops/cuda_cluster.cuh"
#include "ops/selection/selection_cuda.cuh"

namespace cambium::cuda {
namespace selection {
namespace {

using latent::number;
using latent::odd;

/// Of the choice.
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
/// Digits that a lane adds up, and where the count of a digit lies: lanes meet no bank twice.
constexpr int kOwnDigits = kDigits / 32;
constexpr int kCounts = kDigits + 32;
__device__ constexpr int place_of(int digit) {
  return digit + digit / kOwnDigits;
}
/// Keys of a block, a thread each.
constexpr int kKeys = 128;
/// Heads whose products a thread holds at a time.
constexpr int kHeads = 4;
/// Blocks that share a list's candidates where a call has at most kFewLists of them and reaches
/// kManyScores candidates.
constexpr int kCluster = 8;
constexpr int64_t kFewLists = 32;
constexpr int64_t kManyScores = 16384;
/// Scores held at a time.
constexpr int64_t kMostScores = int64_t{1} << 24;

constexpr size_t score_shared(int heads, int dim) {
  return sizeof(float) * static_cast<size_t>((heads + kHeads) * dim + kKeys * odd(dim));
}

/// Blocks (keys / kKeys, tokens). Shared memory: queries (D, H padded to kHeads),
/// keys (kKeys, odd).
template <class T>
__global__ void __launch_bounds__(kKeys)
    score_kernel(ChooseTokens<T> a, attention::Layout layout, const int32_t* segments, Scores to) {
  extern __shared__ __align__(16) float shared[];
  const auto dim = static_cast<int>(a.shape.head_dim);
  const auto heads = static_cast<int>(a.shape.heads);
  const int padded = (heads + kHeads - 1) / kHeads * kHeads;
  float* queries = shared;
  float* keys = queries + padded * dim;
  await_inputs();
  const int64_t t = to.first + blockIdx.y;
  const int s = segments[t];
  const int64_t own = layout.position[s] + t - layout.start[s];
  const int64_t begin = int64_t{blockIdx.x} * kKeys;
  if (begin > own || own < a.chosen.budget) {
    return;
  }
  const auto thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < padded * dim; i += kKeys) {
    const int h = i / dim;
    queries[i % dim * padded + h] = h < heads ? load(a.q.row(t, h) + i % dim) : 0.0F;
  }
  for (int r = thread / 32; r < kKeys; r += kKeys / 32) {
    const int64_t p = begin + r;
    const int64_t row = p <= own ? layout.key_row(s, static_cast<int>(p)) : -1;
    for (int d = thread % 32; d < dim; d += 32) {
      keys[r * odd(dim) + d] = row < 0 ? 0.0F : number(a.keys, row, d);
    }
  }
  __syncthreads();
  if (begin + thread > own) {
    return;
  }
  float score = 0.0F;
  for (int h = 0; h < heads; h += kHeads) {
    float dot[kHeads] = {};
    for (int d = 0; d < dim; ++d) {
      const float key = keys[thread * odd(dim) + d];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        dot[i] += queries[d * padded + h + i] * key;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (h + i < heads) {
        score += load(a.weight.row(t) + h + i) * fmaxf(dot[i], 0.0F);
      }
    }
  }
  to.rows[int64_t{blockIdx.y} * to.capacity + begin + thread] = score;
}

/// The digit of the `left`-th largest number by the counts of digits, and the how many-th of that
/// digit it is. By a warp, in memory that a block shares.
__device__ void find_digit(const int* counts, int& digit, int& left) {
  // Lane l has digits [kOwnDigits l, kOwnDigits (l + 1)), counted from the largest.
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int wanted = left;
  __syncwarp();  // all have read it
  int own = 0;
#pragma unroll 16
  for (int i = 0; i < kOwnDigits; ++i) {
    own += counts[place_of(kDigits - 1 - lane * kOwnDigits - i)];
  }
  int through = own;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int before = __shfl_up_sync(0xffffffffU, through, lanes);
    through += lane >= lanes ? before : 0;
  }
  const int above = through - own;
  if (above < wanted && wanted <= through) {
    int at = kDigits - 1 - lane * kOwnDigits;
    int rest = wanted - above;
    while (counts[place_of(at)] < rest) {
      rest -= counts[place_of(at)];
      --at;
    }
    digit = at;
    left = rest;
  }
}

/// Four scores of a row from p on, in the order of unsigned numbers; 0, which no number is, past
/// `own`.
__device__ __forceinline__ void four_of(const float* scores, int p, int own, uint32_t (&bits)[4]) {
  const float4 x = p <= own ? *reinterpret_cast<const float4*>(scores + p) : float4{};
  const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits[i] = p + i <= own ? ordered_bits(__float_as_uint(values[i])) : 0U;
  }
}

/// kBlocks blocks a list. Counts of digits are whole numbers: the order they are added in does not
/// matter.
template <class T, int kBlocks>
__global__ void __launch_bounds__(kThreads)
    choose_kernel(ChooseTokens<T> a, attention::Layout layout, const int32_t* segments,
                  Scores from) {
  __shared__ int counts[kCounts];
  __shared__ int all_counts[kBlocks == 1 ? 1 : kCounts];
  __shared__ int chosen_digit;
  __shared__ int chosen_left;
  __shared__ int larger_of[kWarps];
  __shared__ int equals_of[kWarps];
  __shared__ int sums[2];  // of these
  await_inputs();
  const int64_t index = blockIdx.x / kBlocks;
  const int rank = kBlocks == 1 ? 0 : cluster_rank();
  const int64_t t = from.first + index / a.chosen.lists;
  const int s = segments[t];
  const int64_t position = layout.position[s] + t - layout.start[s];
  const auto last = static_cast<int>(a.candidates(position)) - 1;
  const auto top = static_cast<int>(a.top());
  int32_t* to = a.pieces + (from.first * a.chosen.lists + index) * a.chosen.budget;
  const auto thread = static_cast<int>(threadIdx.x);
  if (rank == 0 && thread == 0 && a.has_tail(position)) {
    to[min(last + 1, top)] = last + 1;
  }
  if (last < top) {
    for (int p = rank * kThreads + thread; p <= last; p += kBlocks * kThreads) {
      to[p] = p;
    }
    return;
  }
  const float* scores = from.rows + index * from.capacity;
  uint32_t prefix = 0;
  int left = top;
  for (int end = 32; end > 0;) {  // digits from the highest: 11, 11 and 10 bits
    const int bits_of = end > kDigitBits ? kDigitBits : end;
    const int shift = end - bits_of;
    for (int i = thread; i < kCounts; i += kThreads) {
      counts[i] = 0;
    }
    if (thread == 0) {
      chosen_left = left;
    }
    __syncthreads();
    const uint32_t mask = end == 32 ? 0U : 0xffffffffU << end;
#pragma unroll 4
    for (int p = 4 * (rank * kThreads + thread); p <= last; p += 4 * kBlocks * kThreads) {
      uint32_t bits[4];
      four_of(scores, p, last, bits);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (p + i <= last && (bits[i] & mask) == prefix) {
          const auto digit = static_cast<int>((bits[i] >> shift) & ((1U << bits_of) - 1U));
          atomicAdd(&counts[place_of(digit)], 1);
        }
      }
    }
    meet_cluster<kBlocks>();
    if constexpr (kBlocks > 1) {
      for (int i = thread; i < kCounts; i += kThreads) {
        int all = 0;
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          all += load_of_block<kBlocks>(counts + i, r);
        }
        all_counts[i] = all;
      }
      meet_cluster<kBlocks>();  // all counts have been read
    }
    if (thread < 32) {
      find_digit(kBlocks == 1 ? counts : all_counts, chosen_digit, chosen_left);
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(chosen_digit) << shift;
    left = chosen_left;
    end = shift;
    __syncthreads();
  }
  // A warp has a part of the candidates: it counts what is larger and what is equal, and then knows
  // where its own go.
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int each = (last / 128 / (kWarps * kBlocks) + 1) * 128;
  const int begin = (rank * kWarps + warp) * each;
  const int limit = min(last + 1, begin + each);
  int larger = 0;
  int equals = 0;
#pragma unroll 4
  for (int p = begin + 4 * lane; p < limit; p += 128) {
    uint32_t bits[4];
    four_of(scores, p, last, bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      larger += bits[i] > prefix ? 1 : 0;
      equals += bits[i] == prefix ? 1 : 0;
    }
  }
  larger = __reduce_add_sync(0xffffffffU, larger);
  equals = __reduce_add_sync(0xffffffffU, equals);
  if (lane == 0) {
    larger_of[warp] = larger;
    equals_of[warp] = equals;
  }
  __syncthreads();
  larger = 0;
  equals = 0;
  for (int w = 0; w < warp; ++w) {
    larger += larger_of[w];
    equals += equals_of[w];
  }
  if constexpr (kBlocks > 1) {
    if (thread == kThreads - 1) {
      sums[0] = larger + larger_of[warp];
      sums[1] = equals + equals_of[warp];
    }
    meet_cluster<kBlocks>();
    for (int r = 0; r < rank; ++r) {
      larger += load_of_block<kBlocks>(&sums[0], r);
      equals += load_of_block<kBlocks>(&sums[1], r);
    }
  }
  const unsigned lower = (1U << lane) - 1U;
  for (int from_position = begin; from_position < limit; from_position += 128) {
    const int p = from_position + 4 * lane;
    uint32_t bits[4];
    four_of(scores, p, last, bits);
    // Of this lane's four: how many of either are before them.
    int larger_here = larger;
    int equals_here = equals;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned is_larger = __ballot_sync(0xffffffffU, bits[i] > prefix);
      const unsigned is_equal = __ballot_sync(0xffffffffU, bits[i] == prefix);
      larger_here += __popc(is_larger & lower);
      equals_here += __popc(is_equal & lower);
      larger += __popc(is_larger);
      equals += __popc(is_equal);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool equal = bits[i] == prefix;
      if (bits[i] > prefix || (equal && equals_here < left)) {
        to[larger_here + min(equals_here, left)] = p + i;
      }
      larger_here += bits[i] > prefix ? 1 : 0;
      equals_here += equal ? 1 : 0;
    }
  }
  if constexpr (kBlocks > 1) {
    meet_cluster<kBlocks>();  // a block's memory goes when all have read it
  }
}

template <class T>
void choose(const ChooseTokens<T>& a, const Launch& on) {
  const AttentionShape& shape = a.shape;
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const latent::Tokens tokens = latent::tokens_of(shape, on);
  // As far as the table reaches: the same for steps that follow each other.
  int64_t capacity = shape.pages_per_segment * shape.page_size;
  for (int64_t s = 0; shape.table == nullptr && s < shape.segments; ++s) {
    capacity = std::max(capacity, shape.length(s));
  }
  capacity = ceil_div(ceil_div(capacity, a.chosen.size), 4) * 4;  // rows of 16 bytes
  const int64_t all = a.q.rows.outer;
  const int64_t lists = a.chosen.lists;
  const int64_t each = std::clamp<int64_t>(kMostScores / std::max<int64_t>(capacity * lists, 1), 1,
                                           std::min<int64_t>(std::max<int64_t>(all, 1), 32768));
  const bool of_tokens = a.chosen.size == 1 && !a.chosen.tail && a.weight.defined();
  Scores scores{0, 0, capacity, scratch<float>(on, each * lists * capacity)};
  for (; scores.first < all; scores.first += each) {
    scores.count = std::min(each, all - scores.first);
    bool done = false;
    if (!of_tokens) {
      score_pieces(a, layout.layout, tokens, scores, on);
      done = true;
    } else if constexpr (std::is_same_v<T, bf16>) {
      done = score_on_tensor_cores(a, layout.layout, tokens, scores, on);
    }
    if (!done) {
      launch_ahead(on, "choose_tokens", score_kernel<T>,
                   dim3(static_cast<unsigned>(ceil_div(capacity, kKeys)),
                        static_cast<unsigned>(scores.count)),
                   dim3(kKeys),
                   score_shared(static_cast<int>(shape.heads), static_cast<int>(shape.head_dim)),
                   latent::for_device(a), layout.layout, tokens.segment, scores);
    }
    const int64_t rows = scores.count * lists;
    const bool shared = launches_ahead() && rows <= kFewLists && capacity >= kManyScores;
    const int blocks = shared ? kCluster : 1;
    launch_clusters(on, "choose_tokens", blocks,
                    shared ? choose_kernel<T, kCluster> : choose_kernel<T, 1>,
                    dim3(static_cast<unsigned>(blocks * rows)), dim3(kThreads), 0,
                    latent::for_device(a), layout.layout, tokens.segment, scores);
  }
}

}  // namespace
}  // namespace selection

void choose_tokens_of(const ChooseTokens<float>& a, const Launch& on) {
  selection::choose(a, on);
}
void choose_tokens_of(const ChooseTokens<bf16>& a, const Launch& on) {
  selection::choose(a, on);
}

}  // namespace cambium::cuda
