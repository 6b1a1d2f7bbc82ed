// What the tile kernels of the scan share: those for bf16 and 16 states, the shape of models.
//
// A block takes 32 neighbouring channels of a span, tile of 32 tokens after tile. Half of its warps
// are scanners: four lanes a channel, four states a lane, all states in registers, so that one
// sequence of 4,096 channels keeps every scheduler of a large GPU busy without cutting it (to cut
// is to compute exponentials twice). The other half are helpers: they work out what is of a token
// and channel alone (the step, the gate) for the tile ahead, read B and C and widen them once for
// all channels, and finish the tile behind, while the scanners do nothing but scan. They meet at
// two barriers a tile; two buffers in shared memory keep both at work.
#pragma once

#include "ops/selective_scan/selective_scan_cuda.cuh"

namespace cambium::cuda {

inline constexpr int kTileTokens = 32;
inline constexpr int kTileChannels = 32;
inline constexpr int kTileStates = 16;
inline constexpr int kTileThreads = 256;
inline constexpr int kHelpers = 128;     // threads; the first of a block
inline constexpr int kWarpChannels = 8;  // of a scanning warp
inline constexpr int kScanWarps = kTileChannels / kWarpChannels;
inline constexpr int kMaxSlots = 2 * kScanWarps;  // rows of B and C that a block can have a token
static_assert(kTileTokens == kKeptTokens);

/// Which B and C the channels of a block have: one for all or one for each 8 or 16.
struct TileGroups {
  unsigned channel_blocks;
  unsigned b_channels, c_channels;  // that share B, C
  int b_slots, c_slots;             // different ones in a block
  int b_warps, c_warps;             // scanning warps of one
};

inline int tile_slots(int64_t channels) {
  return channels % kTileChannels == 0     ? 1
         : channels == 8 || channels == 16 ? kTileChannels / static_cast<int>(channels)
                                           : 0;
}
inline TileGroups tile_groups(const SelectiveScan<bf16>& a) {
  const int64_t b_channels = a.channels / a.b_groups;
  const int64_t c_channels = a.channels / a.c_groups;
  const int b_slots = tile_slots(b_channels);
  const int c_slots = tile_slots(c_channels);
  return {.channel_blocks = static_cast<unsigned>(a.channels / kTileChannels),
          .b_channels = static_cast<unsigned>(b_channels),
          .c_channels = static_cast<unsigned>(c_channels),
          .b_slots = b_slots,
          .c_slots = c_slots,
          .b_warps = kScanWarps / std::max(b_slots, 1),
          .c_warps = kScanWarps / std::max(c_slots, 1)};
}
/// Whether the tile kernels take these inputs (16 bytes at a time).
inline bool fits_tiles(const SelectiveScan<bf16>& a) {
  return a.states == kTileStates && a.channels % kTileChannels == 0 &&
         tile_slots(a.channels / a.b_groups) > 0 && tile_slots(a.channels / a.c_groups) > 0 &&
         aligned(a.u) && aligned(a.dt) && aligned(a.z) && aligned(a.b) && aligned(a.c) &&
         aligned(a.y) && aligned(a.a_log.data) && aligned(a.state) && aligned(a.kept);
}

// --- Barriers of all threads of a block: some wait, the others only say that they are there.

enum TileBarrier { kFilled = 1, kScanned = 3 };  // + the buffer
template <int kThreads = kTileThreads>
__device__ __forceinline__ void wait_at(int id) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "n"(kThreads) : "memory");
}
__device__ __forceinline__ void pass(int id) {
  asm volatile("bar.arrive %0, %1;" : : "r"(id), "n"(kTileThreads) : "memory");
}

// --- Eight neighbouring bf16 in registers.

__device__ __forceinline__ uint4 load_octet(const bf16* p, bool exists, uint32_t otherwise = 0) {
  return exists ? *reinterpret_cast<const uint4*>(p)
                : make_uint4(otherwise, otherwise, otherwise, otherwise);
}
/// Two of minus infinity: a raw step that leaves the state as it is.
inline constexpr uint32_t kNoStep = 0xff80ff80U;
__device__ __forceinline__ void store_octet(bf16* p, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
__device__ __forceinline__ void widen(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000U);
}
__device__ __forceinline__ void widen(const uint4& octet, float (&x)[8]) {
  widen(octet.x, x[0], x[1]);
  widen(octet.y, x[2], x[3]);
  widen(octet.z, x[4], x[5]);
  widen(octet.w, x[6], x[7]);
}

// --- Rows of B and C of a tile, widened: (slots, kTileTokens, kTileStates), those of B first.

inline constexpr int kSlotWords = kTileTokens * kTileStates;

/// A helper's part of them on the way from memory: eight states of a token of kRows slots.
template <int kRows>
struct RowsAhead {
  const bf16* from[kRows];
  int64_t stride[kRows];  // of a tile
  uint4 octet[kRows];
  int token;

  /// The slot of the i-th row; some are read by two.
  __device__ __forceinline__ static int slot(int i, int slots, int helper) {
    return min(helper / 64 + 2 * i, slots - 1);
  }

  /// Of `slots` slots, from the tile that begins at token `first`.
  __device__ __forceinline__ RowsAhead(const SelectiveScan<bf16>& a, const TileGroups& groups,
                                       unsigned channel, int slots, int helper, int64_t first)
      : token(helper % 64 / 2) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = slot(i, slots, helper);
      const bool of_b = row < groups.b_slots;
      const unsigned group = of_b ? channel / groups.b_channels + row
                                  : channel / groups.c_channels + row - groups.b_slots;
      const View<bf16>& rows = of_b ? a.b : a.c;
      from[i] = rows.at(first + token, group * kTileStates + helper % 2 * 8);
      stride[i] = kTileTokens * rows.rows.outer_stride;
    }
  }
  /// The next tile, which has `count` tokens; kStep: 1, or -1 from the last tile to the first.
  template <int kStep = 1>
  __device__ __forceinline__ void load(int count) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      octet[i] = load_octet(from[i], token < count);
      from[i] += kStep * stride[i];
    }
  }
  /// The next tile in the background, to places kHelpers apart.
  __device__ __forceinline__ void copy(uint4* to, int count) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy_16(to + i * kHelpers, from[i], token < count);
      from[i] += stride[i];
    }
  }
  __device__ __forceinline__ void store(float* rows, int slots, int helper) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float x[8];
      widen(octet[i], x);
      auto* to =
          reinterpret_cast<float4*>(rows + slot(i, slots, helper) * kSlotWords + helper % 64 * 8);
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
  }
  /// As they are: (slots, kTileTokens, kTileStates) bf16.
  __device__ __forceinline__ void store_narrow(uint4* rows, int slots, int helper) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[slot(i, slots, helper) * kSlotWords / 8 + helper % 64] = octet[i];
    }
  }
};

}  // namespace cambium::cuda
