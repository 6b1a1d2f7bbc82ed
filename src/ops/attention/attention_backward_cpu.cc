// Probabilities are computed again from each query's largest score and sum. With P the
// probabilities and dP = dY V': dV = P' dY, dS = P (dP - rowsum(dY Y)), dQ = scale dS K, dK = scale
// dS' Q. The factors 1 / sum and scale are taken into the copies of dY.
#include "base/parallel.h"
#include "ops/attention/attention_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

/// A block of queries with all that a chunk of keys needs of it.
struct Queries {
  QueryBlock block;
  vf largest[kVectors];
  vf delta[kVectors];                                     // scale / sum * rowsum(dY Y)
  alignas(64) float q[kMaxKernelHeadDim * kBlock];        // columns, scaled to give powers of two
  alignas(64) float dy[kMaxKernelHeadDim * kBlock];       // columns, times scale / sum
  alignas(64) float dq[kMaxKernelHeadDim * kBlock];       // columns
  alignas(64) float q_rows[kBlock * kMaxKernelHeadDim];   // (kBlock, padded D)
  alignas(64) float dy_rows[kBlock * kMaxKernelHeadDim];  // (kBlock, padded Dv), over sum
};

/// The scratch memory of a chunk of keys.
struct Keys {
  int64_t first;  // position of its first key
  int64_t end;
  int64_t key_step, value_step;
  float* keys;    // (end - first padded to kPanel, key_step)
  float* values;  // (.., value_step)
  float* key_grads;
  float* value_grads;
};

Keys find_keys(const AttentionPairs& a, const AttentionPair& pair) {
  const AttentionShape& shape = a.in.shape;
  Keys keys;
  keys.first = pair.key_chunk * kTokensPerChunk;
  keys.end = min64(keys.first + kTokensPerChunk, shape.length(pair.segment));
  keys.key_step = padded_dim(shape.head_dim);
  keys.value_step = padded_dim(shape.value_dim);
  const int64_t row =
      pair.kv_head * scratch_rows(shape) + scratch_row(shape, pair.segment) + keys.first;
  keys.keys = a.keys + row * keys.key_step;
  keys.values = a.values + row * keys.value_step;
  keys.key_grads = a.key_grads + row * keys.key_step;
  keys.value_grads = a.value_grads + row * keys.value_step;
  return keys;
}

void load_keys(const AttentionPairs& a, const AttentionPair& pair, const Keys& keys) {
  const Attention<float>& in = a.in;
  const int64_t rows = keys.end - keys.first;
  for (int64_t j = 0; j < round_up(rows, kPanel); ++j) {
    const int64_t row = in.shape.start[pair.segment] + keys.first + j;
    const bool exists = j < rows;
    copy_padded(in.k.row(row, pair.kv_head), exists ? in.shape.head_dim : 0, keys.key_step,
                keys.keys + j * keys.key_step);
    copy_padded(in.v.row(row, pair.kv_head), exists ? in.shape.value_dim : 0, keys.value_step,
                keys.values + j * keys.value_step);
  }
  const auto size = static_cast<size_t>(round_up(rows, kPanel)) * sizeof(float);
  std::memset(keys.key_grads, 0, size * static_cast<size_t>(keys.key_step));
  std::memset(keys.value_grads, 0, size * static_cast<size_t>(keys.value_step));
}

void add_row(const float* from, int64_t n, float* to) {
  for (int64_t d = 0; d < n; ++d) {
    to[d] += from[d];
  }
}

void store_keys(const AttentionPairs& a, const AttentionPair& pair, const Keys& keys) {
  const Attention<float>& in = a.in;
  for (int64_t j = 0; j < keys.end - keys.first; ++j) {
    const int64_t row = in.shape.start[pair.segment] + keys.first + j;
    if (in.k.grad != nullptr) {
      add_row(keys.key_grads + j * keys.key_step, in.shape.head_dim,
              in.k.grad_row(row, pair.kv_head));
    }
    if (in.v.grad != nullptr) {
      add_row(keys.value_grads + j * keys.value_step, in.shape.value_dim,
              in.v.grad_row(row, pair.kv_head));
    }
  }
}

void load_queries(const AttentionPairs& a, Queries& queries) {
  static constexpr float kZeros[kMaxKernelHeadDim] = {};
  const AttentionShape& shape = a.in.shape;
  const QueryBlock& block = queries.block;
  const int64_t q_step = padded_dim(shape.head_dim);
  const int64_t dy_step = padded_dim(shape.value_dim);
  const float* q[kBlock];
  const float* dy[kBlock];
  const float* y[kBlock];
  alignas(64) float q_factor[kBlock];
  alignas(64) float dy_factor[kBlock];
  alignas(64) float largest[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = block.token[i] * shape.heads + block.head[i];
    const bool exists = i < block.count;
    q[i] = exists ? a.in.q.row(block.token[i], block.head[i]) : kZeros;
    dy[i] = exists ? a.in.y.grad + row * shape.value_dim : kZeros;
    y[i] = exists ? a.in.y.data + row * shape.value_dim : kZeros;
    const float inverse_sum = exists ? a.in.inverse_sum[row] : 0.0F;
    q_factor[i] = shape.scale * kLog2E;
    dy_factor[i] = shape.scale * inverse_sum;
    largest[i] = exists ? a.in.largest[row] : 0.0F;
    copy_padded(q[i], shape.head_dim, q_step, queries.q_rows + i * q_step);
    float* dy_row = queries.dy_rows + i * dy_step;
    copy_padded(dy[i], shape.value_dim, dy_step, dy_row);
    for (int64_t d = 0; d < dy_step; ++d) {
      dy_row[d] *= inverse_sum;
    }
  }
  to_columns(q, shape.head_dim, q_factor, queries.q);
  to_columns(dy, shape.value_dim, dy_factor, queries.dy);
  to_columns(y, shape.value_dim, nullptr,
             queries.dq);  // dq is free until the first key
  for (int v = 0; v < kVectors; ++v) {
    queries.largest[v] = vload(largest + v * kLanes);
    vf delta = {};
    for (int64_t d = 0; d < shape.value_dim; ++d) {
      const int64_t at = d * kBlock + v * kLanes;
      delta += vload(queries.dy + at) * vload(queries.dq + at);
    }
    queries.delta[v] = delta;
  }
  std::memset(queries.dq, 0, static_cast<size_t>(q_step * kBlock) * sizeof(float));
}

void store_queries(const AttentionPairs& a, Queries& queries) {
  float* rows[kBlock];
  for (int64_t i = 0; i < queries.block.count; ++i) {
    rows[i] = a.in.q.grad_row(queries.block.token[i], queries.block.head[i]);
  }
  const vf one[kVectors] = {vset(1.0F), vset(1.0F)};
  from_columns<true>(queries.dq, a.in.shape.head_dim, one, queries.block.count, rows);
}

/// grads (keys, step) += weights (keys, kBlock) * rows (kBlock, step), V vectors of each row.
template <int V>
void add_to_grads(int64_t keys, const float* weights, const float* rows, int64_t step,
                  float* grads) {
  for (int64_t j = 0; j < keys; j += kPanel) {
    vf sums[kPanel][V];
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < V; ++v) {
        sums[r][v] = vload(grads + (j + r) * step + v * kLanes);
      }
    }
    multiply(kBlock, weights + j * kBlock, kBlock, 1, rows, step, sums);
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < V; ++v) {
        vstore(grads + (j + r) * step + v * kLanes, sums[r][v]);
      }
    }
  }
}

void add_weighted_rows(int64_t keys, const float* weights, const float* rows, int64_t step,
                       float* grads) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= step; d += 2 * kLanes) {
    add_to_grads<2>(keys, weights, rows + d, step, grads + d);
  }
  for (; d < step; d += kLanes) {
    add_to_grads<1>(keys, weights, rows + d, step, grads + d);
  }
}

/// The share of `count` keys (a multiple of kPanel, at most kTile) from `first` on, counted within
/// the chunk.
template <bool kCapped>
void add_tile(const AttentionPairs& a, const Keys& keys, int64_t first, int64_t count,
              Queries& queries) {
  const AttentionShape& shape = a.in.shape;
  alignas(64) float p[kTile * kBlock];   // exp(score - largest)
  alignas(64) float ds[kTile * kBlock];  // scale dS
  const SoftCap softcap(shape);
  const float* k = keys.keys + first * keys.key_step;
  const float* value = keys.values + first * keys.value_step;
  for (int64_t j = 0; j < count; j += kPanel) {
    vf s[kPanel][kVectors] = {};
    multiply(shape.head_dim, k + j * keys.key_step, keys.key_step, 1, queries.q, kBlock, s);
    if constexpr (kCapped) {
      for (int r = 0; r < kPanel; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          const vf bend = softcap.bend(s[r][v]);
          s[r][v] = softcap.cap * bend;
          vstore(ds + (j + r) * kBlock + v * kLanes, 1.0F - bend * bend);
        }
      }
    }
    const int64_t position = keys.first + first + j;
    if (needs_mask(shape, queries.block, position, position + kPanel)) {
      mask(shape, queries.block, position, s);
    }
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        vstore(p + (j + r) * kBlock + v * kLanes, vexp2(s[r][v] - queries.largest[v]));
        s[r][v] = -queries.delta[v];
      }
    }
    multiply(shape.value_dim, value + j * keys.value_step, keys.value_step, 1, queries.dy, kBlock,
             s);
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = (j + r) * kBlock + v * kLanes;
        const vf slope = kCapped ? vload(ds + at) : vset(1.0F);
        vstore(ds + at, vload(p + at) * s[r][v] * slope);
      }
    }
  }
  if (a.in.v.grad != nullptr) {
    add_weighted_rows(count, p, queries.dy_rows, keys.value_step,
                      keys.value_grads + first * keys.value_step);
  }
  if (a.in.k.grad != nullptr) {
    add_weighted_rows(count, ds, queries.q_rows, keys.key_step,
                      keys.key_grads + first * keys.key_step);
  }
  for (int64_t d = 0; a.in.q.grad != nullptr && d < shape.head_dim; d += kPanel) {
    vf dq[kPanel][kVectors];
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        dq[r][v] = vload(queries.dq + (d + r) * kBlock + v * kLanes);
      }
    }
    multiply(count, k + d, 1, keys.key_step, ds, kBlock, dq);
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        vstore(queries.dq + (d + r) * kBlock + v * kLanes, dq[r][v]);
      }
    }
  }
}

void run_pair(const AttentionPairs& a, const AttentionPair& pair) {
  const AttentionShape& shape = a.in.shape;
  const Keys keys = find_keys(a, pair);
  if (pair.first) {
    load_keys(a, pair, keys);
  }
  Queries queries;
  const auto add = shape.softcap > 0.0F ? add_tile<true> : add_tile<false>;
  const int64_t group = shape.group();
  const int64_t first_token = pair.query_chunk * kTokensPerChunk;
  const int64_t end_row = min64(first_token + kTokensPerChunk, shape.length(pair.segment)) * group;
  for (int64_t row = first_token * group; row < end_row; row += kBlock) {
    locate(shape, pair.segment, pair.kv_head, row, end_row, queries.block);
    const SeenKeys seen =
        shape.seen_keys(queries.block.first_position, queries.block.last_position);
    const int64_t sinks = min64(seen.sinks, keys.end) - keys.first;
    const int64_t lo = max64(seen.first, keys.first) - keys.first;
    const int64_t hi = min64(seen.end, keys.end) - keys.first;
    if (sinks <= 0 && lo >= hi) {
      continue;
    }
    load_queries(a, queries);
    for (int64_t j = 0; j < sinks; j += kTile) {
      add(a, keys, j, min64(kTile, round_up(sinks - j, kPanel)), queries);
    }
    // A panel with sinks and keys of the window is done.
    const int64_t done = sinks > 0 ? round_up(sinks, kPanel) : 0;
    for (int64_t j = max64(lo / kPanel * kPanel, done); j < hi; j += kTile) {
      add(a, keys, j, min64(kTile, round_up(hi - j, kPanel)), queries);
    }
    if (a.in.q.grad != nullptr) {
      store_queries(a, queries);
    }
  }
  if (pair.last) {
    store_keys(a, pair, keys);
  }
}

}  // namespace

void attention_sink_grads(const Attention<float>& a) {
  const AttentionShape& shape = a.shape;
  parallel_for(shape.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const float sink = a.sink_logits.data[h] * kLog2E;
      double sum = 0.0;
      for (int64_t t = 0; t < a.y.rows.outer; ++t) {
        const float* y = a.y.row(t, h);
        const float* dy = a.y.grad_row(t, h);
        double delta = 0.0;
        for (int64_t d = 0; d < shape.value_dim; ++d) {
          delta += static_cast<double>(y[d]) * static_cast<double>(dy[d]);
        }
        const int64_t row = t * shape.heads + h;
        const float p = vexp2(vset(sink - a.largest[row]))[0] * a.inverse_sum[row];
        sum += static_cast<double>(p) * delta;
      }
      a.sink_logits.grad[h] -= static_cast<float>(sum);
    }
  });
}

void attention_pairs(const AttentionPairs& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run_pair(a, a.pairs[i]);
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
