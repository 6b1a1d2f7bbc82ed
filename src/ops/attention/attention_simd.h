// What the attention kernels share: query rows stand in the lanes of vectors ("columns"), keys and
// values are read as scalars, so that softmax needs no sums across lanes and head dims need no
// padding. For *_cpu.cc files only.
#pragma once

#include <utility>

#include "base/simd.h"
#include "ops/attention/attention_work.h"

namespace cambium::CAMBIUM_ISA {

/// Query rows held together, in vectors side by side.
inline constexpr int kVectors = 2;
inline constexpr int64_t kBlock = kVectors * kLanes;
/// Rows of a matrix that one inner loop multiplies: what the registers of the machine hold.
#if defined(__AVX512F__)
inline constexpr int kPanel = 8;
#else
inline constexpr int kPanel = 4;
#endif
/// Keys between two updates of the running softmax.
inline constexpr int64_t kTile = 64;
/// Scores are held times this, for powers of two.
inline constexpr float kLog2E = 1.44269504088896341F;
/// A score that no key has; exp2 of it less any score is 0.
inline constexpr float kMasked = -3e38F;

static inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
static inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/// 2^x for x < 1: relative error below 5e-7, tiny or 0 below -126, exactly 0 from -127 on; NaN
/// stays NaN. A minimax polynomial of degree 5 with constant term 1 on [-1/2, 1/2].
static inline vf vexp2(vf x) {
  const vf low = vset(-127.0F);
  x = x < low ? low : x;
  const vf magic = vset(12582912.0F);  // adding it rounds to an integer, kept in the low bits
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  vf p = vset(0.0011125507298856974F);
  p = p * r + 0.009666282683610916F;
  p = p * r + 0.05557400360703468F;
  p = p * r + 0.24022351205348969F;
  p = p * r + 0.693142831325531F;
  p = p * r + 1.0F;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
}

/// The soft cap as scores are held, and its tanh.
struct SoftCap {
  explicit SoftCap(const AttentionShape& shape)
      : cap(shape.softcap * kLog2E), inverse(cap > 0.0F ? 1.0F / cap : 0.0F) {}
  vf bend(vf score) const { return vtanh(score * inverse); }
  vf operator()(vf score) const { return cap * bend(score); }
  float cap, inverse;
};

// Blocks of B lanes exchanged between two vectors; the steps of transposing and of summing across.
template <int B, int... I>
static inline vf mix_low(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & B) != 0 ? kLanes + (I ^ B) : I)...);
}
template <int B, int... I>
static inline vf mix_high(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & B) != 0 ? kLanes + I : I ^ B)...);
}
using Lanes = std::make_integer_sequence<int, kLanes>;

template <int B>
static inline void transpose_step(vf (&r)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & B) == 0) {
      const vf low = mix_low<B>(r[i], r[i + B], Lanes{});
      r[i + B] = mix_high<B>(r[i], r[i + B], Lanes{});
      r[i] = low;
    }
  }
  if constexpr (B > 1) {
    transpose_step<B / 2>(r);
  }
}
static inline void transpose(vf (&r)[kLanes]) {
  transpose_step<kLanes / 2>(r);
}

/// sum_step<1>(r): lane i of the result is the sum of the lanes of r[i].
template <int B>
static inline vf sum_step(const vf* r) {
  if constexpr (B == kLanes) {
    return r[0];
  } else {
    const vf a = sum_step<2 * B>(r);
    const vf b = sum_step<2 * B>(r + B);
    return mix_low<B>(a, b, Lanes{}) + mix_high<B>(a, b, Lanes{});
  }
}

/// Keys and values as they lie: those of the batch and fp32 pages, or bf16 or fp8 pages.
static inline const View<float>& keys_of(const Attention<float>& in, float /*type*/) {
  return in.k;
}
static inline const View<bf16>& keys_of(const Attention<float>& in, bf16 /*type*/) {
  return in.narrow_k;
}
static inline const ScaledRows& keys_of(const Attention<float>& in, f8e4m3 /*type*/) {
  return in.scaled_k;
}
static inline const View<float>& values_of(const Attention<float>& in, float /*type*/) {
  return in.v;
}
static inline const View<bf16>& values_of(const Attention<float>& in, bf16 /*type*/) {
  return in.narrow_v;
}
static inline const ScaledRows& values_of(const Attention<float>& in, f8e4m3 /*type*/) {
  return in.scaled_v;
}
template <class T>
static inline const View<T>& rows_of(const View<T>& rows) {
  return rows;
}
static inline const View<f8e4m3>& rows_of(const ScaledRows& rows) {
  return rows.rows;
}

/// Copies n numbers of a row in fp8, times its scale, and fills up to `padded` with zeros.
static inline void copy_scaled(const f8e4m3* from, bf16 scale, int64_t n, int64_t padded,
                               float* to) {
  const vf factor = vset(widen(scale));
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    vstore(to + d, vround_to_bf16(vload(from + d) * factor));
  }
  for (; d < n; ++d) {
    to[d] = widen(from_scaled(from[d], scale));
  }
  for (; d < padded; ++d) {
    to[d] = 0.0F;
  }
}

/// Copies n numbers, widened, and fills up to `padded` with zeros.
template <class T>
static inline void copy_padded(const T* from, int64_t n, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    vstore(to + d, vload(from + d));
  }
  for (; d < n; ++d) {
    to[d] = widen(from[d]);
  }
  for (; d < padded; ++d) {
    to[d] = 0.0F;
  }
}

/// rows[i] = the row of the key tensor that holds position begin + i, up to `end`.
static inline void find_key_rows(const AttentionShape& shape, int64_t segment, int64_t begin,
                                 int64_t end, int64_t* rows) {
  if (shape.table == nullptr) {
    for (int64_t p = begin; p < end; ++p) {
      *rows++ = shape.start[segment] + p;
    }
    return;
  }
  const int32_t* page = shape.table + segment * shape.pages_per_segment + begin / shape.page_size;
  int64_t in_page = begin % shape.page_size;
  for (int64_t p = begin; p < end; ++page, in_page = 0) {
    for (; in_page < shape.page_size && p < end; ++in_page, ++p) {
      *rows++ = *page * shape.page_size + in_page;
    }
  }
}

/// Asks for the cache lines of n numbers, to be read soon.
template <class T>
static inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(p + i);
  }
}

/// columns (n, kBlock) = factor[row] * rows[row][0 .. n); null factor = 1.
static inline void to_columns(const float* const* rows, int64_t n, const float* factor,
                              float* columns) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const float* const* in = rows + v * kLanes;
    float* out = columns + v * kLanes;
    const vf scale = factor == nullptr ? vset(1.0F) : vload(factor + v * kLanes);
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        r[i] = vload(in[i] + d);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        vstore(out + (d + i) * kBlock, r[i] * scale);
      }
    }
    for (; d < n; ++d) {
      for (int i = 0; i < kLanes; ++i) {
        out[d * kBlock + i] = in[i][d] * scale[i];
      }
    }
  }
}

/// rows[row][0 .. n) = or += column `row`, for the first `count` rows. Scales the columns first.
template <bool kAdd>
static inline void from_columns(float* columns, int64_t n, const vf* scale, int64_t count,
                                float* const* rows) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t lanes = min64(kLanes, count - v * kLanes);
    float* const* out = rows + v * kLanes;
    const float* in = columns + v * kLanes;
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        r[i] = vload(in + (d + i) * kBlock) * scale[v];
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < lanes) {
          vstore(out[i] + d, kAdd ? vload(out[i] + d) + r[i] : r[i]);
        }
      }
    }
    for (; d < n; ++d) {
      for (int i = 0; i < lanes; ++i) {
        const float x = in[d * kBlock + i] * scale[v][i];
        out[i][d] = kAdd ? out[i][d] + x : x;
      }
    }
  }
}

/// sums[r] += sum over k < n of a[r * row_step + k * step] * b[k] with b (n, V vectors), b_step
/// apart, r < kPanel.
template <int V>
static inline void multiply(int64_t n, const float* a, int64_t row_step, int64_t step,
                            const float* b, int64_t b_step, vf (&sums)[kPanel][V]) {
  for (int64_t k = 0; k < n; ++k) {
    vf right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      right[v] = vload(b + k * b_step + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kPanel; ++r) {
      const vf left = vset(a[r * row_step + k * step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sums[r][v] += left * right[v];
      }
    }
  }
}

/// Query rows [first, first + kBlock) of a segment and key-value head; rows past the last stand for
/// the last one's position.
struct QueryBlock {
  int64_t head0;           // of the group
  int64_t count;           // rows that exist
  int64_t first_position;  // of the first row
  int64_t last_position;   // of the last
  vi position[kVectors];   // per lane
  int64_t token[kBlock];   // rows of the packed tensor; valid for lanes < count
  int64_t head[kBlock];
};

static inline void locate(const AttentionShape& shape, int64_t segment, int64_t kv_head,
                          int64_t first, int64_t end, QueryBlock& block) {
  const int64_t group = shape.group();
  block.count = min64(kBlock, end - first);
  int32_t position[kBlock];
  int64_t token = first / group;
  int64_t g = first % group;
  for (int64_t i = 0; i < kBlock; ++i) {
    block.token[i] = shape.start[segment] + token;
    block.head[i] = kv_head * group + g;
    position[i] = static_cast<int32_t>(shape.first_position(segment) + token);
    if (i + 1 < block.count && ++g == group) {
      g = 0;
      ++token;
    }
  }
  block.first_position = position[0];
  block.last_position = position[kBlock - 1];
  std::memcpy(block.position, position, sizeof position);
}

/// Scores of keys at first_key + 0 .. kPanel - 1 that a lane's query does not see become kMasked.
static inline void mask(const AttentionShape& shape, const QueryBlock& block, int64_t first_key,
                        vf (&scores)[kPanel][kVectors]) {
  const auto window = static_cast<int32_t>(shape.window > 0 ? shape.window : INT32_MAX);
  for (int r = 0; r < kPanel; ++r) {
    const int32_t near = first_key + r < shape.sinks ? INT32_MAX : window;
    for (int v = 0; v < kVectors; ++v) {
      const vi distance = block.position[v] - static_cast<int32_t>(first_key + r);
      const vi seen = (distance >= 0) & (distance < near);
      scores[r][v] = seen ? scores[r][v] : vset(kMasked);
    }
  }
}
/// Whether some lane does not see some of the keys [first_key, end_key).
static inline bool needs_mask(const AttentionShape& shape, const QueryBlock& block,
                              int64_t first_key, int64_t end_key) {
  return end_key - 1 > block.first_position || first_key < shape.reach(block.last_position);
}

}  // namespace cambium::CAMBIUM_ISA
