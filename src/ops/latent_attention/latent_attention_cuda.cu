// Latent attention on CUDA, forward. A block has a token, kHeads of its heads and a part of its
// keys, in tiles of kTile, with a running maximum in fp32. The keys of tokens that decode (segments
// of one token) are cut in parts, whose results a second kernel adds in order. This serves every
// type and size; bf16 of the published sizes goes to tensor cores (latent_attention_mma_cuda.cu).
#include <algorithm>
#include <bit>
#include <vector>

#include "ops/latent_attention/latent_cuda.cuh"
#include "ops/shared_limit.h"

namespace cambium::cuda {
namespace latent {
namespace {

/// Parts of a decoding token's keys where they are fixed.
constexpr int64_t kFixedParts = 8;
/// Most parts, and about as many blocks, for sequences of uneven lengths.
constexpr int64_t kUnevenParts = 16;
constexpr int64_t kUnevenBlocks = 512;

/// Keys that the call's decoding tokens look at, and the most that one of them does.
struct SinglesKeys {
  int64_t total = 0, longest = 0;
};
template <class T>
SinglesKeys keys_of_singles(const LatentAttention<T>& a) {
  SinglesKeys keys;
  for (int64_t s = 0; s < a.shape.segments; ++s) {
    if (a.shape.length(s) == 1) {
      const int64_t count = a.chosen.count(a.shape.first_position(s));
      keys.total += count;
      keys.longest = std::max(keys.longest, count);
    }
  }
  return keys;
}

struct TokensPlan {
  struct Key {
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray memory;
  int64_t tokens = 0;
  int64_t singles = 0;
};

/// kColumns a thread, kThreads apart; a tile has kLanes keys, a lane each. Shared memory: queries
/// (kHeads, odd), keys (lanes, odd), weights (lanes, kHeads), factors (kHeads).
constexpr size_t forward_shared(int lanes, int all) {
  return sizeof(float) * static_cast<size_t>((kHeads + lanes) * odd(all) + lanes * kHeads + kHeads);
}
static_assert(forward_shared(kTile / 2, kMaxLatent) <= kSharedOfSm86);

template <class T, int kColumns, int kLanes>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(LatentAttention<T> a, attention::Layout layout, const int32_t* segments,
                   const int32_t* singles, Partials partials) {
  extern __shared__ __align__(16) float shared[];
  const auto rank = static_cast<int>(a.shape.value_dim);
  const auto all = static_cast<int>(a.shape.head_dim);
  const int stride = odd(all);
  float* queries = shared;
  float* keys = queries + kHeads * stride;
  float* weights = keys + kLanes * stride;
  float* factors = weights + kLanes * kHeads;
  const int64_t t = blockIdx.y;
  const int first_head = static_cast<int>(blockIdx.x) * kHeads;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int single = singles[t];
  const auto part = static_cast<int>(blockIdx.z);
  if (part > 0 && single < 0) {
    return;
  }
  const int s = segments[t];
  const int64_t own = layout.position[s] + t - layout.start[s];
  const auto [first, end] =
      keys_of_part(a.chosen.count(own), kTile, part, single < 0 ? 1 : partials.parts);
  for (int i = static_cast<int>(threadIdx.x); i < kHeads * all; i += kThreads) {
    const int h = first_head + i / all;
    queries[i / all * stride + i % all] = h < layout.heads ? load(a.q.row(t, h) + i % all) : 0.0F;
  }
  float y[kHeads][kColumns] = {};
  float largest = -INFINITY;  // of the warp's head
  float sum = 0.0F;
  for (int64_t tile = first; tile < end; tile += kLanes) {
    __syncthreads();  // the tile before has been read
    load_keys<kLanes>(a, keys, [&](int r) -> int64_t {
      return tile + r < end ? layout.key_row(s, static_cast<int>(a.chosen.position(t, tile + r)))
                            : -1;
    });
    __syncthreads();
    const float score =
        lane < kLanes && tile + lane < end
            ? dot(queries + warp * stride, keys + lane * stride, all) * a.shape.scale
            : -INFINITY;
    const float most = fmaxf(largest, warp_max(score));
    const float factor = expf(largest - most);  // 0 for the first tile
    const float weight = expf(score - most);
    sum = sum * factor + warp_sum(weight);
    largest = most;
    if (lane < kLanes) {
      weights[lane * kHeads + warp] = weight;
    }
    if (lane == 0) {
      factors[warp] = factor;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        y[h][c] *= factors[h];
      }
    }
    for (int j = 0; j < kLanes; ++j) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = static_cast<int>(threadIdx.x) + c * kThreads;
        const float value = column < rank ? keys[j * stride + column] : 0.0F;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          y[h][c] += weights[j * kHeads + h] * value;
        }
      }
    }
  }
  const bool whole = partials.parts == 1 || single < 0;
  __syncthreads();
  if (lane == 0) {
    factors[warp] = whole ? 1.0F / sum : 1.0F;
    const int h = first_head + warp;
    if (h < layout.heads && !whole) {
      const int64_t at = (int64_t{single} * partials.parts + part) * layout.heads + h;
      partials.largest[at] = largest;
      partials.sum[at] = sum;
    } else if (h < layout.heads && a.largest != nullptr) {
      a.largest[t * layout.heads + h] = largest;
      a.inverse_sum[t * layout.heads + h] = 1.0F / sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (first_head + h >= layout.heads) {
      break;
    }
    const int64_t at = (int64_t{single} * partials.parts + part) * layout.heads + first_head + h;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = static_cast<int>(threadIdx.x) + c * kThreads;
      if (column < rank && whole) {
        store(a.y.row(t, first_head + h) + column, y[h][c] * factors[h]);
      } else if (column < rank) {
        partials.y[at * rank + column] = y[h][c];
      }
    }
  }
}

/// Of the addition of parts: a block has kAddColumns columns of a head, four a lane, its warps
/// every kWarps-th part, of which a warp reads kTogether together.
constexpr int kAddColumns = 128;
/// Most parts that small blocks add, of which the device holds many.
constexpr int64_t kFewParts = 16;

/// Blocks (H * columns / kAddColumns, T): the parts of a decoding token added in order. Shared
/// memory: factors (parts).
template <class T, int kWarps, int kTogether>
__global__ void __launch_bounds__(32 * kWarps, kTogether > 2 ? 1 : 12)
    add_parts_kernel(View<T> to, const int32_t* singles, Partials partials) {
  extern __shared__ float factors[];
  __shared__ __align__(16) float sums[kWarps][kAddColumns];
  await_inputs();
  const auto rank = static_cast<int>(to.channels);
  const auto parts = static_cast<int>(partials.parts);
  const int chunks = (rank + kAddColumns - 1) / kAddColumns;
  const int64_t t = blockIdx.y;
  const int64_t h = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x) % chunks * kAddColumns;
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int column = first + thread % 32 * 4;
  const int single = singles[t];
  if (single < 0) {
    return;
  }
  const auto at = [&](int part) { return (int64_t{single} * parts + part) * to.rows.inner + h; };
  // What is first needed is on its way while the factors are made.
  float values[kTogether][4];
  const auto read = [&](int part) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int p = part + i * kWarps;
      const float* from = partials.y + at(p) * rank + column;
      if (p < parts && rank % 4 == 0 && column < rank) {
        load_n<4>(from, values[i]);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          values[i][c] = p < parts && column + c < rank ? from[c] : 0.0F;
        }
      }
    }
  };
  read(warp);
  float largest = -INFINITY;
  for (int p = thread; p < parts; p += 32 * kWarps) {
    largest = fmaxf(largest, partials.largest[at(p)]);
  }
  largest = block_max<32 * kWarps>(largest);
  float sum = 0.0F;
  for (int p = thread; p < parts; p += 32 * kWarps) {
    factors[p] = expf(partials.largest[at(p)] - largest);
    sum += factors[p] * partials.sum[at(p)];
  }
  sum = block_sum<32 * kWarps>(sum);  // all factors are there then
  float y[4] = {};
  for (int part = warp; part < parts; part += kWarps * kTogether) {
    if (part > warp) {
      read(part);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int p = part + i * kWarps;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        y[c] += p < parts ? factors[p] * values[i][c] : 0.0F;
      }
    }
  }
  store_n<4>(&sums[warp][column - first], y);
  __syncthreads();
  if (thread < kAddColumns && first + thread < rank) {
    float all = 0.0F;
#pragma unroll
    for (const auto& of_warp : sums) {
      all += of_warp[thread];
    }
    store(to.row(t, h) + first + thread, all / sum);
  }
}

template <class T>
void forward(const LatentAttention<T>& a, const Launch& on) {
  const AttentionShape& shape = a.shape;
  const Tokens tokens = tokens_of(shape, on);
  if constexpr (std::is_same_v<T, bf16>) {
    if (forward_on_tensor_cores(a, tokens, on)) {
      return;
    }
  }
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const int64_t head_blocks = ceil_div(shape.heads, kHeads);
  const auto all = static_cast<int>(shape.head_dim);
  const int lanes = largest_tile(most_shared(), {kTile, kTile / 2},
                                 [&](int n) { return forward_shared(n, all); });
  const auto kernel = lanes < kTile                     ? forward_kernel<T, 4, kTile / 2>
                      : shape.value_dim <= kThreads     ? forward_kernel<T, 1, kTile>
                      : shape.value_dim <= 2 * kThreads ? forward_kernel<T, 2, kTile>
                                                        : forward_kernel<T, 4, kTile>;
  const size_t bytes = forward_shared(lanes, all);
  const Partials partials = make_partials(a, tokens, tokens.singles * head_blocks, 4 * kTile,
                                          resident_blocks(kernel, kThreads, bytes), on);
  launch(on, "latent_attention", kernel,
         dim3(static_cast<unsigned>(head_blocks), static_cast<unsigned>(a.q.rows.outer),
              static_cast<unsigned>(partials.parts)),
         dim3(kThreads), bytes, for_device(a), layout.layout, tokens.segment, tokens.single,
         partials);
  add_parts("latent_attention", a.y, tokens, partials, on);
}

}  // namespace

Tokens tokens_of(const AttentionShape& shape, const Launch& on) {
  const auto plan = plan_for<TokensPlan>(shape.plans, {}, [&] {
    std::vector<int32_t> segment;
    std::vector<int32_t> single;
    int32_t singles = 0;
    for (int64_t s = 0; s < shape.segments; ++s) {
      const auto length = static_cast<size_t>(shape.length(s));
      segment.insert(segment.end(), length, static_cast<int32_t>(s));
      single.insert(single.end(), length, length == 1 ? singles++ : -1);
    }
    const auto tokens = static_cast<int64_t>(segment.size());
    segment.insert(segment.end(), single.begin(), single.end());
    return TokensPlan{{},
                      {segment.data(), 2 * tokens * static_cast<int64_t>(sizeof(int32_t)), on},
                      tokens,
                      singles};
  });
  const auto* memory = plan->memory.as<int32_t>();
  return {memory, memory + plan->tokens, plan->singles, plan};
}

template <class T>
Partials make_partials(const LatentAttention<T>& a, const Tokens& tokens, int64_t blocks,
                       int64_t least, int64_t fill, const Launch& on) {
  const AttentionShape& shape = a.shape;
  Partials partials;
  if (tokens.singles == 0 || shape.table == nullptr) {
    return partials;
  }
  // As far as the table reaches: the same for steps that follow each other.
  int64_t reach = shape.pages_per_segment * shape.page_size;
  reach = a.chosen.defined() ? std::min(reach, a.chosen.budget) : reach;
  const int64_t most = std::clamp<int64_t>(reach / least, 1, std::max<int64_t>(fill / blocks, 4));
  // The part of the device's turns that one key takes of its own: the fewest parts of the best.
  const auto cost = [&](int64_t parts) {
    return static_cast<double>(ceil_div(blocks * parts, fill)) / static_cast<double>(parts);
  };
  for (int64_t parts = 2; parts <= most; ++parts) {
    partials.parts = cost(parts) < 0.95 * cost(partials.parts) ? parts : partials.parts;
  }
  // Of sequences of which some are long the largest part is a quarter of a block's share or less:
  // whoever is done with short ones takes another. The parts are a power of two, which few steps
  // change, and the scratch is the same for all lengths.
  const int64_t most_uneven =
      tokens.singles == 1 ? partials.parts
                          : std::clamp(std::min(reach / least, kUnevenBlocks / blocks),
                                       partials.parts, std::max(partials.parts, kUnevenParts));
  const auto [total, longest] = keys_of_singles(a);
  if (4 * longest * tokens.singles > 5 * total) {
    const int64_t share = std::max<int64_t>(total * blocks / tokens.singles / fill, 1);
    const auto wanted =
        static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(ceil_div(4 * longest, share))));
    partials.parts = std::clamp(wanted, partials.parts, most_uneven);
  }
  const int64_t room = on.batch_invariant ? kFixedParts : most_uneven;
  if (on.batch_invariant) {
    partials.parts = kFixedParts;
  }
  if (room > 1) {
    const int64_t rows = tokens.singles * room * shape.heads;
    partials.y = scratch<float>(on, rows * shape.value_dim);
    partials.largest = scratch<float>(on, rows);
    partials.sum = scratch<float>(on, rows);
  }
  return partials;
}
template Partials make_partials(const LatentAttention<float>&, const Tokens&, int64_t, int64_t,
                                int64_t, const Launch&);
template Partials make_partials(const LatentAttention<bf16>&, const Tokens&, int64_t, int64_t,
                                int64_t, const Launch&);

template <class T>
void add_parts(const char* operation, const View<T>& y, const Tokens& tokens,
               const Partials& partials, const Launch& on) {
  if (partials.parts > 1) {
    const bool few = partials.parts <= kFewParts;
    launch_ahead(on, operation, few ? add_parts_kernel<T, 4, 2> : add_parts_kernel<T, 8, 8>,
                 dim3(static_cast<unsigned>(y.rows.inner * ceil_div(y.channels, kAddColumns)),
                      static_cast<unsigned>(y.rows.outer)),
                 dim3(few ? 128 : 256), static_cast<size_t>(partials.parts) * sizeof(float), y,
                 tokens.single, partials);
  }
}
template void add_parts(const char*, const View<float>&, const Tokens&, const Partials&,
                        const Launch&);
template void add_parts(const char*, const View<bf16>&, const Tokens&, const Partials&,
                        const Launch&);

}  // namespace latent

void latent_attention_forward(const LatentAttention<float>& a, const Launch& on) {
  latent::forward(a, on);
}
void latent_attention_forward(const LatentAttention<bf16>& a, const Launch& on) {
  latent::forward(a, on);
}

}  // namespace cambium::cuda
