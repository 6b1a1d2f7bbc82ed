// One product for all three uses: an outer-product micro-kernel over a packed panel of b.
//
// The columns of c are cut into panels of up to kPanelVectors vectors, the depth into blocks of
// kGemmDepth. For each panel and block, b is packed (transposed and widened where needed) into a
// buffer that stays in the first- or second-level cache while all rows of a pass over it. Every
// element of c is the sum over blocks, in order, of sums over the block, in order, whatever the
// shape of the tiles: a row of the result depends neither on the number of rows nor on the number
// of threads.
#include "base/parallel.h"
#include "base/simd.h"
#include "ops/matmul/gemm.h"
#include "ops/matmul/matmul_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// 24 (or 12) accumulators, a row of the panel and a broadcast value fill the registers.
constexpr int kTileRows = 6;
constexpr int kPanelVectors = kLanes == 16 ? 4 : 2;
// Blocks of the depth that are packed at once.
constexpr int64_t kBlocks = 2;
// Packing a panel costs a few rows' worth of products, fewer where it is a copy; pieces of fewer
// rows than this are not made.
constexpr int64_t kMinRowsToTranspose = 192;
constexpr int64_t kMinRowsToCopy = 48;

struct Tile {
  int64_t depth;
  const float* a;
  int64_t a_row, a_k;
  const float* panel;  // (depth, vectors * kLanes)
  float* c;
  int64_t c_row;
  const float* add;  // added to the sums: c itself, the bias, or null
  int64_t add_row;
  int64_t last;  // columns of the last vector, 1 to kLanes
};

template <int kRows, int kVectors>
void multiply_tile(const Tile& t) {
  vf sum[kRows][kVectors] = {};
  const float* a = t.a;
  const float* b = t.panel;
  for (int64_t p = 0; p < t.depth; ++p) {
    vf row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      row[j] = vload(b + j * kLanes);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const vf x = vset(a[i * t.a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = vfma(x, row[j], sum[i][j]);
      }
    }
    a += t.a_k;
    b += kVectors * kLanes;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    float* c = t.c + i * t.c_row;
    const float* add = t.add == nullptr ? nullptr : t.add + i * t.add_row;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      if (j == kVectors - 1 && t.last < kLanes) {
        const vf base = add == nullptr ? vf{} : vload_part(add + j * kLanes, t.last);
        vstore_part(c + j * kLanes, sum[i][j] + base, t.last);
      } else {
        vstore(c + j * kLanes, add == nullptr ? sum[i][j] : sum[i][j] + vload(add + j * kLanes));
      }
    }
  }
}

template <int kVectors>
void multiply_tile(int rows, const Tile& t) {
  static_assert(kTileRows == 6);
  switch (rows) {
    case 1:
      return multiply_tile<1, kVectors>(t);
    case 2:
      return multiply_tile<2, kVectors>(t);
    case 3:
      return multiply_tile<3, kVectors>(t);
    case 4:
      return multiply_tile<4, kVectors>(t);
    case 5:
      return multiply_tile<5, kVectors>(t);
    default:
      return multiply_tile<6, kVectors>(t);
  }
}

void multiply_tile(int rows, int vectors, const Tile& t) {
  if constexpr (kPanelVectors == 4) {
    if (vectors == 4) {
      return multiply_tile<4>(rows, t);
    }
    if (vectors == 3) {
      return multiply_tile<3>(rows, t);
    }
  }
  vectors == 2 ? multiply_tile<2>(rows, t) : multiply_tile<1>(rows, t);
}

// panel (depth, columns rounded up to vectors) from b (depth, columns); zeros in the padding.
template <class T>
void pack_rows(const T* b, int64_t stride, int64_t depth, int64_t columns, float* panel) {
  const int64_t full = columns / kLanes * kLanes;
  for (int64_t p = 0; p < depth; ++p) {
    const T* row = b + p * stride;
    for (int64_t j = 0; j < full; j += kLanes) {
      vstore(panel, vload(row + j));
      panel += kLanes;
    }
    if (full < columns) {
      vstore(panel, vload_part(row + full, columns - full));
      panel += kLanes;
    }
  }
}

// The same from b stored as (columns, depth).
template <class T>
void pack_columns(const T* b, int64_t stride, int64_t depth, int64_t columns, float* panel) {
  const int64_t width = (columns + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = 0; j < columns; j += kLanes) {
    for (int64_t p = 0; p < depth; p += kSpan<T>) {
      const Square<T> square = load_square(b + j * stride + p, stride, columns - j, depth - p);
      float* to = panel + p * width + j;
      if (depth - p >= kSpan<T>) {
#pragma GCC unroll 32
        for (int q = 0; q < kSpan<T>; ++q) {
          vstore(to + q * width, column(square, q));
        }
      } else {
        for (int q = 0; q < depth - p; ++q) {
          vstore(to + q * width, column(square, q));
        }
      }
    }
  }
}

template <class T>
void pack(const Gemm& g, int64_t k0, int64_t depth, int64_t n0, int64_t columns, float* panel) {
  const T* b = static_cast<const T*>(g.b);
  if (g.b_rows_are_k) {
    pack_rows(b + k0 * g.b_stride + n0, g.b_stride, depth, columns, panel);
  } else {
    pack_columns(b + n0 * g.b_stride + k0, g.b_stride, depth, columns, panel);
  }
}

// Asks for rows [first, end) of the weight's block at k0, stored as (n, k), to be read soon.
void prefetch_columns(const Gemm& g, int64_t k0, int64_t first, int64_t end) {
  const int64_t size = g.b_is_bf16 ? 2 : 4;
  const int64_t most = kBlocks * kGemmDepth;
  const int64_t depth = g.k - k0 < most ? g.k - k0 : most;
  for (int64_t n = first; n < end; ++n) {
    const char* row = static_cast<const char*>(g.b) + (n * g.b_stride + k0) * size;
    for (int64_t byte = 0; byte < depth * size; byte += 64) {
      __builtin_prefetch(row + byte, 0, 2);
    }
  }
}

// Rows [m0, m1) and columns [n0, n1) of c; at most one panel of columns. Several blocks of the
// depth are packed at once, so that a tile of c is finished for all of them while it is near.
void multiply_piece(const Gemm& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  alignas(64) float panels[kBlocks][kGemmDepth * kPanelVectors * kLanes];
  const int64_t columns = n1 - n0;
  const int vectors = static_cast<int>((columns + kLanes - 1) / kLanes);
  // Tiles of even height: 8 rows are 4 + 4, not 6 + 2.
  const int64_t tiles = (m1 - m0 + kTileRows - 1) / kTileRows;
  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kBlocks * kGemmDepth) {  // once even when k is 0
    const int64_t end = g.k - k0 < kBlocks * kGemmDepth ? g.k : k0 + kBlocks * kGemmDepth;
    for (int64_t k = k0; k < end; k += kGemmDepth) {
      float* panel = panels[(k - k0) / kGemmDepth];
      const int64_t depth = end - k < kGemmDepth ? end - k : kGemmDepth;
      if (g.b_is_bf16) {
        pack<bf16>(g, k, depth, n0, columns, panel);
      } else {
        pack<float>(g, k, depth, n0, columns, panel);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = m0 + tile * (m1 - m0) / tiles;
      const int64_t last = m0 + (tile + 1) * (m1 - m0) / tiles;
      // While these blocks are used, the next come from memory; a share of them per tile.
      if (!g.b_rows_are_k && end < g.k) {
        prefetch_columns(g, end, n0 + tile * columns / tiles, n0 + (tile + 1) * columns / tiles);
      }
      float* c = g.c + first * g.c_row + n0;
      for (int64_t k = k0; k == k0 || k < end; k += kGemmDepth) {
        Tile t{end - k < kGemmDepth ? end - k : kGemmDepth,
               g.a + first * g.a_row + k * g.a_k,
               g.a_row,
               g.a_k,
               panels[(k - k0) / kGemmDepth],
               c,
               g.c_row,
               nullptr,
               0,
               columns - (vectors - 1) * kLanes};
        if (k > 0 || g.accumulate) {
          t.add = c;
          t.add_row = g.c_row;
        } else if (g.bias != nullptr) {
          t.add = g.bias + n0;
        }
        multiply_tile(static_cast<int>(last - first), vectors, t);
      }
    }
  }
}

// How the columns of one product are cut.
struct Cut {
  int64_t vectors, panels;
};

}  // namespace

void gemm(const Gemms& all) {
  const Gemm& first = all.each[0];
  if (first.m > 0 && first.m <= kFewRows && !first.b_rows_are_k && first.a_k == 1) {
    return CAMBIUM_ISA::gemm_few_rows(all);
  }
  // Several pieces a thread, so that none waits long for the others: rows in chunks, and where they
  // are few, narrower panels.
  int64_t vectors = 0;
  int64_t widest = 0;
  Cut cut[kMaxProducts];
  for (int64_t i = 0; i < all.count; ++i) {
    cut[i].vectors = (all.each[i].n + kLanes - 1) / kLanes;
    cut[i].panels = (cut[i].vectors + kPanelVectors - 1) / kPanelVectors;
    vectors += cut[i].vectors;
    widest += cut[i].panels;
  }
  const int64_t pieces = all.threads == 1 ? 1 : 4 * all.threads;
  const int64_t most = 1 + first.m / (first.b_rows_are_k ? kMinRowsToCopy : kMinRowsToTranspose);
  const int64_t wanted = widest == 0 ? 1 : (pieces + widest - 1) / widest;
  const int64_t chunks = wanted < most ? wanted : most;
  const int64_t narrow = pieces / (2 * chunks) < vectors ? pieces / (2 * chunks) : vectors;
  int64_t panels = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    const int64_t share = vectors == 0 ? 0 : narrow * cut[i].vectors / vectors;
    cut[i].panels = share > cut[i].panels ? share : cut[i].panels;
    panels += cut[i].panels;
  }
  parallel_for(panels * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t panel = piece / chunks;
      const int64_t chunk = piece % chunks;
      int64_t i = 0;
      for (; panel >= cut[i].panels; ++i) {
        panel -= cut[i].panels;
      }
      const Gemm& g = all.each[i];
      // Panels of even width: five vectors are 3 + 2, not 4 + 1.
      const int64_t n0 = panel * cut[i].vectors / cut[i].panels * kLanes;
      const int64_t n1 = (panel + 1) * cut[i].vectors / cut[i].panels * kLanes;
      multiply_piece(g, chunk * g.m / chunks, (chunk + 1) * g.m / chunks, n0, n1 < g.n ? n1 : g.n);
    }
  });
}

void column_sums(const ColumnSums& s) {
  parallel_for(s.columns, 4 * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < s.rows; ++r) {
      const float* x = s.x + r * s.x_row;
      for (int64_t c = begin; c < end; ++c) {
        s.sum[c] += x[c];
      }
    }
  });
}

void transpose(const Transpose& t) {
  parallel_for(t.columns, 4 * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < t.rows; r += kLanes) {
      const int64_t rows = t.rows - r;
      for (int64_t c = begin; c < end; c += kLanes) {
        const int64_t columns = end - c;
        const Square<float> square = load_square(t.x + r * t.x_row + c, t.x_row, rows, columns);
        for (int q = 0; q < kLanes && q < columns; ++q) {
          vstore_upto(t.y + (c + q) * t.y_row + r, column(square, q), rows);
        }
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
