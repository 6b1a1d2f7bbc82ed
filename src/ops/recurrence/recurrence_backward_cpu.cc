#include "ops/recurrence/chunk.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Gradients of one chunk, in the notation of chunk.h. dG is taken from the gradients by q and k: an
// entry P_ij = q_i . exp(G_i - G_j) k_j changes with G_i as with q_i, and with -G_j as with k_j. So
//   dG_i = q_i * dq_i + k_i * (dk_i as a row - dk_i as a column),
// channel by channel, or summed over channels for a scalar decay.
struct ChunkGradients {
  float* dy;       // (rows, dim)
  float* de;       // (rows, dim) by w e, then by e
  float* dp;       // (rows, kChunk)
  float* dr;       // (rows, kChunk)
  float* wet;      // (dim, kChunk) w e transposed
  float* st;       // (dim, key) the state at the start, transposed
  float* dst;      // (dim, key) the gradient by the state at the end, transposed
  float* dq;       // (rows, key)
  float* dk_row;   // (rows, key)
  float* dk;       // (rows, key) as a column, then in all
  float* dg;       // (rows, key), or (rows)
  float* dw;       // (rows)
  float* dlast;    // (key) the part of dG of the last token by kb and by the state
  float* after;    // (rows, key) per channel: exp(G_(first - 1) - G_j)
  float* k_after;  // (rows, key) per channel: the same times k_j
  float* part;     // (kChunk, key)

  ChunkGradients(Scratch& s, const Chunk& ch) {
    dy = s.take(kChunk * ch.dim);
    de = s.take(kChunk * ch.dim);
    dp = s.take(kChunk * kChunk);
    dr = s.take(kChunk * kChunk);
    wet = s.take(kChunk * ch.dim);
    st = s.take(ch.key * ch.dim);
    dst = s.take(ch.key * ch.dim);
    dq = s.take(kChunk * ch.key);
    dk_row = s.take(kChunk * ch.key);
    dk = s.take(kChunk * ch.key);
    dg = s.take(kChunk * ch.key);
    dw = s.take(kChunk);
    dlast = s.take(ch.key);
    after = s.take(kChunk * ch.key);
    k_after = s.take(kChunk * ch.key);
    part = s.take(kChunk * ch.key);
  }
};

float dot(const float* a, const float* b, int64_t n) {
  vf sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    sum += vload(a + i) * vload(b + i);
  }
  return vsum(sum);
}

// The transposed solve: de_i = w_i (d(w e)_i - sum_{j > i} R_ji de_j); dw_i = that before w, times
// e_i.
template <bool kDelta>
void solve_backward(const Chunk& ch, const ChunkGradients& g) {
  for (int64_t first = ch.rows - kTile; first >= 0; first -= kTile) {
    float* de = g.de + first * ch.dim;
    if constexpr (kDelta) {
      const int64_t below = first + kTile;
      multiply<Into::kSubtract>(kTile, ch.dim, ch.rows - below,
                                {ch.r + below * kChunk + first, 1, kChunk}, g.de + below * ch.dim,
                                ch.dim, de, ch.dim);
    }
    const float* r = ch.r + first * kChunk + first;
    vf dw[kTile] = {};
    for (int64_t c = 0; c < ch.dim; c += kLanes) {
      vf done[kTile];
#pragma GCC unroll 16
      for (int i = kTile - 1; i >= 0; --i) {
        vf x = vload(de + i * ch.dim + c);
        if constexpr (kDelta) {
#pragma GCC unroll 16
          for (int j = kTile - 1; j > i; --j) {
            x -= done[j] * r[j * kChunk + i];
          }
        }
        dw[i] += x * vload(ch.e + (first + i) * ch.dim + c);
        done[i] = x * ch.w[first + i];
        vstore(de + i * ch.dim + c, done[i]);
      }
    }
    for (int64_t i = 0; i < kTile; ++i) {
      g.dw[first + i] = vsum(dw[i]);
    }
  }
}

// to (rows, kChunk) = a (rows, dim) wet, on and below the diagonal (below it if `strict`), negated
// if `strict`; zero above in the block on the diagonal.
template <bool kStrict>
void lower_product(const Chunk& ch, const float* a, const float* wet, float* to) {
  for (int64_t first = 0; first < ch.rows; first += kTile) {
    const int64_t columns = first + kTile;
    float* block = to + first * kChunk;
    multiply<Into::kSet>(kTile, columns, ch.dim, {a + first * ch.dim, ch.dim, 1}, wet, kChunk,
                         block, kChunk);
    if constexpr (kStrict) {
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t j = 0; j < columns; j += kLanes) {
          vstore(block + i * kChunk + j, -vload(block + i * kChunk + j));
        }
      }
    }
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t j = i + (kStrict ? 0 : 1); j < kTile; ++j) {
        block[i * kChunk + first + j] = 0.0F;
      }
    }
  }
}

// Gradients of the state's part: dq and dk_row (by qe and ke, not yet times the decay), dk (by kb),
// and ds from that at the end of the chunk to that at its start. dlast gets the state's part.
template <bool kDelta>
void state_backward(const Chunk& ch, const ChunkGradients& g, const float* s, float* ds) {
  transpose(ch.key, ch.dim, s, ch.dim, g.st, ch.key);
  transpose(ch.key, ch.dim, ds, ch.dim, g.dst, ch.key);
  multiply<Into::kSet>(ch.rows, ch.key, ch.dim, {g.dy, ch.dim, 1}, g.st, ch.key, g.dq, ch.key);
  multiply<Into::kSet>(ch.rows, ch.key, ch.dim, {ch.we, ch.dim, 1}, g.dst, ch.key, g.dk, ch.key);
  for (int64_t c = 0; c < ch.key; ++c) {
    g.dlast[c] = ch.total[c] * dot(s + c * ch.dim, ds + c * ch.dim, ch.dim);
  }
  decay_state(ch, ds);
  multiply<Into::kAdd>(ch.key, ch.dim, ch.rows, {ch.qe, 1, ch.key}, g.dy, ch.dim, ds, ch.dim);
  if constexpr (kDelta) {
    for (int64_t i = 0; i < ch.rows * ch.key; i += kLanes) {
      vstore(g.dk_row + i, vf{});
    }
    multiply<Into::kSubtract>(ch.rows, ch.key, ch.dim, {g.de, ch.dim, 1}, g.st, ch.key, g.dk_row,
                              ch.key);
    multiply<Into::kSubtract>(ch.key, ch.dim, ch.rows, {ch.ke, 1, ch.key}, g.de, ch.dim, ds,
                              ch.dim);
  }
}

void scale_rows(int64_t rows, int64_t columns, const float* factor, float* x) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      vstore(x + i * columns + c, vload(x + i * columns + c) * factor[i]);
    }
  }
}

// x *= gamma, on and below the diagonal.
void decay_pairs(const Chunk& ch, float* x) {
  for (int64_t i = 0; i < ch.rows; ++i) {
    for (int64_t j = 0; j < i / kTile * kTile + kTile; j += kLanes) {
      vstore(x + i * kChunk + j, vload(x + i * kChunk + j) * vload(ch.gamma + i * kChunk + j));
    }
  }
}

// to (rows, key) += lower x, or lower' x, for a lower triangle (rows, kChunk).
void add_rows_product(const Chunk& ch, const float* lower, const float* x, float* to) {
  for (int64_t first = 0; first < ch.rows; first += kTile) {
    multiply<Into::kAdd>(kTile, ch.key, first + kTile, {lower + first * kChunk, kChunk, 1}, x,
                         ch.key, to + first * ch.key, ch.key);
  }
}
void add_columns_product(const Chunk& ch, const float* lower, const float* x, float* to) {
  for (int64_t first = 0; first < ch.rows; first += kTile) {
    multiply<Into::kAdd>(kTile, ch.key, ch.rows - first,
                         {lower + first * kChunk + first, 1, kChunk}, x + first * ch.key, ch.key,
                         to + first * ch.key, ch.key);
  }
}

template <bool kDelta>
void finish_scalar(const Chunk& ch, const ChunkGradients& g) {
  const float* to_end = ch.gamma + (ch.rows - 1) * kChunk;
  float from_start[kChunk];
  float start = 1.0F;
  for (int64_t i = 0; i < ch.rows; ++i) {
    start *= ch.decay[i];
    start = start < kVanished ? 0.0F : start;
    from_start[i] = start;
  }
  scale_rows(ch.rows, ch.key, from_start, g.dq);
  scale_rows(ch.rows, ch.key, to_end, g.dk);
  float last = 0.0F;
  for (int64_t c = 0; c < ch.key; ++c) {
    last += g.dlast[c];
  }
  for (int64_t j = 0; j < ch.rows; ++j) {
    last += dot(ch.k + j * ch.key, g.dk + j * ch.key, ch.key);
  }
  decay_pairs(ch, g.dp);
  add_rows_product(ch, g.dp, ch.k, g.dq);
  add_columns_product(ch, g.dp, ch.q, g.dk);
  if constexpr (kDelta) {
    scale_rows(ch.rows, ch.key, from_start, g.dk_row);
    decay_pairs(ch, g.dr);
    add_rows_product(ch, g.dr, ch.k, g.dk_row);
    add_columns_product(ch, g.dr, ch.k, g.dk);
  }
  double sum = static_cast<double>(last);
  for (int64_t i = ch.rows - 1; i >= 0; --i) {
    vf change = {};
    for (int64_t c = 0; c < ch.key; c += kLanes) {
      const int64_t at = i * ch.key + c;
      const vf k = vload(ch.k + at);
      const vf column = vload(g.dk + at);
      change += vload(ch.q + at) * vload(g.dq + at) - k * column;
      if constexpr (kDelta) {
        const vf row = vload(g.dk_row + at);
        change += k * row;
        vstore(g.dk + at, column + row);
      }
    }
    sum += static_cast<double>(vsum(change));
    g.dg[i] = static_cast<float>(sum);
  }
}

// The pairs inside one block of 16 rows, per channel: walks them with exp(G_i - G_j) as a product.
template <bool kDelta>
void diagonal_block_backward(const Chunk& ch, const ChunkGradients& g, int64_t first) {
  for (int64_t c = 0; c < ch.key; c += kLanes) {
    for (int64_t j = first; j < first + kTile; ++j) {
      const vf k = vload(ch.k + j * ch.key + c);
      vf between = vset(1.0F);
      vf column = vload(g.dk + j * ch.key + c);
      for (int64_t i = j; i < first + kTile; ++i) {
        const int64_t at = i * ch.key + c;
        if (i > j) {
          between *= vload(ch.decay + at);
        }
        const vf dp = between * g.dp[i * kChunk + j];
        vstore(g.dq + at, vload(g.dq + at) + dp * k);
        column += dp * vload(ch.q + at);
        if constexpr (kDelta) {
          const vf dr = between * g.dr[i * kChunk + j];
          vstore(g.dk_row + at, vload(g.dk_row + at) + dr * k);
          column += dr * vload(ch.k + at);
        }
      }
      vstore(g.dk + j * ch.key + c, column);
    }
  }
}

// Walks blocks of rows as prepare_per_channel does. g.dq and g.dk_row come as gradients by qe and
// ke; g.dk, in `part`'s place while the walk accumulates into it, comes as the gradient by kb.
template <bool kDelta>
void finish_per_channel(const Chunk& ch, const ChunkGradients& g) {
  float* dkb = g.dg;  // its own place is free until the end
  for (int64_t i = 0; i < ch.rows * ch.key; i += kLanes) {
    vstore(dkb + i, vload(g.dk + i));
    vstore(g.dk + i, vf{});
  }
  float* start = ch.total;  // no longer needed: exp(G_(first - 1))
  for (int64_t c = 0; c < ch.key; c += kLanes) {
    vstore(start + c, vset(1.0F));
  }
  for (int64_t first = 0; first < ch.rows; first += kTile) {
    const BlockDecays block = block_decays(ch, first);
    const float* dp = g.dp + first * kChunk;
    const float* dr = g.dr + first * kChunk;
    // Rows of the block read columns before it: by q and k of the block, then by k of the columns.
    const auto rows_part = [&](const float* d, float* to) {
      multiply<Into::kSet>(kTile, ch.key, first, {d, kChunk, 1}, g.k_after, ch.key, g.part, ch.key);
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t c = 0; c < ch.key; c += kLanes) {
          float* p = to + (first + i) * ch.key + c;
          const vf x = vload(p) * vload(start + c) + vload(g.part + i * ch.key + c);
          vstore(p, x * vload(block.within + i * ch.key + c));
        }
      }
    };
    rows_part(dp, g.dq);
    if constexpr (kDelta) {
      rows_part(dr, g.dk_row);
    }
    multiply<Into::kSet>(first, ch.key, kTile, {dp, 1, kChunk}, block.q, ch.key, g.part, ch.key);
    if constexpr (kDelta) {
      multiply<Into::kAdd>(first, ch.key, kTile, {dr, 1, kChunk}, block.k, ch.key, g.part, ch.key);
    }
    const float* through = block.within + (kTile - 1) * ch.key;
    for (int64_t j = 0; j < first; ++j) {
      for (int64_t c = 0; c < ch.key; c += kLanes) {
        const int64_t at = j * ch.key + c;
        const vf after = vload(g.after + at);
        vstore(g.dk + at, vload(g.dk + at) + vload(g.part + at) * after);
        vstore(g.after + at, flush(after * vload(through + c)));
        vstore(g.k_after + at, vload(g.k_after + at) * vload(through + c));
      }
    }
    diagonal_block_backward<kDelta>(ch, g, first);
    for (int64_t c = 0; c < ch.key; c += kLanes) {
      vf after = vset(1.0F);
      for (int64_t j = first + kTile - 1; j >= first; --j) {
        const int64_t at = j * ch.key + c;
        vstore(g.after + at, after);
        vstore(g.k_after + at, after * vload(ch.k + at));
        after = flush(after * vload(ch.decay + at));
      }
      vstore(start + c, flush(vload(start + c) * vload(through + c)));
    }
  }
  for (int64_t c = 0; c < ch.key; c += kLanes) {
    vf last = vload(g.dlast + c);
    for (int64_t j = 0; j < ch.rows; ++j) {
      const int64_t at = j * ch.key + c;
      const vf by_end = vload(dkb + at) * vload(g.after + at);
      last += vload(ch.k + at) * by_end;
      vstore(g.dk + at, vload(g.dk + at) + by_end);
    }
    vf sum = last;
    for (int64_t i = ch.rows - 1; i >= 0; --i) {
      const int64_t at = i * ch.key + c;
      const vf k = vload(ch.k + at);
      const vf column = vload(g.dk + at);
      sum += vload(ch.q + at) * vload(g.dq + at) - k * column;
      if constexpr (kDelta) {
        const vf row = vload(g.dk_row + at);
        sum += k * row;
        vstore(g.dk + at, column + row);
      }
      vstore(g.dg + at, sum);
    }
  }
}

// Adds the gradients of a chunk to those of the inputs.
template <bool kPerChannel>
void store_gradients(const RecurrenceChunks& a, int64_t segment, int64_t t, int64_t h,
                     const Chunk& ch, const ChunkGradients& g) {
  const Recurrence<float>& op = a.op;
  const int64_t n = ch.tokens;
  const auto store_key = [&](const View<float>& input, float* heads, const float* from) {
    if (heads != nullptr) {
      store_rows(n, op.key_dim, from, ch.key, heads + (t * op.heads + h) * op.key_dim,
                 op.heads * op.key_dim, true);
    } else if (input.grad != nullptr) {
      store_rows(n, op.key_dim, from, ch.key, input.grad_at(t, op.key_head(h) * op.key_dim),
                 input.rows.outer_stride, false);
    }
  };
  store_key(op.q, a.dq_heads, g.dq);
  store_key(op.k, a.dk_heads, g.dk);
  if (op.log_decay.grad != nullptr && kPerChannel) {
    store_rows(n, op.key_dim, g.dg, ch.key, op.log_decay.grad_at(t, h * op.key_dim),
               op.log_decay.rows.outer_stride, false);
  }
  const float skip = op.skip.defined() ? op.skip.data[h] : 0.0F;
  float dskip = 0.0F;
  for (int64_t i = 0; i < n; ++i) {
    if (op.log_decay.grad != nullptr && !kPerChannel) {
      *op.log_decay.grad_at(t + i, h) += g.dg[i];
    }
    if (op.weight.grad != nullptr) {
      *op.weight.grad_at(t + i, h) += g.dw[i];
    }
    for (int64_t c = 0; op.v.grad != nullptr && c < op.dim; c += kLanes) {
      const int64_t at = i * ch.dim + c;
      float* dv = op.v.grad_at(t + i, h * op.dim + c);
      const vf x = vload_upto(dv, op.dim - c) + vload(g.de + at) + vload(g.dy + at) * skip;
      vstore_upto(dv, x, op.dim - c);
    }
    if (a.dskip_part != nullptr) {
      dskip += dot(g.dy + i * ch.dim, ch.v + i * ch.dim, ch.dim);
    }
  }
  if (a.dskip_part != nullptr) {
    a.dskip_part[segment * op.heads + h] += dskip;
  }
}

template <bool kPerChannel, bool kDelta>
void run_head(const RecurrenceChunks& a, int64_t segment, int64_t h, float* scratch) {
  const Recurrence<float>& op = a.op;
  Scratch memory(scratch);
  Chunk ch(memory, op.key_dim, op.dim);
  const ChunkGradients g(memory, ch);
  float* ds = memory.take(ch.key * ch.dim);
  for (int64_t i = 0; i < ch.key * ch.dim; i += kLanes) {
    vstore(ds + i, vf{});
  }
  if (a.dskip_part != nullptr) {
    a.dskip_part[segment * op.heads + h] = 0.0F;
  }
  const ChunkWalk walk(op.segments, segment, a.chunk);
  for (int64_t i = walk.count() - 1; i >= 0; --i) {
    const int64_t t = op.segments.begin(segment) + walk.begin(i);
    const int64_t n = walk.tokens(i);
    const float* s =
        a.chunk_states + ((a.first_chunk[segment] + i) * op.heads + h) * ch.key * ch.dim;
    load_chunk<kPerChannel>(op, t, n, h, ch);
    load_rows(n, ch.rows, op.dim, op.y.grad_at(t, h * op.dim), op.heads * op.dim, g.dy, ch.dim);
    prepare_chunk<kPerChannel, kDelta>(ch, s);
    // By w e: what later tokens read of it, and the state at the end.
    multiply<Into::kSet>(ch.rows, ch.dim, ch.key, {ch.kbt, 1, kChunk}, ds, ch.dim, g.de, ch.dim);
    for (int64_t first = 0; first < ch.rows; first += kTile) {
      multiply<Into::kAdd>(kTile, ch.dim, ch.rows - first,
                           {ch.p + first * kChunk + first, 1, kChunk}, g.dy + first * ch.dim,
                           ch.dim, g.de + first * ch.dim, ch.dim);
    }
    solve_backward<kDelta>(ch, g);
    transpose(ch.rows, ch.dim, ch.we, ch.dim, g.wet, kChunk);
    lower_product<false>(ch, g.dy, g.wet, g.dp);
    if constexpr (kDelta) {
      lower_product<true>(ch, g.de, g.wet, g.dr);
    }
    state_backward<kDelta>(ch, g, s, ds);
    if constexpr (kPerChannel) {
      finish_per_channel<kDelta>(ch, g);
    } else {
      finish_scalar<kDelta>(ch, g);
    }
    store_gradients<kPerChannel>(a, segment, t, h, ch, g);
  }
}

// Gradients of shared keys: the value heads of a key head in order.
void sum_heads(const Recurrence<float>& op, const float* heads, const View<float>& to) {
  if (heads == nullptr || to.grad == nullptr) {
    return;
  }
  const int64_t sharing = op.heads / op.key_heads;
  parallel_for(op.segments.tokens(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < op.heads; ++h) {
        float* grad = to.grad_at(t, h / sharing * op.key_dim);
        const float* from = heads + (t * op.heads + h) * op.key_dim;
        for (int64_t c = 0; c < op.key_dim; c += kLanes) {
          const int64_t left = op.key_dim - c;
          vstore_upto(grad + c, vload_upto(grad + c, left) + vload_upto(from + c, left), left);
        }
      }
    }
  });
}

template <bool kPerChannel, bool kDelta>
void run(const RecurrenceChunks& a) {
  for_heads(a, [&](int64_t segment, int64_t h, float* scratch) {
    run_head<kPerChannel, kDelta>(a, segment, h, scratch);
  });
  sum_heads(a.op, a.dq_heads, a.op.q);
  sum_heads(a.op, a.dk_heads, a.op.k);
  for (int64_t s = 0; a.dskip_part != nullptr && s < a.op.segments.count; ++s) {
    for (int64_t h = 0; h < a.op.heads; ++h) {
      a.op.skip.grad[h] += a.dskip_part[s * a.op.heads + h];
    }
  }
}

}  // namespace

void recurrence_chunks_backward(const RecurrenceChunks& a) {
  if (a.op.decay_per_channel) {
    a.op.delta ? run<true, true>(a) : run<true, false>(a);
  } else {
    a.op.delta ? run<false, true>(a) : run<false, false>(a);
  }
}

}  // namespace cambium::CAMBIUM_ISA
