// What the CUDA kernels of attention share: how the work is cut, and products of tiles in fp32.
//
// The queries that read one key-value head of a segment are numbered as rows: token by token, and
// for each token the heads of the group. A block of threads has a tile of rows and walks the keys
// they see in tiles of kKeys, which begin at multiples of kKeys. So the heads of a group share
// every key and value that is read, and sums do not depend on how a prompt was cut.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "ops/attention/attention_kernels.h"
#include "ops/attention/attention_shared.h"
#include "ops/cuda.cuh"
#include "ops/segment_plans.h"

namespace cambium::cuda::attention {

inline constexpr float kLog2E = 1.44269504088896341F;

/// Rows [first_row, ..) of a segment against the keys at positions [0, sinks) and
/// [first_key, end_key); the blocks of a tile are those of its key-value heads.
struct Tile {
  int32_t segment;
  int32_t first_row;
  int32_t first_key;
  int32_t end_key;
  int32_t partial;  // a part of a row tile's keys: which partial result it is; else -1
  int32_t sinks;    // before first_key (SeenKeys); 0 in tiles of few rows and of keys

  /// The tiles of kSize keys, which begin at multiples of it, as SeenKeys has them.
  template <int kSize>
  __device__ __forceinline__ int first_tile() const {
    return sinks > 0 ? 0 : first_key / kSize * kSize;
  }
  template <int kSize>
  __device__ __forceinline__ int next_tile(int p) const {
    p += kSize;
    return p >= sinks ? max(p, first_key / kSize * kSize) : p;
  }
  __device__ __forceinline__ bool has(int p) const {
    return p < sinks || (p >= first_key && p < end_key);
  }
};

/// AttentionShape as kernels see it: its arrays are of the device.
struct Layout {
  const int32_t* start;     // (S + 1)
  const int32_t* position;  // (S)
  const int32_t* table;     // (S, pages_per_segment), or null without pages
  int32_t pages_per_segment;
  int32_t page_size;
  int32_t heads;
  int32_t kv_heads;
  int32_t group;
  int32_t head_dim;
  int32_t value_dim;
  int32_t window;
  int32_t sinks;
  float scale;
  float softcap;             // above 0: of the scores
  const float* sink_logits;  // (heads), or null

  /// The first position of the window of a token at position p.
  __device__ int reach(int p) const { return window > 0 && p >= window ? p - window + 1 : 0; }
  __device__ bool sees(int position, int p) const {
    return p <= position && (p >= reach(position) || p < sinks);
  }
  /// The token of a segment of so many after the last that sees keys of the tile: with a window,
  /// those up to window - 1 after the last key.
  __device__ int end_token(const Tile& tile, int length) const {
    return window > 0 && tile.first_key >= sinks && window < length - tile.end_key + 1
               ? tile.end_key - 1 + window
               : length;
  }
  /// Row of the keys and values that holds position p.
  __device__ int64_t key_row(int s, int p) const {
    return table == nullptr
               ? int64_t{start[s]} + p
               : int64_t{table[int64_t{s} * pages_per_segment + p / page_size]} * page_size +
                     p % page_size;
  }
};

/// A score times log2(e), capped where there is a soft cap, and its slope by what was capped.
struct Score {
  float value, slope;
};
__device__ __forceinline__ Score score_of(const Layout& layout, float dot) {
  const float score = dot * (layout.scale * kLog2E);
  if (layout.softcap == 0.0F) {
    return {score, 1.0F};
  }
  const float cap = layout.softcap * kLog2E;
  const float bend = tanhf(score / cap);
  return {cap * bend, 1.0F - bend * bend};
}

/// The softmax of a row once all its keys are in it: with its head's sink, where there is one.
struct Total {
  float largest;      // times log2(e)
  float inverse_sum;  // of exp2(score - largest)
  float factor;       // of the values' sum
};
__device__ __forceinline__ Total total_of(const Layout& layout, int head, float largest,
                                          float sum) {
  if (layout.sink_logits == nullptr) {
    const float inverse = 1.0F / sum;
    return {largest, inverse, inverse};
  }
  const float sink = layout.sink_logits[head] * kLog2E;
  const float most = fmaxf(largest, sink);
  const float shrink = exp2f(largest - most);
  const float inverse = 1.0F / fmaf(sum, shrink, exp2f(sink - most));
  return {most, inverse, shrink * inverse};
}

/// A row tile whose keys were split: the partial results to be added in order.
struct Parts {
  int32_t segment;
  int32_t first_row;
  int32_t first_partial;
  int32_t count;
};

/// How a forward call cuts its segments. Segments of few rows (decode) have tiles of few_rows and
/// all their keys split; others have tiles of many_rows, and split keys where the tiles alone are
/// too few for the device. All of it depends on each segment alone, except where blocks for the few
/// rows are named: these then share all keys evenly, unless parts are fixed.
struct Cut {
  int many_rows;
  int few_rows;
  bool training;   // no tile of few rows and no splits
  int blocks = 0;  // that take the tiles of few rows of a key-value head; 0 = a block for each
  /// Without the long pieces of prompts that are served elsewhere with so many bytes
  /// (attention_cudnn.h); 0 = all segments.
  int64_t gathered = 0;
  bool fixed_parts = false;  // what blocks take of a row tile does not depend on the others
  bool operator==(const Cut&) const = default;
};

/// Whether a segment has tiles of few rows, outside of training.
inline bool is_few(const AttentionShape& shape, int64_t s) {
  constexpr int64_t kMostRows = 32;
  return shape.length(s) == 1 || shape.length(s) * shape.group() <= kMostRows;
}

/// A piece of work of a block that shares the keys of few rows with others: a tile, and whose
/// partial results it adds up if it is the last of its parts to be done.
struct Piece {
  Tile tile;
  int32_t parts;          // its row tile's number among those whose keys were split; else -1
  int32_t first_partial;  // of these
  int32_t count;
};

template <class Item>
struct List {
  const Item* items = nullptr;  // of the device
  int64_t count = 0;
};

struct TileLists {
  List<Tile> many, few;
  List<Parts> many_parts, few_parts;
  // Where blocks are named, in place of few and few_parts: the pieces of block b are those from
  // first_piece[b] up to first_piece[b + 1], and done counts the finished parts, (parts, kv_heads)
  // of them, each zero before and after.
  List<Piece> pieces;
  List<int32_t> first_piece;
  unsigned* done = nullptr;
  int64_t many_partials = 0, few_partials = 0;
  int64_t many_parts_rows = 0, few_parts_rows = 0;  // the most rows that one of the parts has
  std::shared_ptr<const void> owner;
};
TileLists forward_tiles(const AttentionShape& shape, const Cut& cut, const Launch& on);

/// Tiles of `rows` rows with the keys they see, and tiles of `keys` keys with their first row.
struct BackwardTiles {
  List<Tile> rows, keys;
  std::shared_ptr<const void> owner;
};
BackwardTiles backward_tiles(const AttentionShape& shape, int rows, int keys, const Launch& on);

struct DeviceLayout {
  Layout layout;
  std::shared_ptr<const void> owner;
};
DeviceLayout layout_of(const AttentionShape& shape, const Launch& on,
                       const float* sink_logits = nullptr);

/// Where the tokens of a call go in the pages.
struct TokenRows {
  const int64_t* rows;  // (T); of the device
  std::shared_ptr<const void> owner;
};
TokenRows token_rows(const AttentionShape& shape, const Launch& on);

/// Results of tiles whose keys are split, before they are added: for partial p, key-value head h
/// and row r of a tile of R rows, the row (p * kv_heads + h) * R + r.
struct Partials {
  float* y = nullptr;        // (.., Dv): sums of exp2(score - largest) value
  float* largest = nullptr;  // (..): of the scores, times log2(e)
  float* sum = nullptr;      // (..)
};
Partials make_partials(int64_t partials, int rows, const AttentionShape& shape, const Launch& on);

/// y from the partial results of `parts`, of tiles of tile_rows of which at most `rows` are there.
template <class T>
void combine(const Attention<T>& a, const Layout& layout, const List<Parts>& parts, int tile_rows,
             int64_t rows, const Partials& partials, const Launch& on);

/// Whether every row begins at a multiple of `bytes`, in a view whose rows are read by `channels`.
template <class T>
bool aligned(const View<T>& x, int64_t bytes) {
  const auto each = static_cast<int64_t>(sizeof(T));
  const auto at = reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(x.grad);
  return at % static_cast<uintptr_t>(bytes) == 0 && x.rows.outer_stride * each % bytes == 0 &&
         x.rows.inner_stride * each % bytes == 0 && x.channels * each % bytes == 0;
}

/// Rows of a segment that one block copies from pages: keys at positions [first, first + keys) go
/// to rows [to, to + keys), and zeros to those after them up to to + rows.
inline constexpr int kGatherRows = 32;
struct GatherTile {
  int32_t segment;
  int32_t first;
  int32_t keys;
  int32_t to;
  int32_t rows;  // up to kGatherRows
};

/// Keys and values of some heads from pages of E into rows that lie together.
template <class E>
struct Gather {
  Layout layout;
  List<GatherTile> tiles;
  View<E> from[2];             // keys (pages * page_size, Hkv, D), values (.., Hkv, Dv): the heads
                               // of a token together, D and Dv multiples of 16
  const bf16* scales[2] = {};  // (pages * page_size, Hkv): of the rows in fp8
  bf16* to[2];                 // (rows, heads, D), (rows, heads, Dv)
  int32_t first_head;          // of the key-value heads that are copied
  int32_t heads;
};
template <class E>
void gather(const Gather<E>& g, const Launch& on);

/// Forward and backward on tensor cores, for bf16 of the dims that suits; false where not. Forward
/// without the segments that were served before (Cut::gathered).
bool forward_on_tensor_cores(const Attention<bf16>& a, int64_t gathered, const Launch& on);
bool backward_on_tensor_cores(const Attention<bf16>& a, const float* delta, const Launch& on);

// --- Keys and values in fp8 (base/float8.h), widened to the bf16 numbers they stand for. A number
// of 8 bits moved to the places that its sign, exponent and mantissa have in a bf16 is 2^-120 of
// its value, for subnormal ones too; one product with 2^120 times the row's scale gives the number,
// rounded once, as the definition has it. That is four instructions for two numbers on every device
// from sm_80 on. (The conversions that sm_89 and newer have lead to f16, and from there to bf16 by
// way of two floats.)

/// 2^120 times the scale, as two bf16. It is finite for every scale that is not NaN.
__device__ __forceinline__ uint32_t factor_of(bf16 scale) {
  const uint32_t bits = scale.bits;
  const uint32_t factor = (bits & 0x7fffU) > 0x7f80U ? 0x7fffU : bits + (120U << 7);
  return factor | factor << 16;
}

/// Numbers kLow and kHigh of the eight in a and b (those of a first), each times its half of
/// `factor`, as two bf16.
template <int kLow, int kHigh>
__device__ __forceinline__ uint32_t widen_two(uint32_t a, uint32_t b, uint32_t factor) {
  // Bytes from the lowest: any; kLow; the sign of kLow in all its bits; kHigh. Moved right by four,
  // every bit of both numbers is in its place, kLow's sign coming from the byte above it.
  constexpr uint32_t kSelect = kLow | kLow << 4 | (8 | kLow) << 8 | kHigh << 12;
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "n"(kSelect));
  const uint32_t moved = static_cast<uint32_t>(static_cast<int32_t>(bytes) >> 4) & 0x87f087f0U;
  uint32_t widened;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(widened)
      : "r"(moved), "r"(factor), "r"(0x80008000U));  // plus -0: nothing
  return widened;
}

/// The four numbers of a word, times the row's factor.
__device__ __forceinline__ uint2 widen_four(uint32_t word, uint32_t factor) {
  return make_uint2(widen_two<0, 1>(word, word, factor), widen_two<2, 3>(word, word, factor));
}

// --- Products of tiles in fp32, by 256 threads as 16 x 16: thread (ty, tx) has rows ty * kR + i
// and columns tx + 16 j of scores, and columns 4 tx + 64 c of sums over keys. A tile in shared
// memory has rows of `stride` floats, of which stride / 4 is odd: 16-byte reads of 8 consecutive
// rows touch all banks once.
inline constexpr int kThreads = 256;

/// No row has a factor.
struct NoFactors {
  __device__ uint32_t operator()(int /*r*/) const { return 0; }
};

/// Rows at(r) of `dim` elements, zeros where at(r) is null and up to a multiple of 4; those of fp8
/// times factor(r).
template <class E, class At, class Factor = NoFactors>
__device__ __forceinline__ void load_rows(float* to, int stride, int rows, int dim, bool vectors,
                                          const At& at, const Factor& factor = {}) {
  const int chunks = padded(dim) / 4;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < rows * chunks; i += kThreads) {
    const int r = i / chunks;
    const int d = i % chunks * 4;
    const E* from = at(r);
    float x[4] = {0.0F, 0.0F, 0.0F, 0.0F};
    if (from != nullptr) {
      if constexpr (sizeof(E) == 1) {
        uint32_t word = 0;
        if (vectors) {
          word = *reinterpret_cast<const uint32_t*>(from + d);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            word |= d + e < dim ? uint32_t{from[d + e].bits} << 8 * e : 0U;
          }
        }
        const uint2 wide = widen_four(word, factor(r));
        x[0] = __uint_as_float(wide.x << 16);
        x[1] = __uint_as_float(wide.x & 0xffff0000U);
        x[2] = __uint_as_float(wide.y << 16);
        x[3] = __uint_as_float(wide.y & 0xffff0000U);
      } else if (vectors) {
        load_n<4>(from + d, x);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[e] = d + e < dim ? load(from + d + e) : 0.0F;
        }
      }
    }
    *reinterpret_cast<float4*>(to + r * stride + d) = make_float4(x[0], x[1], x[2], x[3]);
  }
}

/// s[i][j] += a row (ty kR + i) . b row (tx + 16 j)
template <int kR, int kC>
__device__ __forceinline__ void add_dots(const float* a, const float* b, int stride, int dim,
                                         float (&s)[kR][kC]) {
  const float* mine = a + static_cast<int>(threadIdx.x) / 16 * kR * stride;
  const float* theirs = b + static_cast<int>(threadIdx.x) % 16 * stride;
#pragma unroll 1
  for (int d = 0; d < dim; d += 4) {
    float4 y[kC];
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      y[j] = *reinterpret_cast<const float4*>(theirs + 16 * j * stride + d);
    }
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      const float4 x = *reinterpret_cast<const float4*>(mine + i * stride + d);
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        s[i][j] = fmaf(x.x, y[j].x, s[i][j]);
        s[i][j] = fmaf(x.y, y[j].y, s[i][j]);
        s[i][j] = fmaf(x.z, y[j].z, s[i][j]);
        s[i][j] = fmaf(x.w, y[j].w, s[i][j]);
      }
    }
  }
}

/// sum[i][4 c + e] += sum over k < kN of p[ty kR + i][k] b[k][4 tx + 64 c + e]; rows of p have
/// kN + 4 floats.
template <int kN, int kR, int kColumns>
__device__ __forceinline__ void add_products(const float* p, const float* b, int stride, int dim,
                                             float (&sum)[kR][kColumns]) {
  constexpr int kStride = kN + 4;
  const float* weights = p + static_cast<int>(threadIdx.x) / 16 * kR * kStride;
  const int column = static_cast<int>(threadIdx.x) % 16 * 4;
#pragma unroll 1
  for (int k = 0; k < kN; k += 4) {
    float w[kR][4];
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      const float4 x = *reinterpret_cast<const float4*>(weights + i * kStride + k);
      w[i][0] = x.x;
      w[i][1] = x.y;
      w[i][2] = x.z;
      w[i][3] = x.w;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int c = 0; c < kColumns / 4; ++c) {
        if (column + 64 * c < dim) {
          const float4 y = *reinterpret_cast<const float4*>(b + (k + e) * stride + column + 64 * c);
#pragma unroll
          for (int i = 0; i < kR; ++i) {
            sum[i][4 * c] = fmaf(w[i][e], y.x, sum[i][4 * c]);
            sum[i][4 * c + 1] = fmaf(w[i][e], y.y, sum[i][4 * c + 1]);
            sum[i][4 * c + 2] = fmaf(w[i][e], y.z, sum[i][4 * c + 2]);
            sum[i][4 * c + 3] = fmaf(w[i][e], y.w, sum[i][4 * c + 3]);
          }
        }
      }
    }
  }
}

}  // namespace cambium::cuda::attention
