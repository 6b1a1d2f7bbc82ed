// Token embedding. Forward: a block gathers the rows of a few tokens, whose numbers it reads once.
//
// Backward adds rows that share a token in the order of the text. The positions are brought into
// the order of (token, position) by counting for each how many come before it: the work of all
// pairs, but of integers, which a sort of a step's tokens hardly beats (T = 32,768: 10^9 compares).
// A block then sums a chunk of that order, runs of one token at a time. A run within a chunk is
// added to the table's gradient at once; runs over several chunks leave partial sums that a last
// kernel adds in order. So no token is slow, however often it occurs.
#include "ops/cuda.cuh"
#include "ops/embedding/embedding_kernels.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;

// --- Forward.
constexpr int kMostTokens = 8;  // of a block

template <int kVec, class T, class Row>
__global__ void __launch_bounds__(kThreads)
    gather(const int32_t* tokens, int64_t count, int of_block, const Row* table, T* y,
           int64_t channels) {
  __shared__ int32_t own[kMostTokens];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * of_block;
  const int n = static_cast<int>(count - first < of_block ? count - first : of_block);
  await_inputs();
  if (static_cast<int>(threadIdx.x) < n) {
    own[threadIdx.x] = tokens[first + threadIdx.x];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x * kVec; c < channels; c += kThreads * kVec) {
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      float x[kVec];
      load_all<kVec>(table + own[i] * channels + c, x);
      store_n<kVec>(y + (first + i) * channels + c, x);
    }
  }
}

template <class T, class Row>
void run_gather(const Embedding<T>& e, const Row* table, const Launch& on) {
  constexpr int kVec = 16 / sizeof(T);
  const int64_t channels = e.y.channels;
  const bool vectors = channels % kVec == 0 && aligned(table) && aligned(e.y.data);
  const int of_block = e.count < 2048 ? 1 : kMostTokens;
  launch_ahead(on, "embedding", vectors ? gather<kVec, T, Row> : gather<1, T, Row>,
               static_cast<unsigned>(ceil_div(e.count, of_block)), kThreads, 0, e.tokens, e.count,
               of_block, table, e.y.data, channels);
}

template <class T>
void run_forward(const Embedding<T>& e, const Launch& on) {
  if (e.narrow.defined()) {
    run_gather(e, e.narrow.data, on);
  } else {
    run_gather(e, e.table.data, on);
  }
}

// --- Backward: the order of the positions.
constexpr int kTile = 1024;  // positions that a block ranks, and those it ranks them against
constexpr int kOwn = kTile / kThreads;

__global__ void __launch_bounds__(kThreads)
    read_tokens(const int32_t* tokens, int64_t count, int32_t* copy, int32_t* rank) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t < count) {
    copy[t] = tokens[t];
    rank[t] = 0;
  }
}

/// rank[t] += how many of a tile's positions come before t: the sum does not depend on the order of
/// blocks.
__global__ void __launch_bounds__(kThreads)
    count_before(const int32_t* tokens, int64_t count, int64_t tiles, int32_t* rank) {
  __shared__ int4 other[kTile / 4];
  const int64_t tile = blockIdx.x / tiles;
  const int64_t against = blockIdx.x % tiles;
  auto* flat = reinterpret_cast<int32_t*>(other);
  for (int i = static_cast<int>(threadIdx.x); i < kTile; i += kThreads) {
    const int64_t s = against * kTile + i;
    flat[i] = s < count ? tokens[s] : INT32_MAX;
  }
  __syncthreads();
  // A position of an earlier tile comes before t if its token is not larger.
  int32_t bound[kOwn];
  int32_t before[kOwn] = {};
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int64_t t = tile * kTile + k * kThreads + threadIdx.x;
    bound[k] = t < count ? tokens[t] + (against < tile ? 1 : 0) : 0;
  }
  if (against != tile) {
#pragma unroll 4
    for (int i = 0; i < kTile / 4; ++i) {
      const int4 four = other[i];
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        before[k] += four.x < bound[k] ? 1 : 0;
        before[k] += four.y < bound[k] ? 1 : 0;
        before[k] += four.z < bound[k] ? 1 : 0;
        before[k] += four.w < bound[k] ? 1 : 0;
      }
    }
  } else {
    for (int i = 0; i < kTile; ++i) {
      const int32_t token = flat[i];
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const bool earlier = i < k * kThreads + static_cast<int>(threadIdx.x);
        before[k] += token < bound[k] + (earlier ? 1 : 0) ? 1 : 0;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int64_t t = tile * kTile + k * kThreads + threadIdx.x;
    if (t < count) {
      atomicAdd(rank + t, before[k]);
    }
  }
}

/// The positions in order, and their tokens.
struct Order {
  int64_t count;
  int32_t* position;
  int32_t* token;
};

__global__ void __launch_bounds__(kThreads)
    place(const int32_t* tokens, const int32_t* rank, Order order) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t < order.count) {
    order.position[rank[t]] = static_cast<int32_t>(t);
    order.token[rank[t]] = tokens[t];
  }
}

Order order_of(const int32_t* tokens, int64_t count, const Launch& on) {
  const char* operation = "embedding's gradient";
  auto* copy = scratch<int32_t>(on, count);
  auto* rank = scratch<int32_t>(on, count);
  const Order order{count, scratch<int32_t>(on, count), scratch<int32_t>(on, count)};
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  const int64_t tiles = ceil_div(count, kTile);
  launch(on, operation, read_tokens, blocks, kThreads, 0, tokens, count, copy, rank);
  launch(on, operation, count_before, static_cast<unsigned>(tiles * tiles), kThreads, 0, copy,
         count, tiles, rank);
  launch(on, operation, place, blocks, kThreads, 0, copy, rank, order);
  return order;
}

// --- Backward: sums.
constexpr int kChunk = 32;       // positions of a block
constexpr int kSumThreads = 64;  // each with kVec channels
constexpr int kAhead = 4;        // rows in flight

/// dtable (V, channels) += dy (count, channels). head, tail (chunks, channels): the sums of a
/// chunk's part of a run that began in an earlier chunk, and of one that begins in it and goes on.
template <class T>
struct Sums {
  const T* dy;
  float* dtable;
  int64_t channels;
  int64_t slices;  // blocks that share a chunk: kSumThreads * kVec channels each
  float* head;
  float* tail;
};

template <int kVec, class T>
__global__ void __launch_bounds__(kSumThreads) sum_chunks(Order order, Sums<T> a) {
  __shared__ int32_t position[kChunk];
  __shared__ int32_t token[kChunk + 2];  // with the ones before and after; -1 where there is none
  const int64_t chunk = blockIdx.x / a.slices;
  const int64_t begin = chunk * kChunk;
  const int n = static_cast<int>(order.count - begin < kChunk ? order.count - begin : kChunk);
  for (int i = static_cast<int>(threadIdx.x); i < n + 2; i += kSumThreads) {
    const int64_t at = begin + i - 1;
    token[i] = at >= 0 && at < order.count ? order.token[at] : -1;
    if (i < n) {
      position[i] = order.position[begin + i];
    }
  }
  __syncthreads();
  const int64_t c = (blockIdx.x % a.slices * kSumThreads + threadIdx.x) * kVec;
  if (c >= a.channels) {
    return;
  }
  float sum[kVec] = {};
  bool first = true;  // the run is the chunk's first
  for (int i = 0; i < n; i += kAhead) {
    Packed<kVec, T> rows[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k < n) {
        rows[k] =
            *reinterpret_cast<const Packed<kVec, T>*>(a.dy + position[i + k] * a.channels + c);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= n) {
        break;
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sum[j] += load(&rows[k].value[j]);
      }
      const int32_t own = token[i + k + 1];
      const bool last = i + k + 1 == n;
      if (!last && token[i + k + 2] == own) {
        continue;
      }
      if (first && token[0] == own) {
        store_all<kVec>(a.head + chunk * a.channels + c, sum);
      } else if (last && token[n + 1] == own) {
        store_all<kVec>(a.tail + chunk * a.channels + c, sum);
      } else {
        float* grad = a.dtable + own * a.channels + c;
        float before[kVec];
        load_all<kVec>(grad, before);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          before[j] += sum[j];
        }
        store_all<kVec>(grad, before);
      }
      first = false;
#pragma unroll
      for (float& value : sum) {
        value = 0.0F;
      }
    }
  }
}

/// A block for each chunk: where a run begins in it and goes on, that run's sum.
template <int kVec, class T>
__global__ void __launch_bounds__(kSumThreads) join_chunks(Order order, Sums<T> a) {
  const int64_t chunk = blockIdx.x / a.slices;
  const int64_t begin = chunk * kChunk;
  const int64_t end = begin + kChunk;
  if (end >= order.count) {
    return;
  }
  const int32_t token = order.token[end - 1];
  const bool began_before = begin > 0 && order.token[begin - 1] == token;
  if (began_before || order.token[end] != token) {
    return;
  }
  int64_t within = end;  // the last known position of the run, and one known to be beyond it
  int64_t beyond = order.count;
  while (beyond - within > 1) {
    const int64_t middle = (within + beyond) / 2;
    if (order.token[middle] == token) {
      within = middle;
    } else {
      beyond = middle;
    }
  }
  const int64_t c = (blockIdx.x % a.slices * kSumThreads + threadIdx.x) * kVec;
  if (c >= a.channels) {
    return;
  }
  float sum[kVec];
  load_all<kVec>(a.tail + chunk * a.channels + c, sum);
#pragma unroll 8
  for (int64_t next = chunk + 1; next <= within / kChunk; ++next) {
    float part[kVec];
    load_all<kVec>(a.head + next * a.channels + c, part);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      sum[j] += part[j];
    }
  }
  float* grad = a.dtable + token * a.channels + c;
  float before[kVec];
  load_all<kVec>(grad, before);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    before[j] += sum[j];
  }
  store_all<kVec>(grad, before);
}

template <int kVec, class T>
void run_sums(const Order& order, Sums<T> sums, const Launch& on) {
  const int64_t chunks = ceil_div(order.count, kChunk);
  sums.slices = ceil_div(sums.channels, kSumThreads * kVec);
  sums.head = scratch<float>(on, chunks * sums.channels);
  sums.tail = scratch<float>(on, chunks * sums.channels);
  const auto blocks = static_cast<unsigned>(chunks * sums.slices);
  launch(on, "embedding's gradient", sum_chunks<kVec, T>, blocks, kSumThreads, 0, order, sums);
  launch(on, "embedding's gradient", join_chunks<kVec, T>, blocks, kSumThreads, 0, order, sums);
}

template <class T>
void run_backward(const Embedding<T>& e, const Launch& on) {
  if (e.count == 0 || e.table.grad == nullptr) {
    return;
  }
  constexpr int kVec = 16 / sizeof(T);
  const Order order = order_of(e.tokens, e.count, on);
  const Sums<T> sums{e.y.grad, e.table.grad, e.y.channels, 0, nullptr, nullptr};
  if (e.y.channels % kVec == 0 && aligned(e.y.grad) && aligned(e.table.grad)) {
    run_sums<kVec>(order, sums, on);
  } else {
    run_sums<1>(order, sums, on);
  }
}

}  // namespace

void embedding_forward(const Embedding<float>& e, const Launch& on) {
  run_forward(e, on);
}
void embedding_forward(const Embedding<bf16>& e, const Launch& on) {
  run_forward(e, on);
}
void embedding_backward(const Embedding<float>& e, const Launch& on) {
  run_backward(e, on);
}
void embedding_backward(const Embedding<bf16>& e, const Launch& on) {
  run_backward(e, on);
}

}  // namespace cambium::cuda
