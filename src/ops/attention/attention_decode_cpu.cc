// Few queries over many cached keys: the time is that of reading the cache once. Keys and values
// are read as vectors where they lie; all queries of the segment take their share of a tile before
// the next is read. The partial results of splits are combined in the order of their positions.
#include "base/parallel.h"
#include "ops/attention/attention_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int kMaxQueries = 4;  // taken together

/// One query's part of a split.
struct Partial {
  float* y;  // (padded Dv): sum of exp2(score - largest) * value
  float* q;  // (padded D), scaled to give powers of two
  float* largest;
  float* sum;
};

Partial partial_of(const AttentionShape& shape, float* base, int64_t query) {
  float* y = base + query * partial_size(shape);
  float* q = y + padded_dim(shape.value_dim);
  float* rest = q + padded_dim(shape.head_dim);
  return {y, q, rest, rest + 1};
}

/// Keys and values of one head at positions [first, first + kTile); zeros outside [begin, end).
template <class T>
struct Tile {
  int64_t first;
  int64_t begin, end;  // positions that belong to the split
  int64_t rows[kTile];
  const T* keys[kTile];
  const T* values[kTile];
};

/// Rows of heads whose dims are no multiple of a vector, padded, and those of fp8 pages, widened.
template <class T>
struct PaddedRows {
  alignas(64) T keys[kTile * kMaxKernelHeadDim];
  alignas(64) T values[kTile * kMaxKernelHeadDim];
};

template <class T>
const T* pad(const T* from, int64_t n, int64_t padded, T* to) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  std::memset(to + n, 0, static_cast<size_t>(padded - n) * sizeof(T));
  return to;
}

/// Moves the tile to the positions of [first, first + kTile) that belong to the split.
template <class T>
void move_tile(const AttentionShape& shape, const AttentionSplit& split, int64_t first,
               Tile<T>& tile) {
  tile.first = first;
  tile.begin = max64(split.first, first);
  tile.end = min64(split.last, first + kTile);
  if (tile.begin < tile.end) {
    find_key_rows(shape, split.segment, tile.begin, tile.end, tile.rows + (tile.begin - first));
  }
}

template <class T>
const T* head_row(const View<T>& rows, int64_t row, int64_t head, int64_t step, T* to) {
  const T* from = rows.row(row, head);
  return rows.channels % kLanes == 0 ? from : pad(from, rows.channels, step, to);
}
const float* head_row(const ScaledRows& rows, int64_t row, int64_t head, int64_t step, float* to) {
  copy_scaled(rows.rows.row(row, head), *rows.scale(row, head), rows.rows.channels, step, to);
  return to;
}

/// T: what the rows of a tile are; Stored: what the pages hold.
template <class Stored, class T>
void find_heads(const Attention<float>& in, int64_t kv_head, Tile<T>& tile, PaddedRows<T>& padded) {
  static constexpr T kZeros[kMaxKernelHeadDim] = {};
  const AttentionShape& shape = in.shape;
  const int64_t key_step = padded_dim(shape.head_dim);
  const int64_t value_step = padded_dim(shape.value_dim);
  for (int64_t j = 0; j < kTile; ++j) {
    const int64_t p = tile.first + j;
    if (p < tile.begin || p >= tile.end) {
      tile.keys[j] = kZeros;
      tile.values[j] = kZeros;
      continue;
    }
    tile.keys[j] = head_row(keys_of(in, Stored{}), tile.rows[j], kv_head, key_step,
                            padded.keys + j * key_step);
    tile.values[j] = head_row(values_of(in, Stored{}), tile.rows[j], kv_head, value_step,
                              padded.values + j * value_step);
  }
}

/// Asks for one head's keys and values of a tile.
template <class Stored, class T>
void prefetch_heads(const Attention<float>& in, int64_t kv_head, const Tile<T>& tile) {
  for (int64_t j = tile.begin - tile.first; j < tile.end - tile.first; ++j) {
    prefetch(rows_of(keys_of(in, Stored{})).row(tile.rows[j], kv_head), in.shape.head_dim);
    prefetch(rows_of(values_of(in, Stored{})).row(tile.rows[j], kv_head), in.shape.value_dim);
  }
}

/// scores (N, kTile) of the keys [begin, end) of the tile, begin and end counted within it.
template <int N, class T>
void score(const AttentionShape& shape, const Tile<T>& tile, int64_t begin, int64_t end,
           int64_t vectors, const Partial* queries, float* scores) {
  const SoftCap softcap(shape);
  for (int64_t j0 = begin / kLanes * kLanes; j0 < end; j0 += kLanes) {
    vf sums[N][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* key = tile.keys[j0 + i];
      vf dots[N] = {};
      for (int64_t d = 0; d < vectors; ++d) {
        const vf x = vload(key + d * kLanes);
        for (int n = 0; n < N; ++n) {
          dots[n] += x * vload(queries[n].q + d * kLanes);
        }
      }
      for (int n = 0; n < N; ++n) {
        sums[n][i] = dots[n];
      }
    }
    for (int n = 0; n < N; ++n) {
      const vf dots = sum_step<1>(sums[n]);
      vstore(scores + n * kTile + j0, shape.softcap > 0.0F ? softcap(dots) : dots);
    }
  }
  for (int n = 0; n < N; ++n) {
    float* s = scores + n * kTile;
    for (int64_t j = begin / kLanes * kLanes; j < begin; ++j) {
      s[j] = kMasked;
    }
    for (int64_t j = end; j < round_up(end, kLanes); ++j) {
      s[j] = kMasked;
    }
  }
}

/// scores become exp2(score - largest); returns what earlier sums shrink by.
float weigh(int64_t begin, int64_t end, float* scores, const Partial& query) {
  vf largest = vset(*query.largest);
  for (int64_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
    largest = vmax(vload(scores + j), largest);
  }
  const float top = vreduce_max(largest);
  const float shrink = vexp2(vset(*query.largest - top))[0];
  vf sum = {};
  for (int64_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
    const vf p = vexp2(vload(scores + j) - top);
    vstore(scores + j, p);
    sum += p;
  }
  *query.largest = top;
  *query.sum = *query.sum * shrink + vsum(sum);
  return shrink;
}

/// Adds weight * value over the keys [begin, end), V vectors of each value from dim d on.
template <int N, int V, class T>
void add_values(const Tile<T>& tile, int64_t begin, int64_t end, int64_t d, const float* weights,
                const float* shrink, const Partial* queries) {
  vf y[N][V];
  for (int n = 0; n < N; ++n) {
    for (int v = 0; v < V; ++v) {
      y[n][v] = vload(queries[n].y + d + v * kLanes) * shrink[n];
    }
  }
  for (int64_t j = begin; j < end; ++j) {
    const T* value = tile.values[j] + d;
    vf x[V];
    for (int v = 0; v < V; ++v) {
      x[v] = vload(value + v * kLanes);
    }
    for (int n = 0; n < N; ++n) {
      const vf weight = vset(weights[n * kTile + j]);
      for (int v = 0; v < V; ++v) {
        y[n][v] += weight * x[v];
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int v = 0; v < V; ++v) {
      vstore(queries[n].y + d + v * kLanes, y[n][v]);
    }
  }
}

template <int N, class T>
void add_tile(const AttentionShape& shape, const Tile<T>& tile, int64_t begin, int64_t end,
              const Partial* queries) {
  alignas(64) float scores[N * kTile];
  float shrink[N];
  score<N>(shape, tile, begin, end, round_up(shape.head_dim, kLanes) / kLanes, queries, scores);
  for (int n = 0; n < N; ++n) {
    shrink[n] = weigh(begin, end, scores + n * kTile, queries[n]);
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= round_up(shape.value_dim, kLanes); d += 4 * kLanes) {
    add_values<N, 4>(tile, begin, end, d, scores, shrink, queries);
  }
  for (; d < shape.value_dim; d += kLanes) {
    add_values<N, 1>(tile, begin, end, d, scores, shrink, queries);
  }
}

float* partials_of(const AttentionSplits& a, const AttentionSplit& split) {
  return a.partials + split.partial * partial_size(a.in.shape);
}

/// The queries of one token and key-value head.
template <class T>
void add_token(const AttentionShape& shape, const Tile<T>& tile, int64_t position, float* partial,
               int64_t first_query) {
  // Of sinks every key is seen.
  const int64_t reach = tile.end <= shape.sinks ? 0 : shape.reach(position);
  const int64_t begin = max64(tile.begin, reach) - tile.first;
  const int64_t end = min64(tile.end, position + 1) - tile.first;
  if (begin >= end) {
    return;
  }
  int64_t g = 0;
  while (g < shape.group()) {
    Partial queries[kMaxQueries];
    const int64_t n = min64(kMaxQueries, shape.group() - g);
    for (int64_t i = 0; i < n; ++i) {
      queries[i] = partial_of(shape, partial, first_query + g + i);
    }
    switch (n) {
      case 1:
        add_tile<1>(shape, tile, begin, end, queries);
        break;
      case 2:
        add_tile<2>(shape, tile, begin, end, queries);
        break;
      case 3:
        add_tile<3>(shape, tile, begin, end, queries);
        break;
      default:
        add_tile<4>(shape, tile, begin, end, queries);
    }
    g += n;
  }
}

template <class Stored, class T = Stored>
void run_split(const AttentionSplits& work, const AttentionSplit& split) {
  const Attention<float>& a = work.in;
  const AttentionShape& shape = a.shape;
  float* partials = partials_of(work, split);
  const int64_t tokens = shape.length(split.segment);
  for (int64_t query = 0; query < tokens * shape.heads; ++query) {
    const Partial partial = partial_of(shape, partials, query);
    const float* q = a.q.row(shape.start[split.segment] + query / shape.heads, query % shape.heads);
    copy_padded<float>(nullptr, 0, padded_dim(shape.value_dim), partial.y);
    copy_padded(q, shape.head_dim, padded_dim(shape.head_dim), partial.q);
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      partial.q[d] *= shape.scale * kLog2E;
    }
    *partial.largest = kMasked;
    *partial.sum = 0.0F;
  }
  PaddedRows<T> padded;
  Tile<T> tiles[2];
  int64_t first = split.first / kTile * kTile;
  move_tile(shape, split, first, tiles[0]);
  for (int now = 0; first < split.last; first += kTile, now = 1 - now) {
    Tile<T>& tile = tiles[now];
    Tile<T>& next = tiles[1 - now];
    move_tile(shape, split, first + kTile, next);
    for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      prefetch_heads<Stored>(a, kv_head, next);
      find_heads<Stored>(a, kv_head, tile, padded);
      for (int64_t t = 0; t < tokens; ++t) {
        add_token(shape, tile, shape.first_position(split.segment) + t, partials,
                  t * shape.heads + kv_head * shape.group());
      }
    }
  }
}

void combine(const AttentionSplits& a, int64_t first, int64_t end) {
  const AttentionShape& shape = a.in.shape;
  const int64_t segment = a.splits[first].segment;
  for (int64_t query = 0; query < shape.length(segment) * shape.heads; ++query) {
    const float sink =
        a.in.sink_logits.defined() ? a.in.sink_logits.data[query % shape.heads] * kLog2E : kMasked;
    float largest = sink;
    for (int64_t i = first; i < end; ++i) {
      const float x = *partial_of(shape, partials_of(a, a.splits[i]), query).largest;
      largest = x > largest ? x : largest;
    }
    float* y = a.in.y.data + (shape.start[segment] * shape.heads + query) * shape.value_dim;
    float sum = a.in.sink_logits.defined() ? vexp2(vset(sink - largest))[0] : 0.0F;
    for (int64_t d = 0; d < shape.value_dim; ++d) {
      y[d] = 0.0F;
    }
    for (int64_t i = first; i < end; ++i) {
      const Partial partial = partial_of(shape, partials_of(a, a.splits[i]), query);
      const float weight = vexp2(vset(*partial.largest - largest))[0];
      sum += weight * *partial.sum;
      for (int64_t d = 0; d < shape.value_dim; ++d) {
        y[d] += weight * partial.y[d];
      }
    }
    for (int64_t d = 0; d < shape.value_dim; ++d) {
      y[d] /= sum;
    }
  }
}

}  // namespace

void attention_splits(const AttentionSplits& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (a.in.scaled_k.defined()) {
        run_split<f8e4m3, float>(a, a.splits[i]);
      } else if (a.in.narrow_k.defined()) {
        run_split<bf16>(a, a.splits[i]);
      } else {
        run_split<float>(a, a.splits[i]);
      }
    }
  });
  for (int64_t first = 0; first < a.count;) {
    int64_t end = first + 1;
    while (end < a.count && a.splits[end].segment == a.splits[first].segment) {
      ++end;
    }
    combine(a, first, end);
    first = end;
  }
}

}  // namespace cambium::CAMBIUM_ISA
