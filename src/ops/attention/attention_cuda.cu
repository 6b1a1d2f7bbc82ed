// Attention on CUDA: rows into pages, softmax over tiles of keys with a running maximum in fp32
// (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), and the sum of
// split keys (Flash-Decoding). The kernel here serves every type and dim; bf16 of the dims that
// suit goes to tensor cores (attention_mma_cuda.cu; decode: attention_few_cuda.cu), and where there
// is cuDNN, long sequences without pages (attention_cudnn_cuda.cu) and long pieces of prompts over
// pages (attention_prefill_cuda.cu) go to it.
#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cudnn.h"

namespace cambium::cuda {
namespace attention {
namespace {

constexpr int kFewRows = 16;

template <class T, class K>
struct ForwardArgs {
  Layout layout;
  const Tile* tiles;
  View<T> q;
  View<K> k, v;
  const bf16* k_scales;  // of fp8, as ScaledRows has them
  const bf16* v_scales;
  View<T> y;
  float* largest;
  float* inverse_sum;
  Partials partials;
  bool q_vectors, k_vectors, v_vectors;  // whether 4 elements can be read at once
};

/// Shared memory: forward_shared(). Output columns 4 tx + 64 c + e of rows ty kR + i are thread
/// (ty, tx)'s; kColumns = 4 per 64.
template <class T, class K, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 16 ? 1 : 2)
    forward_kernel(const ForwardArgs<T, K> a) {
  constexpr int kR = kRows / 16;
  constexpr int kC = kKeys / 16;
  constexpr int kScoreStride = kKeys + 4;
  extern __shared__ __align__(16) float shared[];
  const Layout& layout = a.layout;
  const int kv_head = static_cast<int>(blockIdx.x % layout.kv_heads);
  const Tile tile = a.tiles[blockIdx.x / layout.kv_heads];
  const int start = layout.start[tile.segment];
  const int first_position = layout.position[tile.segment];
  const int rows = (layout.start[tile.segment + 1] - start) * layout.group;
  const int dim = layout.head_dim;
  const int value_dim = layout.value_dim;
  const int stride = row_stride(dim);
  const int value_stride = row_stride(value_dim);
  float* q = shared;
  float* keys = q + kRows * stride;
  float* scores = keys + kKeys * max(stride, value_stride);
  auto* key_rows = reinterpret_cast<int64_t*>(scores + kRows * kScoreStride);
  const int thread = static_cast<int>(threadIdx.x);
  const int ty = thread / 16;
  const int tx = thread % 16;

  load_rows<T>(q, stride, kRows, dim, a.q_vectors, [&](int r) -> const T* {
    const int row = tile.first_row + r;
    return row < rows
               ? a.q.row(start + row / layout.group, kv_head * layout.group + row % layout.group)
               : nullptr;
  });
  int position[kR];
#pragma unroll
  for (int i = 0; i < kR; ++i) {
    position[i] = first_position + (tile.first_row + ty * kR + i) / layout.group;
  }
  float largest[kR];
  float sum[kR];  // of this thread's columns
  float y[kR][kColumns] = {};
#pragma unroll
  for (int i = 0; i < kR; ++i) {
    largest[i] = -INFINITY;
    sum[i] = 0.0F;
  }
  const auto factors = [&](const bf16* scales) {
    return [=](int r) { return factor_of(scales[key_rows[r] * layout.kv_heads + kv_head]); };
  };
  for (int first = tile.first_tile<kKeys>(); first < tile.end_key;
       first = tile.next_tile<kKeys>(first)) {
    __syncthreads();  // the tile before has been read
    if (thread < kKeys) {
      const int p = first + thread;
      key_rows[thread] = tile.has(p) ? layout.key_row(tile.segment, p) : -1;
    }
    __syncthreads();
    load_rows<K>(
        keys, stride, kKeys, dim, a.k_vectors,
        [&](int r) -> const K* {
          return key_rows[r] < 0 ? nullptr : a.k.row(key_rows[r], kv_head);
        },
        factors(a.k_scales));
    __syncthreads();
    float s[kR][kC] = {};
    add_dots(q, keys, stride, dim, s);
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      const int last_seen = min(position[i], tile.end_key - 1);
      const int first_seen = max(layout.reach(position[i]), tile.first_key);
      float most = largest[i];
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const int p = first + tx + 16 * j;
        const bool seen = (p >= first_seen || p < layout.sinks) && p <= last_seen;
        s[i][j] = seen ? score_of(layout, s[i][j]).value : -INFINITY;
        most = fmaxf(most, s[i][j]);
      }
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, lanes));
      }
      // Nothing seen yet: any finite number keeps exp2 from -inf - -inf.
      const float base = most == -INFINITY ? 0.0F : most;
      const float shrink = exp2f(largest[i] - base);
      largest[i] = most;
      sum[i] *= shrink;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        y[i][c] *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const float p = exp2f(s[i][j] - base);
        sum[i] += p;
        scores[(ty * kR + i) * kScoreStride + tx + 16 * j] = p;
      }
    }
    __syncthreads();  // scores are written, keys read
    load_rows<K>(
        keys, value_stride, kKeys, value_dim, a.v_vectors,
        [&](int r) -> const K* {
          return key_rows[r] < 0 ? nullptr : a.v.row(key_rows[r], kv_head);
        },
        factors(a.v_scales));
    __syncthreads();
    add_products<kKeys>(scores, keys, value_stride, value_dim, y);
  }
#pragma unroll
  for (int i = 0; i < kR; ++i) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) {
      sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], lanes);
    }
    const int r = ty * kR + i;
    const int row = tile.first_row + r;
    if (row >= rows) {
      continue;
    }
    if (tile.partial >= 0) {
      const int64_t at = (int64_t{tile.partial} * layout.kv_heads + kv_head) * kRows + r;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = 4 * tx + 64 * (c / 4) + c % 4;
        if (column < value_dim) {
          a.partials.y[at * value_dim + column] = y[i][c];
        }
      }
      if (tx == 0) {
        a.partials.largest[at] = largest[i];
        a.partials.sum[at] = sum[i];
      }
      continue;
    }
    const int64_t token = start + row / layout.group;
    const int head = kv_head * layout.group + row % layout.group;
    const Total total = total_of(layout, head, largest[i], sum[i]);
    T* out = a.y.row(token, head);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = 4 * tx + 64 * (c / 4) + c % 4;
      if (column < value_dim) {
        store(out + column, y[i][c] * total.factor);
      }
    }
    if (a.largest != nullptr && tx == 0) {
      a.largest[token * layout.heads + head] = total.largest;
      a.inverse_sum[token * layout.heads + head] = total.inverse_sum;
    }
  }
}

template <int kRows, class T, class K>
void launch_tiles(const Launch& on, const List<Tile>& tiles, ForwardArgs<T, K> a,
                  const Partials& partials) {
  a.tiles = tiles.items;
  a.partials = partials;
  const int value_dim = a.layout.value_dim;
  const auto kernel = value_dim <= 64    ? forward_kernel<T, K, kRows, 4>
                      : value_dim <= 128 ? forward_kernel<T, K, kRows, 8>
                                         : forward_kernel<T, K, kRows, 16>;
  launch(on, "attention", kernel, dim3(static_cast<unsigned>(tiles.count * a.layout.kv_heads)),
         dim3(kThreads), forward_shared(kRows, a.layout.head_dim, value_dim), a);
}

template <class T, class K>
void forward(const Attention<T>& a, const View<K>& k, const View<K>& v, const Launch& on) {
  const DeviceLayout device = layout_of(a.shape, on, a.sink_logits.data);
  const int many_rows =
      forward_rows(most_shared(), device.layout.head_dim, device.layout.value_dim);
  const TileLists lists = forward_tiles(a.shape, {many_rows, kFewRows, a.largest != nullptr}, on);
  const Partials many = make_partials(lists.many_partials, many_rows, a.shape, on);
  const Partials few = make_partials(lists.few_partials, kFewRows, a.shape, on);
  const ForwardArgs<T, K> args = {device.layout,
                                  nullptr,
                                  a.q,
                                  k,
                                  v,
                                  a.scaled_k.scales,
                                  a.scaled_v.scales,
                                  a.y,
                                  a.largest,
                                  a.inverse_sum,
                                  {},
                                  aligned(a.q, 4 * sizeof(T)),
                                  aligned(k, 4 * sizeof(K)),
                                  aligned(v, 4 * sizeof(K))};
  many_rows == 64 ? launch_tiles<64>(on, lists.many, args, many)
                  : launch_tiles<16>(on, lists.many, args, many);
  launch_tiles<kFewRows>(on, lists.few, args, few);
  combine(a, device.layout, lists.many_parts, many_rows, lists.many_parts_rows, many, on);
  combine(a, device.layout, lists.few_parts, kFewRows, lists.few_parts_rows, few, on);
}

constexpr int kCombineThreads = 128;

/// One block for each row of a tile and each head. Every thread goes through the parts in the same
/// order.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const Layout layout, const Parts* list, int tile_rows, int rows,
                   const Partials partials, const View<T> y) {
  const int r = static_cast<int>(blockIdx.x % rows);
  const int64_t rest = blockIdx.x / rows;
  const int kv_head = static_cast<int>(rest % layout.kv_heads);
  const Parts parts = list[rest / layout.kv_heads];
  const int start = layout.start[parts.segment];
  const int row = parts.first_row + r;
  if (row >= (layout.start[parts.segment + 1] - start) * layout.group) {
    return;
  }
  const int64_t step = int64_t{layout.kv_heads} * tile_rows;
  const int64_t first = (int64_t{parts.first_partial} * layout.kv_heads + kv_head) * tile_rows + r;
  float largest = -INFINITY;
  for (int i = 0; i < parts.count; ++i) {
    largest = fmaxf(largest, partials.largest[first + i * step]);
  }
  float sum = 0.0F;
  for (int i = 0; i < parts.count; ++i) {
    sum += partials.sum[first + i * step] * exp2f(partials.largest[first + i * step] - largest);
  }
  const int head = kv_head * layout.group + row % layout.group;
  const float factor = total_of(layout, head, largest, sum).factor;
  T* out = y.row(start + row / layout.group, head);
  for (int d = static_cast<int>(threadIdx.x); d < layout.value_dim; d += kCombineThreads) {
    float total = 0.0F;
#pragma unroll 8
    for (int i = 0; i < parts.count; ++i) {
      const int64_t at = first + i * step;
      total =
          fmaf(partials.y[at * layout.value_dim + d], exp2f(partials.largest[at] - largest), total);
    }
    store(out + d, total * factor);
  }
}

template <class T>
void run_forward(const Attention<T>& a, const Launch& on) {
  if constexpr (std::is_same_v<T, bf16>) {
    // The library's plans depend on the lengths of all segments.
    if ((!on.batch_invariant && forward_by_cudnn(a, on)) ||
        forward_on_tensor_cores(a, on.batch_invariant ? 0 : prefill_by_cudnn(a, on), on)) {
      return;
    }
  } else if (a.narrow_k.defined()) {
    return forward(a, a.narrow_k, a.narrow_v, on);
  }
  if (a.scaled_k.defined()) {
    return forward(a, a.scaled_k.rows, a.scaled_v.rows, on);
  }
  forward(a, a.k, a.v, on);
}

/// Rows of keys, then rows of values.
template <class T, class K>
struct WriteArgs {
  const int64_t* targets;  // (T): of the tokens
  View<T> from[2];
  View<K> to[2];
  int64_t keys;  // threads for keys
  int64_t count;
};

/// kN elements a thread.
template <int kN, class T, class K>
__global__ void __launch_bounds__(kThreads) write_kernel(const WriteArgs<T, K> a) {
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  await_inputs();
  if (i >= a.count) {
    return;
  }
  const int part = i < a.keys ? 0 : 1;
  i -= part * a.keys;
  const View<T>& from = a.from[part];
  const int64_t chunks = from.channels / kN;
  const int64_t row = i / chunks;
  const int64_t d = i % chunks * kN;
  const int64_t token = row / from.rows.inner;
  const int64_t head = row % from.rows.inner;
  float x[kN];
  load_n<kN>(from.row(token, head) + d, x);
  store_n<kN>(a.to[part].row(a.targets[token], head) + d, x);
}

template <class T, class K, class To>
void write(const AttentionWrite<T>& a, const To& to, const Launch& on) {
  const TokenRows rows = token_rows(a.shape, on);
  WriteArgs<T, K> args{
      rows.rows, {a.each[0].rows, a.each[1].rows}, {to(a.each[0]), to(a.each[1])}, 0, 0};
  const auto run = [&]<int kN>() {
    const auto threads = [&](int i) { return args.from[i].count() * (args.from[i].channels / kN); };
    args.keys = threads(0);
    args.count = threads(0) + threads(1);
    launch_ahead(on, "attention", write_kernel<kN, T, K>,
                 dim3(static_cast<unsigned>(ceil_div(args.count, kThreads))), dim3(kThreads), 0,
                 args);
  };
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  const auto wide = [&](int i) {
    return aligned(args.from[i], 16) && aligned(args.to[i], kWide * sizeof(K));
  };
  if (wide(0) && wide(1)) {
    run.template operator()<kWide>();
  } else {
    run.template operator()<1>();
  }
}

/// Rows of keys, then rows of values, into fp8.
template <class T>
struct WriteScaledArgs {
  const int64_t* targets;  // (T): of the tokens
  View<T> from[2];
  ScaledRows to[2];
  int64_t keys;  // rows of them
  int64_t count;
};

constexpr int kRowThreads = 8;
constexpr int kMostNumbers = static_cast<int>(kMaxKernelHeadDim) / kRowThreads;

/// kRowThreads threads a row, kN elements of each at a time.
template <int kN, class T>
__global__ void __launch_bounds__(kThreads) write_scaled_kernel(const WriteScaledArgs<T> a) {
  constexpr int kTimes = kMostNumbers / kN;
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kRowThreads;
  const int thread = static_cast<int>(threadIdx.x) % kRowThreads;
  await_inputs();
  const bool exists = i < a.count;
  const int part = i < a.keys ? 0 : 1;
  const View<T>& from = a.from[part];
  const int64_t r = exists ? i - part * a.keys : 0;
  const int64_t token = r / from.rows.inner;
  const int64_t head = r % from.rows.inner;
  const auto dim = exists ? static_cast<int>(from.channels) : 0;
  const T* row = from.row(token, head);
  float x[kTimes][kN];
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kTimes; ++j) {
    const int d = (j * kRowThreads + thread) * kN;
    if (d < dim) {
      load_n<kN>(row + d, x[j]);
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        largest = max(largest, magnitude_bits(x[j][e]));
      }
    }
  }
#pragma unroll
  for (int lanes = kRowThreads / 2; lanes > 0; lanes /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffU, largest, lanes));
  }
  if (!exists) {
    return;
  }
  const bf16 scale = e4m3_scale(largest);
  const float inverse = 1.0F / widen(scale);
  const ScaledRows& to = a.to[part];
  const int64_t target = a.targets[token];
  if (thread == 0) {
    *to.scale(target, head) = scale;
  }
  f8e4m3* out = to.rows.row(target, head);
#pragma unroll
  for (int j = 0; j < kTimes; ++j) {
    const int d = (j * kRowThreads + thread) * kN;
    if (d < dim) {
      Packed<kN, f8e4m3> packed;
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        packed.value[e] = to_scaled(x[j][e], inverse);
      }
      *reinterpret_cast<Packed<kN, f8e4m3>*>(out + d) = packed;
    }
  }
}

template <class T>
void write_scaled(const AttentionWrite<T>& a, const Launch& on) {
  const TokenRows rows = token_rows(a.shape, on);
  const int64_t keys = a.each[0].rows.count();
  const WriteScaledArgs<T> args{rows.rows,
                                {a.each[0].rows, a.each[1].rows},
                                {a.each[0].scaled, a.each[1].scaled},
                                keys,
                                keys + a.each[1].rows.count()};
  const auto run = [&]<int kN>() {
    launch_ahead(on, "attention", write_scaled_kernel<kN, T>,
                 dim3(static_cast<unsigned>(ceil_div(args.count * kRowThreads, kThreads))),
                 dim3(kThreads), 0, args);
  };
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  const auto wide = [&](int i) {
    return aligned(args.from[i], 16) && aligned(args.to[i].rows, kWide);
  };
  if (wide(0) && wide(1)) {
    run.template operator()<kWide>();
  } else {
    run.template operator()<1>();
  }
}

template <class T>
void run_write(const AttentionWrite<T>& a, const Launch& on) {
  if (a.each[0].scaled.defined()) {
    return write_scaled(a, on);
  }
  if constexpr (!std::is_same_v<T, bf16>) {
    if (a.each[0].narrow.defined()) {
      return write<T, bf16>(
          a, [](const auto& part) { return part.narrow; }, on);
    }
  }
  write<T, T>(
      a, [](const auto& part) { return part.pages; }, on);
}

}  // namespace

template <class T>
void combine(const Attention<T>& a, const Layout& layout, const List<Parts>& parts, int tile_rows,
             int64_t rows, const Partials& partials, const Launch& on) {
  launch(on, "attention", combine_kernel<T>,
         dim3(static_cast<unsigned>(parts.count * layout.kv_heads * rows)), dim3(kCombineThreads),
         0, layout, parts.items, tile_rows, static_cast<int>(rows), partials, a.y);
}
template void combine(const Attention<float>&, const Layout&, const List<Parts>&, int, int64_t,
                      const Partials&, const Launch&);
template void combine(const Attention<bf16>&, const Layout&, const List<Parts>&, int, int64_t,
                      const Partials&, const Launch&);

}  // namespace attention

void attention_forward(const Attention<float>& a, const Launch& on) {
  attention::run_forward(a, on);
}
void attention_forward(const Attention<bf16>& a, const Launch& on) {
  attention::run_forward(a, on);
}
void attention_write(const AttentionWrite<float>& a, const Launch& on) {
  attention::run_write(a, on);
}
void attention_write(const AttentionWrite<bf16>& a, const Launch& on) {
  attention::run_write(a, on);
}

}  // namespace cambium::cuda
