#include "ops/recurrence/chunk.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Chunks of at most this many tokens are faster token by token. Decided per chunk, so that a chunk
// gives the same numbers in whatever call it comes.
constexpr int64_t kTokenForm = 6;

// A state (K, V) in memory, rows `row` apart.
struct State {
  float* s;
  int64_t row;
};

// One token of one head. The state is read and written once: the columns of a strip stay in the
// first-level cache between the two passes of the delta rule.
struct TokenStep {
  const float* q;
  const float* k;
  const float* v;
  float* y;
  float weight;
  float skip;
  const float* decay;  // (K), or one number
};

template <bool kPerChannel, bool kDelta, int kVectors>
void step_strip(const Recurrence<float>& a, const TokenStep& t, float qk, const State& state,
                int64_t column, int64_t last) {
  const auto load = [&](const float* p, int j) {
    return j == kVectors - 1 ? vload_upto(p + j * kLanes, last) : vload(p + j * kLanes);
  };
  const auto store = [&](float* p, int j, vf x) {
    j == kVectors - 1 ? vstore_upto(p + j * kLanes, x, last) : vstore(p + j * kLanes, x);
  };
  float* s = state.s + column;
  vf written[kVectors];
  vf y[kVectors] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    written[j] = load(t.v + column, j);
  }
  if constexpr (kDelta) {
    vf read[kVectors] = {};
    for (int64_t i = 0; i < a.key_dim; ++i) {
      const float decay = t.decay[kPerChannel ? i : 0];
      const float k = decay * t.k[i];
      const float q = decay * t.q[i];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const vf x = load(s + i * state.row, j);
        read[j] += x * k;
        y[j] += x * q;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      written[j] = (written[j] - read[j]) * t.weight;
      y[j] += written[j] * qk;
    }
    for (int64_t i = 0; i < a.key_dim; ++i) {
      const float decay = t.decay[kPerChannel ? i : 0];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        store(s + i * state.row, j, load(s + i * state.row, j) * decay + written[j] * t.k[i]);
      }
    }
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      written[j] *= t.weight;
    }
    for (int64_t i = 0; i < a.key_dim; ++i) {
      const float decay = t.decay[kPerChannel ? i : 0];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const vf x = load(s + i * state.row, j) * decay + written[j] * t.k[i];
        store(s + i * state.row, j, x);
        y[j] += x * t.q[i];
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    store(t.y + column, j, y[j] + load(t.v + column, j) * t.skip);
  }
}

template <bool kPerChannel, bool kDelta>
void step(const Recurrence<float>& a, int64_t t, int64_t h, const State& state, float* decay) {
  const int64_t key_offset = a.key_head(h) * a.key_dim;
  if constexpr (kPerChannel) {
    const float* log_decay = a.log_decay.at(t, h * a.key_dim);
    for (int64_t c = 0; c < a.key_dim; c += kLanes) {
      vstore(decay + c, vexp(vload_upto(log_decay + c, a.key_dim - c)));
    }
  } else {
    *decay = vexp(vset(*a.log_decay.at(t, h)))[0];
  }
  const TokenStep token{a.q.at(t, key_offset),
                        a.k.at(t, key_offset),
                        a.v.at(t, h * a.dim),
                        a.y.at(t, h * a.dim),
                        a.weight.defined() ? *a.weight.at(t, h) : 1.0F,
                        a.skip.defined() ? a.skip.data[h] : 0.0F,
                        decay};
  float qk = 0.0F;
  if constexpr (kDelta) {
    vf sum = {};
    for (int64_t c = 0; c < a.key_dim; c += kLanes) {
      const int64_t left = a.key_dim - c;
      sum += vload_upto(token.q + c, left) * vload_upto(token.k + c, left);
    }
    qk = vsum(sum);
  }
  int64_t column = 0;
  for (; column + 4 * kLanes <= a.dim; column += 4 * kLanes) {
    step_strip<kPerChannel, kDelta, 4>(a, token, qk, state, column, kLanes);
  }
  if (column + 2 * kLanes <= a.dim) {
    step_strip<kPerChannel, kDelta, 2>(a, token, qk, state, column, kLanes);
    column += 2 * kLanes;
  }
  for (; column < a.dim; column += kLanes) {
    step_strip<kPerChannel, kDelta, 1>(a, token, qk, state, column, a.dim - column);
  }
}

// y of a prepared chunk, and the state at its end.
void read_chunk(const Recurrence<float>& a, int64_t t, int64_t h, const Chunk& ch, float* s,
                float* y) {
  multiply<Into::kSet>(ch.rows, ch.dim, ch.key, {ch.qe, ch.key, 1}, s, ch.dim, y, ch.dim);
  for (int64_t first = 0; first < ch.rows; first += kTile) {
    multiply<Into::kAdd>(kTile, ch.dim, first + kTile, {ch.p + first * kChunk, kChunk, 1}, ch.we,
                         ch.dim, y + first * ch.dim, ch.dim);
  }
  if (a.skip.defined()) {
    for (int64_t i = 0; i < ch.rows * ch.dim; i += kLanes) {
      vstore(y + i, vload(y + i) + vload(ch.v + i) * a.skip.data[h]);
    }
  }
  store_rows(ch.tokens, a.dim, y, ch.dim, a.y.at(t, h * a.dim), a.heads * a.dim, true);
  decay_state(ch, s);
  multiply<Into::kAdd>(ch.key, ch.dim, ch.rows, {ch.kbt, kChunk, 1}, ch.we, ch.dim, s, ch.dim);
}

template <bool kPerChannel, bool kDelta>
void run_head(const RecurrenceChunks& c, int64_t segment, int64_t h, float* scratch) {
  const Recurrence<float>& a = c.op;
  Scratch memory(scratch);
  Chunk ch(memory, a.key_dim, a.dim);
  float* y = memory.take(kChunk * ch.dim);
  float* decay = ch.decay;
  float* slot = a.state_of(segment, h);
  const ChunkWalk walk(a.segments, segment, c.chunk);
  const bool in_place = slot != nullptr && walk.count() <= 1 && walk.length <= kTokenForm &&
                        c.chunk_states == nullptr;
  if (in_place) {
    // A decode step: the state is used where it lies.
    if (!a.segments.continues(segment)) {
      std::memset(slot, 0, static_cast<size_t>(a.key_dim * a.dim) * sizeof(float));
    }
    for (int64_t i = 0; i < walk.length; ++i) {
      step<kPerChannel, kDelta>(a, a.segments.begin(segment) + i, h, {slot, a.dim}, decay);
    }
    return;
  }
  float* s = memory.take(ch.key * ch.dim);
  const bool continues = a.segments.continues(segment);
  load_rows(continues ? a.key_dim : 0, ch.key, a.dim, slot, a.dim, s, ch.dim);
  for (int64_t i = 0; i < walk.count(); ++i) {
    const int64_t t = a.segments.begin(segment) + walk.begin(i);
    const int64_t n = walk.tokens(i);
    if (c.chunk_states != nullptr) {
      const int64_t index = (c.first_chunk[segment] + i) * a.heads + h;
      std::memcpy(c.chunk_states + index * ch.key * ch.dim, s,
                  static_cast<size_t>(ch.key * ch.dim) * sizeof(float));
    }
    if (n <= kTokenForm) {
      for (int64_t j = 0; j < n; ++j) {
        step<kPerChannel, kDelta>(a, t + j, h, {s, ch.dim}, decay);
      }
    } else {
      load_chunk<kPerChannel>(a, t, n, h, ch);
      prepare_chunk<kPerChannel, kDelta>(ch, s);
      read_chunk(a, t, h, ch, s, y);
    }
  }
  if (slot != nullptr) {
    store_rows(a.key_dim, a.dim, s, ch.dim, slot, a.dim, true);
  }
}

template <bool kPerChannel, bool kDelta>
void run(const RecurrenceChunks& c) {
  for_heads(c, [&](int64_t segment, int64_t h, float* scratch) {
    run_head<kPerChannel, kDelta>(c, segment, h, scratch);
  });
}

}  // namespace

void recurrence_chunks_forward(const RecurrenceChunks& c) {
  if (c.op.decay_per_channel) {
    c.op.delta ? run<true, true>(c) : run<true, false>(c);
  } else {
    c.op.delta ? run<false, true>(c) : run<false, false>(c);
  }
}

}  // namespace cambium::CAMBIUM_ISA
