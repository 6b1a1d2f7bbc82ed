// One chunk of one value head, for the *_cpu.cc files of this folder. Tokens of the chunk are rows
// i, j; channels of the key are c.
//
// With G the running sum of log decays in the chunk, exp(G_i - G_j) = prod_{j < m <= i} decay_m is
// always taken as a product of decays: nothing can overflow, and no difference of sums loses
// digits.
//
//   P_ij = sum_c q_ic exp(G_ic - G_jc) k_jc,  j <= i            what token i reads of token j
//   R_ij = sum_c k_ic exp(G_ic - G_jc) k_jc,  j <  i            the same for the delta rule's read
//   qe_i = exp(G_i) q_i,  ke_i = exp(G_i) k_i                   reads of the state S at the start
//   kb_j = exp(G_last - G_j) k_j                                writes to the state at the end
//
//   e_i = v_i - S' ke_i - sum_j R_ij w_j e_j  (delta), or v_i   what token i writes, times w_i
//   y_i = S' qe_i + sum_j P_ij w_j e_j
//   S_end = exp(G_last) S + sum_j kb_j (w_j e_j)'
//
// Yang et al. 2024 (arXiv 2412.06464) for the delta rule, Dao & Gu 2024 (arXiv 2405.21060) without.
#pragma once

#include "base/parallel.h"
#include "ops/recurrence/recurrence_chunks.h"
#include "ops/recurrence/tiles.h"

namespace cambium::CAMBIUM_ISA {

inline constexpr int64_t kChunk = kRecurrenceMaxChunk;  // row stride of (token, token) matrices

/// Products of decays below this count as zero: long before they become subnormal and slow.
inline constexpr float kVanished = 1e-30F;

static inline vf flush(vf x) {
  return x < vset(kVanished) ? vf{} : x;
}

class Scratch {
 public:
  explicit Scratch(float* p) : p_(p) {}
  float* take(int64_t n) {
    float* p = p_;
    p_ += n;
    return p;
  }

 private:
  float* p_;
};

struct Chunk {
  int64_t tokens;  // n
  int64_t rows;    // n padded
  int64_t key;     // K padded
  int64_t dim;     // V padded
  float* q;        // (rows, key)
  float* k;        // (rows, key)
  float* v;        // (rows, dim)
  float* w;        // (rows)
  float* decay;    // (rows), or (rows, key) per channel
  float* kt;       // (key, kChunk) k transposed
  float* gamma;    // (rows, kChunk) exp(G_i - G_j), zero above the diagonal; scalar decay only
  float* qe;       // (rows, key)
  float* ke;       // (rows, key), delta only
  float* kbt;      // (key, kChunk) kb transposed
  float* total;    // (key) exp(G_last)
  float* p;        // (rows, kChunk)
  float* r;        // (rows, kChunk), delta only
  float* e;        // (rows, dim)
  float* we;       // (rows, dim) w e
  float* block;    // (3, 16, key) for per-channel decays

  Chunk(Scratch& s, int64_t key_dim, int64_t value_dim)
      : tokens(0), rows(0), key(recurrence_padded(key_dim)), dim(recurrence_padded(value_dim)) {
    q = s.take(kChunk * key);
    k = s.take(kChunk * key);
    v = s.take(kChunk * dim);
    w = s.take(kChunk);
    decay = s.take(kChunk * key);
    kt = s.take(kChunk * key);
    gamma = s.take(kChunk * kChunk);
    qe = s.take(kChunk * key);
    ke = s.take(kChunk * key);
    kbt = s.take(kChunk * key);
    total = s.take(key);
    p = s.take(kChunk * kChunk);
    r = s.take(kChunk * kChunk);
    e = s.take(kChunk * dim);
    we = s.take(kChunk * dim);
    block = s.take(3 * kTile * key);
  }
};

/// Tokens [t, t + n) of value head h; padding rows have q = k = v = w = 0 and decay 1, which is
/// exact.
template <bool kPerChannel>
static inline void load_chunk(const Recurrence<float>& a, int64_t t, int64_t n, int64_t h,
                              Chunk& ch) {
  ch.tokens = n;
  ch.rows = recurrence_padded(n);
  const int64_t key_offset = a.key_head(h) * a.key_dim;
  load_rows(n, ch.rows, a.key_dim, a.q.at(t, key_offset), a.q.rows.outer_stride, ch.q, ch.key);
  load_rows(n, ch.rows, a.key_dim, a.k.at(t, key_offset), a.k.rows.outer_stride, ch.k, ch.key);
  load_rows(n, ch.rows, a.dim, a.v.at(t, h * a.dim), a.v.rows.outer_stride, ch.v, ch.dim);
  for (int64_t i = 0; i < ch.rows; ++i) {
    ch.w[i] = i < n ? (a.weight.defined() ? *a.weight.at(t + i, h) : 1.0F) : 0.0F;
  }
  if constexpr (kPerChannel) {
    load_rows(n, ch.rows, a.key_dim, a.log_decay.at(t, h * a.key_dim),
              a.log_decay.rows.outer_stride, ch.decay, ch.key);
  } else {
    for (int64_t i = 0; i < ch.rows; ++i) {
      ch.decay[i] = i < n ? *a.log_decay.at(t + i, h) : 0.0F;
    }
  }
  const int64_t count = kPerChannel ? ch.rows * ch.key : ch.rows;
  for (int64_t i = 0; i < count; i += kLanes) {
    vstore(ch.decay + i, vexp(vload(ch.decay + i)));
  }
}

// gamma, and qe, ke, kb, total from it.
template <bool kDelta>
static inline void scalar_decays(Chunk& ch) {
  float start = 1.0F;  // exp(G_i)
  for (int64_t i = 0; i < ch.rows; ++i) {
    const int64_t block = i / kTile * kTile;
    float* row = ch.gamma + i * kChunk;
    const float* above = row - kChunk;
    for (int64_t j = 0; j < block; j += kLanes) {
      vstore(row + j, flush(vload(above + j) * ch.decay[i]));
    }
    for (int64_t j = block; j < block + kTile; j += kLanes) {
      vstore(row + j, i == block ? vf{} : flush(vload(above + j) * ch.decay[i]));
    }
    row[i] = 1.0F;
    start *= ch.decay[i];
    start = start < kVanished ? 0.0F : start;
    for (int64_t c = 0; c < ch.key; c += kLanes) {
      vstore(ch.qe + i * ch.key + c, vload(ch.q + i * ch.key + c) * start);
      if constexpr (kDelta) {
        vstore(ch.ke + i * ch.key + c, vload(ch.k + i * ch.key + c) * start);
      }
    }
  }
  const float* last = ch.gamma + (ch.rows - 1) * kChunk;
  for (int64_t c = 0; c < ch.key; ++c) {
    ch.total[c] = start;
    for (int64_t j = 0; j < ch.rows; j += kLanes) {
      vstore(ch.kbt + c * kChunk + j, vload(ch.kt + c * kChunk + j) * vload(last + j));
    }
  }
}

// r_ij = 0 for j >= i in the block on the diagonal that starts at `first`.
static inline void clear_from_diagonal(int64_t first, float* r) {
  for (int64_t i = first; i < first + kTile; ++i) {
    for (int64_t j = i; j < first + kTile; ++j) {
      r[i * kChunk + j] = 0.0F;
    }
  }
}

template <bool kDelta>
static inline void prepare_scalar(Chunk& ch) {
  transpose(ch.rows, ch.key, ch.k, ch.key, ch.kt, kChunk);
  scalar_decays<kDelta>(ch);
  for (int64_t first = 0; first < ch.rows; first += kTile) {
    const int64_t columns = first + kTile;
    multiply<Into::kSet>(kTile, columns, ch.key, {ch.q + first * ch.key, ch.key, 1}, ch.kt, kChunk,
                         ch.p + first * kChunk, kChunk);
    if constexpr (kDelta) {
      multiply<Into::kSet>(kTile, columns, ch.key, {ch.k + first * ch.key, ch.key, 1}, ch.kt,
                           kChunk, ch.r + first * kChunk, kChunk);
    }
    for (int64_t i = first; i < columns; ++i) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t at = i * kChunk + j;
        const vf gamma = vload(ch.gamma + at);
        vstore(ch.p + at, vload(ch.p + at) * gamma);
        if constexpr (kDelta) {
          vstore(ch.r + at, vload(ch.r + at) * gamma);
        }
      }
    }
    if constexpr (kDelta) {
      clear_from_diagonal(first, ch.r);
    }
  }
}

/// The decays inside one block of 16 rows: within_i = prod_{first <= m <= i} decay_m, and q and k
/// times it.
struct BlockDecays {
  float* within;  // (16, key)
  float* q;
  float* k;
};

static inline BlockDecays block_decays(const Chunk& ch, int64_t first) {
  const BlockDecays b{ch.block, ch.block + kTile * ch.key, ch.block + 2 * kTile * ch.key};
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t c = 0; c < ch.key; c += kLanes) {
      const int64_t to = i * ch.key + c;
      const int64_t from = (first + i) * ch.key + c;
      const vf decay = vload(ch.decay + from);
      const vf within = i == 0 ? decay : flush(vload(b.within + to - ch.key) * decay);
      vstore(b.within + to, within);
      vstore(b.q + to, vload(ch.q + from) * within);
      vstore(b.k + to, vload(ch.k + from) * within);
    }
  }
  return b;
}

// P and R of the block on the diagonal, token by token: column j of `open` (key, 16) is
// exp(G_i - G_j) k_j for the tokens so far; at the end it is that at the block's last token.
template <bool kDelta>
static inline void diagonal_block(const Chunk& ch, int64_t first, float* open) {
  for (int64_t c = 0; c < ch.key * kTile; c += kLanes) {
    vstore(open + c, vf{});
  }
  for (int64_t i = first; i < first + kTile; ++i) {
    float unit[kTile] = {};
    unit[i - first] = 1.0F;
    vf here[kTileVectors];
    vf p[kTileVectors] = {};
    vf r[kTileVectors] = {};
    for (int l = 0; l < kTileVectors; ++l) {
      here[l] = vload(unit + l * kLanes);
    }
    for (int64_t c = 0; c < ch.key; ++c) {
      const float k = ch.k[i * ch.key + c];
      for (int l = 0; l < kTileVectors; ++l) {
        float* to = open + c * kTile + l * kLanes;
        const vf before = vload(to) * ch.decay[i * ch.key + c];
        const vf x = before + here[l] * k;
        vstore(to, x);
        p[l] += x * ch.q[i * ch.key + c];
        if constexpr (kDelta) {
          r[l] += before * k;
        }
      }
    }
    for (int l = 0; l < kTileVectors; ++l) {
      vstore(ch.p + i * kChunk + first + l * kLanes, p[l]);
      if constexpr (kDelta) {
        vstore(ch.r + i * kChunk + first + l * kLanes, r[l]);
      }
    }
  }
}

// Per channel: kbt holds, while blocks of rows are walked, exp(G_(first - 1) - G_j) k_j for the
// columns before the block.
template <bool kDelta>
static inline void prepare_per_channel(Chunk& ch) {
  float* open = ch.kt;  // free in this form
  for (int64_t c = 0; c < ch.key; ++c) {
    ch.total[c] = 1.0F;
  }
  for (int64_t first = 0; first < ch.rows; first += kTile) {
    const BlockDecays block = block_decays(ch, first);
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t c = 0; c < ch.key; c += kLanes) {
        const vf before = vload(ch.total + c);
        const int64_t to = (first + i) * ch.key + c;
        vstore(ch.qe + to, vload(block.q + i * ch.key + c) * before);
        if constexpr (kDelta) {
          vstore(ch.ke + to, vload(block.k + i * ch.key + c) * before);
        }
      }
    }
    if (first > 0) {
      multiply<Into::kSet>(kTile, first, ch.key, {block.q, ch.key, 1}, ch.kbt, kChunk,
                           ch.p + first * kChunk, kChunk);
      if constexpr (kDelta) {
        multiply<Into::kSet>(kTile, first, ch.key, {block.k, ch.key, 1}, ch.kbt, kChunk,
                             ch.r + first * kChunk, kChunk);
      }
    }
    diagonal_block<kDelta>(ch, first, open);
    const float* through = block.within + (kTile - 1) * ch.key;
    for (int64_t c = 0; c < ch.key; ++c) {
      for (int64_t j = 0; j < first; j += kLanes) {
        vstore(ch.kbt + c * kChunk + j, vload(ch.kbt + c * kChunk + j) * through[c]);
      }
      for (int64_t j = 0; j < kTile; j += kLanes) {
        vstore(ch.kbt + c * kChunk + first + j, vload(open + c * kTile + j));
      }
    }
    for (int64_t c = 0; c < ch.key; c += kLanes) {
      vstore(ch.total + c, flush(vload(ch.total + c) * vload(through + c)));
    }
  }
}

/// e and w e, given the state s (key, dim) at the start.
template <bool kDelta>
static inline void solve(const Chunk& ch, const float* s) {
  for (int64_t i = 0; i < ch.rows * ch.dim; i += kLanes) {
    vstore(ch.e + i, vload(ch.v + i));
  }
  if constexpr (kDelta) {
    multiply<Into::kSubtract>(ch.rows, ch.dim, ch.key, {ch.ke, ch.key, 1}, s, ch.dim, ch.e, ch.dim);
    for (int64_t first = 0; first < ch.rows; first += kTile) {
      float* e = ch.e + first * ch.dim;
      float* we = ch.we + first * ch.dim;
      multiply<Into::kSubtract>(kTile, ch.dim, first, {ch.r + first * kChunk, kChunk, 1}, ch.we,
                                ch.dim, e, ch.dim);
      const float* r = ch.r + first * kChunk + first;
      for (int64_t c = 0; c < ch.dim; c += kLanes) {
        vf done[kTile];
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) {
          vf x = vload(e + i * ch.dim + c);
#pragma GCC unroll 16
          for (int j = 0; j < i; ++j) {
            x -= done[j] * r[i * kChunk + j];
          }
          done[i] = x * ch.w[first + i];
          vstore(e + i * ch.dim + c, x);
          vstore(we + i * ch.dim + c, done[i]);
        }
      }
    }
  } else {
    for (int64_t i = 0; i < ch.rows; ++i) {
      for (int64_t c = 0; c < ch.dim; c += kLanes) {
        vstore(ch.we + i * ch.dim + c, vload(ch.e + i * ch.dim + c) * ch.w[i]);
      }
    }
  }
}

/// Everything but y: for a state s at the start of the chunk.
template <bool kPerChannel, bool kDelta>
static inline void prepare_chunk(Chunk& ch, const float* s) {
  if constexpr (kPerChannel) {
    prepare_per_channel<kDelta>(ch);
  } else {
    prepare_scalar<kDelta>(ch);
  }
  solve<kDelta>(ch, s);
}

/// s (key, dim) *= exp(G_last), per row.
static inline void decay_state(const Chunk& ch, float* s) {
  for (int64_t c = 0; c < ch.key; ++c) {
    for (int64_t j = 0; j < ch.dim; j += kLanes) {
      vstore(s + c * ch.dim + j, vload(s + c * ch.dim + j) * ch.total[c]);
    }
  }
}

/// How a segment is cut into chunks: at the multiples of `chunk` in position.
struct ChunkWalk {
  int64_t first;   // tokens of the first chunk
  int64_t length;  // tokens of the segment
  int64_t chunk;

  ChunkWalk(const SegmentWalk& segments, int64_t s, int64_t chunk_tokens)
      : length(segments.length(s)), chunk(chunk_tokens) {
    const int64_t left = chunk - segments.position[s] % chunk;
    first = left < length ? left : length;
  }
  int64_t count() const { return length == 0 ? 0 : 1 + (length - first + chunk - 1) / chunk; }
  int64_t begin(int64_t i) const { return i == 0 ? 0 : first + (i - 1) * chunk; }
  int64_t tokens(int64_t i) const {
    const int64_t end = first + i * chunk;
    return (end < length ? end : length) - begin(i);
  }
};

/// Calls work(segment, head, scratch) for every segment and value head, in parallel.
template <class Work>
static inline void for_heads(const RecurrenceChunks& a, Work work) {
  const int64_t units = a.op.segments.count * a.op.heads;
  parallel_for(a.pieces, 1, [&](int64_t piece, int64_t) {
    float* scratch = a.scratch + piece * recurrence_scratch(a.op.key_dim, a.op.dim);
    for (int64_t unit = piece; unit < units; unit += a.pieces) {
      work(unit / a.op.heads, unit % a.op.heads, scratch);
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
