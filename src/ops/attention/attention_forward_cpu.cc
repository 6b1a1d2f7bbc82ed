// Softmax over tiles of keys with a running maximum (Milakov & Gimelshein 2018, arXiv 1805.02867;
// Dao et al. 2022, arXiv 2205.14135).
#include "base/parallel.h"
#include "ops/attention/attention_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kBlocks = kRowsPerBlock / kBlock;

/// The running softmax of a block of queries. Outputs and queries are columns.
struct State {
  QueryBlock block;
  float* q;  // (D, kBlock), scaled to give scores in powers of two
  float* y;  // (padded Dv, kBlock), not yet divided by sum
  vf largest[kVectors];
  vf sum[kVectors];
};

struct Tile {
  int64_t first;                                        // position of its first key
  int64_t key_step, value_step;                         // padded dims
  alignas(64) float keys[kTile * kMaxKernelHeadDim];    // (kTile, key_step)
  alignas(64) float values[kTile * kMaxKernelHeadDim];  // (kTile, value_step)
};

/// Row (row, head) of keys or values, widened.
template <class T>
void copy_row(const View<T>& rows, int64_t row, int64_t head, int64_t padded, float* to) {
  copy_padded(rows.row(row, head), rows.channels, padded, to);
}
void copy_row(const ScaledRows& rows, int64_t row, int64_t head, int64_t padded, float* to) {
  copy_scaled(rows.rows.row(row, head), *rows.scale(row, head), rows.rows.channels, padded, to);
}

/// Keys and values at positions [first, first + kTile); zeros where they are not seen.
template <class T>
void load_tile(const Attention<float>& in, int64_t segment, int64_t kv_head, const SeenKeys& seen,
               Tile& tile) {
  const AttentionShape& shape = in.shape;
  int64_t rows[kTile];
  find_key_rows(shape, segment, tile.first, min64(seen.end, tile.first + kTile), rows);
  for (int64_t j = 0; j < kTile; ++j) {
    float* key = tile.keys + j * tile.key_step;
    float* value = tile.values + j * tile.value_step;
    if (seen.has(tile.first + j)) {
      copy_row(keys_of(in, T{}), rows[j], kv_head, tile.key_step, key);
      copy_row(values_of(in, T{}), rows[j], kv_head, tile.value_step, value);
    } else {
      copy_padded<float>(nullptr, 0, tile.key_step, key);
      copy_padded<float>(nullptr, 0, tile.value_step, value);
    }
  }
}

/// Asks for what is seen of the keys and values at positions [begin, end).
template <class T>
void prefetch_keys(const Attention<float>& in, int64_t segment, int64_t kv_head,
                   const SeenKeys& seen, int64_t begin, int64_t end) {
  int64_t rows[kTile];
  find_key_rows(in.shape, segment, begin, min64(end, seen.end), rows);
  for (int64_t j = 0; j < end - begin; ++j) {
    if (!seen.has(begin + j)) {
      continue;
    }
    prefetch(rows_of(keys_of(in, T{})).row(rows[j], kv_head), in.shape.head_dim);
    prefetch(rows_of(values_of(in, T{})).row(rows[j], kv_head), in.shape.value_dim);
  }
}

/// Takes the first `keys` keys of the tile into the softmax; a multiple of kPanel.
template <bool kCapped>
void add_tile(const AttentionShape& shape, const Tile& tile, int64_t keys, State& state) {
  alignas(64) float scores[kTile * kBlock];  // (keys, kBlock)
  const SoftCap softcap(shape);
  vf largest[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    largest[v] = state.largest[v];
  }
  for (int64_t j = 0; j < keys; j += kPanel) {
    vf s[kPanel][kVectors] = {};
    multiply(shape.head_dim, tile.keys + j * tile.key_step, tile.key_step, 1, state.q, kBlock, s);
    if constexpr (kCapped) {
      for (auto& row : s) {
        for (vf& score : row) {
          score = softcap(score);
        }
      }
    }
    if (needs_mask(shape, state.block, tile.first + j, tile.first + j + kPanel)) {
      mask(shape, state.block, tile.first + j, s);
    }
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        vstore(scores + (j + r) * kBlock + v * kLanes, s[r][v]);
        largest[v] = vmax(s[r][v], largest[v]);
      }
    }
  }
  vf shrink[kVectors];
  vf sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    shrink[v] = vexp2(state.largest[v] - largest[v]);
    state.largest[v] = largest[v];
    sum[v] = state.sum[v] * shrink[v];
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + j * kBlock + v * kLanes;
      const vf p = vexp2(vload(at) - largest[v]);
      sum[v] += p;
      vstore(at, p);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    state.sum[v] = sum[v];
  }
  for (int64_t d = 0; d < shape.value_dim; d += kPanel) {
    vf y[kPanel][kVectors];
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        y[r][v] = vload(state.y + (d + r) * kBlock + v * kLanes) * shrink[v];
      }
    }
    multiply(keys, tile.values + d, 1, tile.value_step, scores, kBlock, y);
    for (int r = 0; r < kPanel; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        vstore(state.y + (d + r) * kBlock + v * kLanes, y[r][v]);
      }
    }
  }
}

void start(const Attention<float>& a, State& state) {
  const AttentionShape& shape = a.shape;
  static constexpr float kZeros[kMaxKernelHeadDim] = {};
  const float* rows[kBlock];
  alignas(64) float factor[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    rows[i] = i < state.block.count ? a.q.row(state.block.token[i], state.block.head[i]) : kZeros;
    factor[i] = shape.scale * kLog2E;
  }
  to_columns(rows, shape.head_dim, factor, state.q);
  std::memset(state.y, 0,
              static_cast<size_t>(padded_dim(shape.value_dim) * kBlock) * sizeof(float));
  for (int v = 0; v < kVectors; ++v) {
    state.largest[v] = vset(kMasked);
    state.sum[v] = vf{};
  }
}

/// Takes the sinks of the heads into the softmax.
void add_sinks(const Attention<float>& a, State& state) {
  alignas(64) float sinks[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    sinks[i] = i < state.block.count ? a.sink_logits.data[state.block.head[i]] * kLog2E : kMasked;
  }
  for (int v = 0; v < kVectors; ++v) {
    const vf sink = vload(sinks + v * kLanes);
    const vf largest = vmax(sink, state.largest[v]);
    const vf shrink = vexp2(state.largest[v] - largest);
    state.largest[v] = largest;
    state.sum[v] = state.sum[v] * shrink + vexp2(sink - largest);
    for (int64_t d = 0; d < a.shape.value_dim; ++d) {
      float* y = state.y + d * kBlock + v * kLanes;
      vstore(y, vload(y) * shrink);
    }
  }
}

void finish(const Attention<float>& a, State& state) {
  const AttentionShape& shape = a.shape;
  if (a.sink_logits.defined()) {
    add_sinks(a, state);
  }
  float* rows[kBlock];
  for (int64_t i = 0; i < state.block.count; ++i) {
    const int64_t row = state.block.token[i] * shape.heads + state.block.head[i];
    rows[i] = a.y.data + row * shape.value_dim;
    if (a.largest != nullptr) {
      a.largest[row] = state.largest[i / kLanes][i % kLanes];
      a.inverse_sum[row] = 1.0F / state.sum[i / kLanes][i % kLanes];
    }
  }
  vf inverse[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    inverse[v] = 1.0F / state.sum[v];
  }
  from_columns<false>(state.y, shape.value_dim, inverse, state.block.count, rows);
}

/// Tiles are widened as they are loaded, so that one loop over them serves every type of pages.
template <class T>
void run_block(const Attention<float>& a, const AttentionBlock& piece) {
  const AttentionShape& shape = a.shape;
  alignas(64) float q[kRowsPerBlock * kMaxKernelHeadDim];
  alignas(64) float y[kRowsPerBlock * kMaxKernelHeadDim];
  Tile tile;
  tile.key_step = padded_dim(shape.head_dim);
  tile.value_step = padded_dim(shape.value_dim);
  State states[kBlocks];
  const int64_t end = shape.length(piece.segment) * shape.group();
  const auto add = shape.softcap > 0.0F ? add_tile<true> : add_tile<false>;
  int64_t blocks = 0;
  for (int64_t row = piece.first_row; blocks < kBlocks && row < end; row += kBlock, ++blocks) {
    State& state = states[blocks];
    locate(shape, piece.segment, piece.kv_head, row, end, state.block);
    state.q = q + blocks * shape.head_dim * kBlock;
    state.y = y + blocks * tile.value_step * kBlock;
    start(a, state);
  }
  const SeenKeys seen =
      shape.seen_keys(states[0].block.first_position, states[blocks - 1].block.last_position);
  // Tiles begin at multiples of kTile, so that sums do not depend on how a prompt was cut.
  int64_t next_tile = 0;
  for (tile.first = seen.first_tile(kTile); tile.first < seen.end; tile.first = next_tile) {
    next_tile = seen.next_tile(tile.first, kTile);
    load_tile<T>(a, piece.segment, piece.kv_head, seen, tile);
    for (int64_t b = 0; b < blocks; ++b) {
      // A share of the next tile arrives while this block is computed.
      constexpr int64_t kShare = kTile / kBlocks;
      const int64_t next = next_tile + b * kShare;
      prefetch_keys<T>(a, piece.segment, piece.kv_head, seen, next, next + kShare);
      const QueryBlock& block = states[b].block;
      if (tile.first <= block.last_position &&
          (tile.first < shape.sinks || tile.first + kTile > shape.reach(block.first_position))) {
        add(shape, tile, min64(kTile, round_up(block.last_position - tile.first + 1, kPanel)),
            states[b]);
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    finish(a, states[b]);
  }
}

}  // namespace

void attention_blocks(const AttentionBlocks& a) {
  parallel_for(a.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (a.in.scaled_k.defined()) {
        run_block<f8e4m3>(a.in, a.blocks[i]);
      } else if (a.in.narrow_k.defined()) {
        run_block<bf16>(a.in, a.blocks[i]);
      } else {
        run_block<float>(a.in, a.blocks[i]);
      }
    }
  });
}

namespace {

void write_scaled(const float* from, const ScaledRows& scaled, int64_t to, int64_t head) {
  f8e4m3* row = scaled.rows.row(to, head);
  uint32_t largest = 0;
  for (int64_t d = 0; d < scaled.rows.channels; ++d) {
    const uint32_t bits = magnitude_bits(from[d]);
    largest = bits > largest ? bits : largest;
  }
  const bf16 scale = e4m3_scale(largest);
  const float inverse = 1.0F / widen(scale);
  *scaled.scale(to, head) = scale;
  for (int64_t d = 0; d < scaled.rows.channels; ++d) {
    row[d] = to_scaled(from[d], inverse);
  }
}

}  // namespace

void attention_write(const AttentionWrite<float>& a) {
  const AttentionShape& shape = a.shape;
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t i = 0; i < shape.length(s); ++i) {
      const int64_t to = shape.key_row(s, shape.first_position(s) + i);
      for (const auto& part : a.each) {
        for (int64_t h = 0; h < part.rows.rows.inner; ++h) {
          const float* row = part.rows.row(shape.start[s] + i, h);
          if (part.scaled.defined()) {
            write_scaled(row, part.scaled, to, h);
            continue;
          }
          for (int64_t d = 0; d < part.rows.channels; ++d) {
            if (part.narrow.defined()) {
              part.narrow.row(to, h)[d] = round_to_bf16(row[d]);
            } else {
              part.pages.row(to, h)[d] = row[d];
            }
          }
        }
      }
    }
  }
}

}  // namespace cambium::CAMBIUM_ISA
