// Latent attention on tensor cores, forward: bf16, and the sizes of every published model, latents
// of 512 numbers beside rotated keys of 64. A block has a token, kRows of its heads and a part of
// its keys, which come to shared memory in the background, a tile ahead. Warp (m, n) of 2 x 4 has
// half of the rows: of the scores with a quarter of the tile's keys, and of the result a quarter of
// the latent's columns, so that what a row's maximum changes is known to the threads that hold it.
// Where the device has warpgroups these serve the same sizes (latent_attention_wgmma_cuda.cu).
//
// Rows in shared memory lie together, 1,152 bytes each, their pieces of 16 bytes exchanged by the
// row's lowest bits: eight rows of a matrix meet no bank twice, and two tiles fit beside 64
// queries.
#include <algorithm>

#include "ops/attention/attention_mma.cuh"
#include "ops/latent_attention/latent_cuda.cuh"

namespace cambium::cuda::latent {
namespace {

constexpr int kRank = 512;
constexpr int kAll = 576;
constexpr int kPieces = kAll / 8;
constexpr int kKeys = 64;  // of a tile
constexpr int kWeightRow = kKeys + 8;
constexpr int kOwnColumns = kRank / 4;  // of a warp
/// Keys for which a part of them pays.
constexpr int64_t kLeastPart = 256;

/// kM: half of the rows, in sixteens.
template <int kM>
struct Shared {
  static constexpr int kRows = 32 * kM;
  bf16 queries[kRows * kAll];
  bf16 keys[2][kKeys * kAll];
  bf16 weights[kRows * kWeightRow];
  float stats[4][kRows];  // of a quarter of the keys: largest scores, then sums
  int32_t rows[2][kKeys];
};

/// The 16 bytes from an even column of eight on, in row r of a tile.
__device__ __forceinline__ bf16* piece(bf16* tile, int r, int p) {
  return tile + r * kAll + (p ^ (r % 8)) * 8;
}

template <int kM>
__global__ void __launch_bounds__(kThreads, 1)
    mma_kernel(LatentAttention<bf16> a, attention::Layout layout, const int32_t* segments,
               const int32_t* singles, Partials partials) {
  extern __shared__ __align__(16) float shared[];
  Shared<kM>& to = *reinterpret_cast<Shared<kM>*>(shared);
  constexpr int kRows = Shared<kM>::kRows;
  await_inputs();
  const int64_t t = blockIdx.y;
  const int first_head = static_cast<int>(blockIdx.x) * kRows;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int m = thread / 128;
  const int n = thread / 32 % 4;
  const int single = singles[t];
  const auto part = static_cast<int>(blockIdx.z);
  if (part > 0 && single < 0) {
    return;
  }
  const int s = segments[t];
  const int64_t own = layout.position[s] + t - layout.start[s];
  const KeyRange range =
      keys_of_part(a.chosen.count(own), kKeys, part, single < 0 ? 1 : partials.parts);
  const auto find_rows = [&](int64_t tile) {
    if (thread < kKeys) {
      const int64_t at = range.first + tile * kKeys + thread;
      to.rows[tile % 2][thread] =
          at < range.end
              ? static_cast<int32_t>(layout.key_row(s, static_cast<int>(a.chosen.position(t, at))))
              : -1;
    }
  };
  const auto copy_keys = [&](int64_t tile) {
    bf16* keys = to.keys[tile % 2];
#pragma unroll 6
    for (int i = thread; i < kKeys * kPieces; i += kThreads) {
      const int r = i / kPieces;
      const int p = i % kPieces;
      const int64_t row = to.rows[tile % 2][r];
      const bf16* from =
          p < kRank / 8 ? a.latent.wide.at(row, p * 8) : a.rope_key.wide.at(row, p * 8 - kRank);
      copy_16(piece(keys, r, p), row < 0 ? a.latent.wide.data : from, row >= 0);
    }
  };
  const int64_t tiles = (range.end - range.first + kKeys - 1) / kKeys;
  find_rows(0);
  find_rows(1);
  for (int i = thread; i < kRows * kPieces; i += kThreads) {
    const int h = first_head + i / kPieces;
    const bool exists = h < layout.heads;
    copy_16(piece(to.queries, i / kPieces, i % kPieces),
            exists ? a.q.row(t, h) + i % kPieces * 8 : a.q.data, exists);
  }
  __syncthreads();
  if (tiles > 0) {
    copy_keys(0);
  }
  commit_copies();

  float y[kM][kOwnColumns / 8][4] = {};
  // Of rows lane / 4 + 8 i of the warp's; sums over the thread's keys alone.
  float largest[2 * kM];
  float sum[2 * kM] = {};
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    largest[i] = -INFINITY;
  }
  const float scale = layout.scale * attention::kLog2E;
  const int first_row = m * 16 * kM;  // of the warp's
  for (int64_t tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // the tile is there, and the one before has been read
    bf16* keys = to.keys[tile % 2];
    if (tile + 1 < tiles) {
      copy_keys(tile + 1);
    }
    commit_copies();
    find_rows(tile + 2);

    float score[kM][2][4] = {};
    const int key_row = n * 16 + lane % 8 + lane / 16 * 8;
#pragma unroll 4
    for (int k = 0; k < kPieces; k += 2) {
      uint32_t x[4];
      load_matrices(x, piece(keys, key_row, k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        uint32_t query[4];
        load_matrices(query, piece(to.queries, first_row + 16 * i + lane % 16, k + lane / 16));
        mma(score[i][0], query, x[0], x[1]);
        mma(score[i][1], query, x[2], x[3]);
      }
    }
    const int64_t first_key = range.first + tile * kKeys + n * 16 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      float most = -INFINITY;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        float& of = score[i / 2][x / 2][i % 2 * 2 + x % 2];
        of = first_key + x / 2 * 8 + x % 2 < range.end ? of * scale : -INFINITY;
        most = fmaxf(most, of);
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
      if (lane % 4 == 0) {
        to.stats[n][first_row + 8 * i + lane / 4] = most;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const int row = first_row + 8 * i + lane / 4;
      float most = largest[i];
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        most = fmaxf(most, to.stats[quarter][row]);
      }
      const float factor = fast_exp2(largest[i] - most);  // 0 for the first tile
      largest[i] = most;
      sum[i] *= factor;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const float weight[2] = {fast_exp2(score[i / 2][x][i % 2 * 2] - most),
                                 fast_exp2(score[i / 2][x][i % 2 * 2 + 1] - most)};
        sum[i] += weight[0] + weight[1];
        *reinterpret_cast<uint32_t*>(to.weights + row * kWeightRow + n * 16 + x * 8 +
                                     lane % 4 * 2) = pack(weight[0], weight[1]);
      }
#pragma unroll
      for (auto& column : y[i / 2]) {
        column[i % 2 * 2] *= factor;
        column[i % 2 * 2 + 1] *= factor;
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) {
      uint32_t weight[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        load_matrices(weight[i], to.weights + (first_row + 16 * i + lane % 16) * kWeightRow + k +
                                     lane / 16 * 8);
      }
#pragma unroll
      for (int d = 0; d < kOwnColumns / 8; d += 2) {
        uint32_t x[4];
        load_matrices_transposed(x,
                                 piece(keys, k + lane % 16, n * (kOwnColumns / 8) + d + lane / 16));
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma(y[i][d], weight[i], x[0], x[1]);
          mma(y[i][d + 1], weight[i], x[2], x[3]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 2);
  }
  __syncthreads();  // the largest have been read
  if (lane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      to.stats[n][first_row + 8 * i + lane / 4] = sum[i];
    }
  }
  __syncthreads();
  const bool whole = partials.parts == 1 || single < 0;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = first_row + 8 * i + lane / 4;
    const int h = first_head + row;
    if (h >= layout.heads) {
      continue;
    }
    const float total = to.stats[0][row] + to.stats[1][row] + to.stats[2][row] + to.stats[3][row];
    const int64_t at = (int64_t{single} * partials.parts + part) * layout.heads + h;
    if (n == 0 && lane % 4 == 0) {
      if (!whole) {
        partials.largest[at] = largest[i] / attention::kLog2E;
        partials.sum[at] = total;
      } else if (a.largest != nullptr) {
        a.largest[t * layout.heads + h] = largest[i] / attention::kLog2E;
        a.inverse_sum[t * layout.heads + h] = 1.0F / total;
      }
    }
    const int column = n * kOwnColumns + lane % 4 * 2;
    const float inverse = 1.0F / total;
#pragma unroll
    for (int d = 0; d < kOwnColumns / 8; ++d) {
      const float* of = &y[i / 2][d][i % 2 * 2];
      if (whole) {
        *reinterpret_cast<uint32_t*>(a.y.row(t, h) + column + 8 * d) =
            pack(of[0] * inverse, of[1] * inverse);
      } else {
        *reinterpret_cast<float2*>(partials.y + at * kRank + column + 8 * d) =
            make_float2(of[0], of[1]);
      }
    }
  }
}

template <int kM>
void run(const LatentAttention<bf16>& a, const Tokens& tokens, const Launch& on) {
  const AttentionShape& shape = a.shape;
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const int64_t head_blocks = ceil_div(shape.heads, Shared<kM>::kRows);
  const int64_t fill = resident_blocks(mma_kernel<kM>, kThreads, sizeof(Shared<kM>));
  const Partials partials =
      make_partials(a, tokens, tokens.singles * head_blocks, kLeastPart, fill, on);
  launch_ahead(on, "latent_attention", mma_kernel<kM>,
               dim3(static_cast<unsigned>(head_blocks), static_cast<unsigned>(a.q.rows.outer),
                    static_cast<unsigned>(partials.parts)),
               dim3(kThreads), sizeof(Shared<kM>), for_device(a), layout.layout, tokens.segment,
               tokens.single, partials);
  add_parts("latent_attention", a.y, tokens, partials, on);
}

bool rows_in_pieces(const View<bf16>& keys, int64_t numbers) {
  return keys.defined() && aligned(keys) && keys.rows.inner * keys.channels == numbers &&
         (keys.rows.inner == 1 || keys.rows.inner_stride == keys.channels);
}

}  // namespace

bool forward_on_tensor_cores(const LatentAttention<bf16>& a, const Tokens& tokens,
                             const Launch& on) {
  if (a.shape.value_dim != kRank || a.shape.head_dim != kAll || !aligned(a.q) || !aligned(a.y) ||
      !rows_in_pieces(a.latent.wide, kRank) || !rows_in_pieces(a.rope_key.wide, kAll - kRank) ||
      most_shared() < sizeof(Shared<2>)) {
    return false;
  }
  if (!forward_by_warpgroups(a, tokens, on)) {
    a.shape.heads <= Shared<1>::kRows ? run<1>(a, tokens, on) : run<2>(a, tokens, on);
  }
  return true;
}

}  // namespace cambium::cuda::latent
