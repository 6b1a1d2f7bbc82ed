// The scan forward of bf16 and 16 states, by tiles (selective_scan_tiles_cuda.cuh).
//
// What bounds it, on an H100 at its 1.755 GHz, for 8,192 tokens of 4,096 channels: 352 MB of inputs
// and result at 3.0 TB/s are 0.117 ms. A state a token needs one exponential; with two for the step
// and two for the gate that are 671 million, at 16 a clock and multiprocessor 0.181 ms; with three
// of a scanner's sixteen by a polynomial instead, 0.154 ms. Instructions, at one a clock and
// scheduler, by the compiler's listing: a scanning warp issues 25 for each token of 8 channels, a
// helping one 11, 0.16 ms. So both must be kept busy all the time, by the one scanning and the one
// helping warp that a scheduler has:
//  - no exponential is computed twice, and what is of a token and channel alone is not done by
//    scanners;
//  - step u times B, and the sum over states of C h, are products on tensor cores: one instruction
//    for 8 channels of 16 states. The first takes step u as the sum of two bf16, which keeps 16
//    bits of it, so that states are as exact as in fp32. The second reads 11 bits of the states
//    (TF32), far more than the result has;
//  - a scanner works out the decays of four tokens while it scans the four before. Its chain from
//    token to token is one multiply-add.
// Steps are in units of ln 2 and states in units that make up for it, and for a product that counts
// everything twice: 2 h / ln 2.
#include "ops/selective_scan/selective_scan_tiles_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int64_t kSlots = 132;  // blocks that a large GPU holds
constexpr float kLn2 = 0.693147180559945309F;
constexpr float kLog2E = 1.44269504088896341F;
/// Tensor cores cut states to TF32: they lose 0.72 half units of the last of 11 bits on average.
constexpr float kCut = 1.0F + 0.72F / 2048.0F;
/// What one in a scanner's states, and in its sums over them, is worth.
constexpr float kStateUnit = kLn2 / 2.0F;
constexpr float kSumUnit = kStateUnit * kCut;

constexpr int kQuad = 4;  // tokens that a scanner takes at once
constexpr int kHalfTokens = kTileTokens / 2;
constexpr int kQuads = kHalfTokens / kQuad;
/// Of the first of a lane's four states, the decays of so many tokens of a quad by polynomial.
constexpr int kPolynomials = 3;

// Places in a half tile, padded so that lanes meet in few banks.
// (warp, quad, channel, token) of steps.
constexpr int kStepQuad = kWarpChannels * kQuad + 4;
constexpr int kStepWarp = kQuads * kStepQuad + 24;
constexpr int kSteps = kScanWarps * kStepWarp;
// (warp, pair of tokens, half of states, channel, token): what is a row of a product that gives the
// first eight states of a channel and what is a row of one that gives the second: step u as two
// bf16 and zero, or zero and step u.
constexpr int kWrittenHalf = kWarpChannels * 4;
constexpr int kWrittenPair = 2 * kWrittenHalf + 4;
constexpr int kWrittenWarp = kHalfTokens / 2 * kWrittenPair + 16;
constexpr int kWritten = kScanWarps * kWrittenWarp;
// (slot, quad, state, token) of B as two equal bf16, the second eight states after a gap.
constexpr int kUpper = kTileStates / 2 * kQuad + 16;
constexpr int kBQuad = 2 * kUpper + 4;
constexpr int kBSlot = kQuads * kBQuad;
// (slot, token, state) of C.
constexpr int kCQuad = kQuad * kTileStates;
constexpr int kCSlot = kQuads * kCQuad;
constexpr int kHalves = 4;  // that there is room for
// (warp, token, channel) of sums over states of a half tile, which have a buffer of their own.
constexpr int kSumWarp = kHalfTokens * kWarpChannels + 4;
constexpr int kSums = kScanWarps * kSumWarp;
constexpr int kSumHalves = 6;
/// Tiles that copies from memory fill; a helper has its own places in them.
constexpr int kStages = 6;

/// The shared memory of a block.
struct TileMemory {
  float* at;
  int b_slots, c_slots;

  static constexpr int words(int b_slots, int c_slots) {
    return kSteps + kWritten + b_slots * kBSlot + c_slots * kCSlot;
  }
  static constexpr size_t bytes(int b_slots, int c_slots, int octets) {
    return sizeof(float) * (kHalves * words(b_slots, c_slots) + kSumHalves * kSums) +
           sizeof(uint4) * kStages * kHelpers * octets;
  }
  __device__ __forceinline__ float* half(int i) const {
    return at + i % kHalves * words(b_slots, c_slots);
  }
  // In a half tile.
  static constexpr int b_rows() { return kSteps + kWritten; }
  __device__ __forceinline__ int c_rows() const { return b_rows() + b_slots * kBSlot; }

  __device__ __forceinline__ float* sums() const { return at + kHalves * words(b_slots, c_slots); }
  __device__ __forceinline__ uint4* stages() const {
    return reinterpret_cast<uint4*>(sums() + kSumHalves * kSums);
  }
};

/// log2(1 + 2^x); x itself from 20 log2(e) on.
__device__ __forceinline__ float softplus2(float x) {
  const float e = fast_exp2(x);
  float whole;  // volatile: not in a branch, which lanes would take both ways
  asm volatile("lg2.approx.ftz.f32 %0, %1;" : "=f"(whole) : "f"(1.0F + e));
  const float series = e * fmaf(e, kLog2E * -0.5F, kLog2E);
  return x > 20.0F * kLog2E ? x : e < 0.0078125F ? series : whole;
}

/// 2^x for x from -126 to 0 without the unit for exponentials, to 3e-6: x = step rate.
__device__ __forceinline__ float exp2_of_product(float step, float rate) {
  constexpr float kRound = 12582912.0F;  // its last bit is worth one
  const float whole = fmaf(step, rate, kRound);
  const float x = fmaf(step, rate, kRound - whole);  // the fraction, -1/2 to 1/2
  float y = fmaf(x, 0.009582869531674294F, 0.055906467964252596F);
  y = fmaf(x, y, 0.24024098590386014F);
  y = fmaf(x, y, 0.6931241884711797F);
  y = fmaf(x, y, 1.0F);
  return __uint_as_float(__float_as_uint(y) + (__float_as_uint(whole) << 23));
}

/// Two bf16 whose sum is x but for 2^-17 of it.
__device__ __forceinline__ uint32_t split(float x) {
  const float high = __uint_as_float(__float_as_uint(x) & 0xffff0000U);
  return pack(high, x - high);
}

/// y = a b: a (16, 8), b (8, 8) of bf16.
__device__ __forceinline__ void narrow_product(float (&y)[4], uint32_t a0, uint32_t a1,
                                               uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %7, %7, %7};"
      : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
      : "r"(a0), "r"(a1), "r"(b), "f"(0.0F));
}
/// y = a b: a (16, 8), b (8, 8), of which tensor cores read 11 bits.
__device__ __forceinline__ void wide_product(float (&y)[4], const float (&a)[4], float2 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[1])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)),
        "f"(0.0F));
}

// --- Helpers.

/// A helper: eight channels of a token of each tile, and eight states of a token of kRows slots of
/// B and C. It fetches tiles kStages - 2 before it fills them and fills them two before the
/// scanners are done.
template <bool kLocal, int kRows>
class Helper {
 public:
  __device__ __forceinline__ Helper(const SelectiveScan<bf16>& a, const TileGroups& of_groups,
                                    const TileMemory& shared, unsigned block_channel, int64_t first,
                                    int count)
      : memory(shared),
        slots(of_groups.b_slots + (kLocal ? 0 : of_groups.c_slots)),
        tokens(count),
        helper(static_cast<int>(threadIdx.x)),
        token(helper / kScanWarps),
        warp(helper % kScanWarps),
        sigmoid(a.sigmoid),
        rows(a, of_groups, block_channel, slots, helper, first),
        own(shared.stages() + helper) {
    const unsigned channel = block_channel + warp * kWarpChannels;
#pragma unroll
    for (int g = 0; g < kWarpChannels; ++g) {
      bias[g] = a.dt_bias.data[channel + g] * kLog2E;
      skip[g] = a.d.data[channel + g] * (1.0F / kSumUnit);
    }
    const auto follow = [&](int i, const View<bf16>& v) {
      from[i] = v.at(first + token, channel);
      stride[i] = kTileTokens * v.rows.outer_stride;
    };
    follow(0, a.u);
    follow(1, a.dt);
    if constexpr (!kLocal) {
      follow(2, a.z);
      y_at = a.y.at(first + token, channel);
      y_stride = kTileTokens * a.y.rows.outer_stride;
    }
  }

  __device__ __forceinline__ void run() {
    const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
    for (int i = 0; i < kStages; ++i) {
      fetch(i);
    }
    for (int buffer = 0; buffer < 2; ++buffer) {  // zeros that stay
      float* written = written_at(buffer);
#pragma unroll
      for (int g = 0; g < kWarpChannels; ++g) {
        written[g * 4 + 1] = 0.0F;
        written[g * 4 + kWrittenHalf] = 0.0F;
      }
    }
    wait_for_copies<kStages - 2>();
    int filled = 0;
    for (; filled < min(tiles, 2); ++filled) {
      fill(filled, filled);
    }
    int stage = 0;
    const float* sums = memory.sums() + token / kHalfTokens * kSums + warp * kSumWarp +
                        token % kHalfTokens * kWarpChannels;
    int left = kSumHalves / 2;  // tiles until sums are in the first buffer again
    for (int tile = 0; tile < tiles; ++tile) {
      wait_at(kScanned + tile % 2);
      if (filled < tiles) {
        wait_for_copies<kStages - 3>();
        fill(filled, stage + 2 < kStages ? stage + 2 : stage + 2 - kStages);
        ++filled;
      }
      finish(tile, stage, sums);
      fetch(stage);
      stage = stage + 1 < kStages ? stage + 1 : 0;
      --left;
      sums += left > 0 ? 2 * kSums : (2 - kSumHalves) * kSums;
      left = left > 0 ? left : kSumHalves / 2;
    }
  }

 private:
  static constexpr int kArrays = kLocal ? 2 : 3;  // u, dt, z
  static constexpr int kStageSize = (kArrays + kRows) * kHelpers;

  /// Begins to fetch the next tile; zeros where there is none.
  __device__ __forceinline__ void fetch(int stage) {
    uint4* to = own + stage * kStageSize;
#pragma unroll
    for (int i = 0; i < kArrays; ++i) {
      copy_16(to + i * kHelpers, from[i], fetched + token < tokens);
      from[i] += stride[i];
    }
    rows.copy(to + kArrays * kHelpers, tokens - fetched);
    commit_copies();
    fetched += kTileTokens;
  }

  /// Of this helper's token.
  __device__ __forceinline__ float* written_at(int tile) const {
    return memory.half(tile * 2 + token / kHalfTokens) + kSteps + warp * kWrittenWarp +
           token % kHalfTokens / 2 * kWrittenPair + token % 2 * 2;
  }

  __device__ __forceinline__ void fill(int tile, int stage) const {
    const uint4* in = own + stage * kStageSize;
    uint4 dt = in[kHelpers];
    if (tile * kTileTokens + token >= tokens) {
      dt = make_uint4(kNoStep, kNoStep, kNoStep, kNoStep);
    }
    float u[kWarpChannels];
    float raw[kWarpChannels];
    widen(in[0], u);
    widen(dt, raw);
    float* steps = memory.half(tile * 2 + token / kHalfTokens) + warp * kStepWarp +
                   token % kHalfTokens / kQuad * kStepQuad + token % kQuad;
    float* written = written_at(tile);
#pragma unroll
    for (int g = 0; g < kWarpChannels; ++g) {
      const float step = softplus2(fmaf(raw[g], kLog2E, bias[g]));
      const float both = __uint_as_float(split(step * u[g]));
      steps[g * kQuad] = step;
      written[g * 4] = both;
      written[g * 4 + kWrittenHalf + 1] = both;
    }
    float* half = memory.half(tile * 2 + rows.token / kHalfTokens);
    const int row = rows.token % kHalfTokens;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int slot = rows.slot(i, slots, helper);
      const uint4 octet = in[(kArrays + i) * kHelpers];
      if (slot < memory.b_slots) {
        float* to = half + memory.b_rows() + slot * kBSlot + row / kQuad * kBQuad +
                    helper % 2 * kUpper + row % kQuad;
        const uint32_t pairs[] = {octet.x, octet.y, octet.z, octet.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          to[2 * n * kQuad] = __uint_as_float(__byte_perm(pairs[n], 0, 0x1010));
          to[(2 * n + 1) * kQuad] = __uint_as_float(__byte_perm(pairs[n], 0, 0x3232));
        }
      } else {
        float x[8];
        widen(octet, x);
        auto* to =
            reinterpret_cast<float4*>(half + memory.c_rows() + (slot - memory.b_slots) * kCSlot +
                                      row * kTileStates + helper % 2 * 8);
        to[0] = make_float4(x[0], x[1], x[2], x[3]);
        to[1] = make_float4(x[4], x[5], x[6], x[7]);
      }
    }
    pass(kFilled + tile % 2);
  }

  __device__ __forceinline__ void finish(int tile, int stage, const float* sums) {
    if constexpr (!kLocal) {
      const uint4* in = own + stage * kStageSize;
      float y[kWarpChannels];
      float u[kWarpChannels];
      float z[kWarpChannels];
      load_all<kWarpChannels>(sums, y);
      widen(in[0], u);
      widen(in[2 * kHelpers], z);
#pragma unroll
      for (int g = 0; g < kWarpChannels; ++g) {
        // The gate in the sum's unit: kSumUnit / (1 + exp(-z)).
        const float e = fast_exp2(-kLog2E * z[g]);
        const float gate = fast_reciprocal(fmaf(e, 1.0F / kSumUnit, 1.0F / kSumUnit));
        y[g] = fmaf(skip[g], u[g], y[g]) * (sigmoid ? gate : z[g] * gate);
      }
      if (tile * kTileTokens + token < tokens) {
        store_octet(y_at, y);
      }
      y_at += y_stride;
    }
  }

  TileMemory memory;
  int slots, tokens, helper, token, warp;
  bool sigmoid;
  RowsAhead<kRows> rows;
  uint4* own;       // its first octet in the stages
  int fetched = 0;  // tokens
  const bf16* from[kArrays];
  int64_t stride[kArrays];  // of a tile
  bf16* y_at;
  int64_t y_stride;
  float bias[kWarpChannels];
  float skip[kWarpChannels];
};

// --- Scanners.

/// Lane (g, q) has of channel g the states 2 q, 2 q + 1 and 8 + 2 q, 9 + 2 q: as products leave
/// them where row g is the channel's first eight states and row g + 8 its second.
template <bool kLocal>
class Scanner {
 public:
  __device__ __forceinline__ Scanner(const SelectiveScan<bf16>& a, const TileGroups& groups,
                                     const TileMemory& shared, unsigned block_channel)
      : memory(shared),
        warp(static_cast<int>(threadIdx.x - kHelpers) / 32),
        g(static_cast<int>(threadIdx.x) % 32 / 4),
        q(static_cast<int>(threadIdx.x) % 4),
        steps_at(warp * kStepWarp + g * kQuad),
        written_at(kSteps + warp * kWrittenWarp + q % 2 * kWrittenHalf + g * 4),
        b_at(shared.b_rows() + warp / groups.b_warps * kBSlot + q % 2 * kUpper + g * kQuad),
        c_at(shared.c_rows() + warp / groups.c_warps * kCSlot + (g * 4 + q) * 2),
        channel(static_cast<int64_t>(block_channel) + warp * kWarpChannels + g),
        row_size(a.channels * kTileStates) {
    load_pairs(a.a_log.data, rate);
#pragma unroll
    for (float& of_state : rate) {
      of_state = fmaxf(-expf(of_state), -1e30F);
    }
    most_step = -126.0F / rate[0];
  }

  __device__ __forceinline__ void load_state(const float* row) {
    load_pairs(row, h);
#pragma unroll
    for (float& x : h) {
      x *= 1.0F / kStateUnit;
    }
  }
  __device__ __forceinline__ void store_state(float* row) const {
    float* to = row + channel * kTileStates + q * 2;
    *reinterpret_cast<float2*>(to) = make_float2(h[0] * kStateUnit, h[1] * kStateUnit);
    *reinterpret_cast<float2*>(to + 8) = make_float2(h[2] * kStateUnit, h[3] * kStateUnit);
  }
  /// kLocal: the sum of the steps.
  __device__ __forceinline__ void store_step_sum(float* row) const {
    if (q == 0) {
      row[channel] = sum * kLn2;
    }
  }

  /// Of `tokens` tokens; `kept`: rows for the states before tiles, or null.
  __device__ __forceinline__ void run(int tokens, float* kept) {
    const int halves = (tokens + kTileTokens / 2 - 1) / (kTileTokens / 2);
    if (halves == 0) {
      return;
    }
    float step[2][kQuad];
    Quad quads[2];
    float* sums = memory.sums() + warp * kSumWarp + q * kWarpChannels + g;
    int left = kSumHalves;  // halves until sums are in the first buffer again
    const bool keeps = kept != nullptr;
    wait_at(kFilled);
    const float* next = memory.half(0);
    load_n<kQuad>(next + steps_at, step[0]);
    load_n<kQuad>(next + steps_at + kStepQuad, step[1]);
    load(quads[0], next, 0);
    find_decays(quads[0], step[0], true);
    for (int half = 0; half < halves; ++half) {
      const int tile = half / 2;
      const bool upper = half % 2 != 0;
      if (keeps && !upper) {
        store_state(kept);
        kept += row_size;
      }
      if (upper && half + 1 < halves) {
        wait_at(kFilled + (tile + 1) % 2);
      }
      const float* here = next;
      next = memory.half(half + 1);  // after the last what is there is read, not used
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        Quad& ahead = quads[(i + 1) % 2];
        load(ahead, i + 1 < kQuads ? here : next, (i + 1) % kQuads);
        find_decays(ahead, step[(i + 1) % 2], i + 1 < kQuads || half + 1 < halves);
        load_n<kQuad>((i + 2 < kQuads ? here : next) + steps_at + (i + 2) % kQuads * kStepQuad,
                      step[i % 2]);
        scan(quads[i % 2], sums + i * kQuad * kWarpChannels);
      }
      --left;
      sums += left > 0 ? kSums : (1 - kSumHalves) * kSums;
      left = left > 0 ? left : kSumHalves;
      if (upper || half + 1 == halves) {
        pass(kScanned + tile % 2);
      }
    }
  }

 private:
  /// What four tokens bring.
  struct Quad {
    // Rows of step u and columns of B, as two bf16 each, for products. Lanes of even q have what
    // gives the first eight states, those of odd q the second; all lanes add up: twice the result.
    uint4 written[kQuad / 2];
    uint4 b;
    float2 c;  // of token g / 2
    float decay[kQuad][4];
  };
  /// This lane's states, from rows (d, N).
  __device__ __forceinline__ void load_pairs(const float* row, float (&x)[4]) const {
    const float* from = row + channel * kTileStates + q * 2;
    const float2 low = *reinterpret_cast<const float2*>(from);
    const float2 high = *reinterpret_cast<const float2*>(from + 8);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = high.x;
    x[3] = high.y;
  }

  __device__ __forceinline__ void load(Quad& quad, const float* half, int i) const {
#pragma unroll
    for (int pair = 0; pair < kQuad / 2; ++pair) {
      quad.written[pair] = *reinterpret_cast<const uint4*>(half + written_at +
                                                           (i * kQuad / 2 + pair) * kWrittenPair);
    }
    quad.b = *reinterpret_cast<const uint4*>(half + b_at + i * kBQuad);
    if constexpr (!kLocal) {
      quad.c = *reinterpret_cast<const float2*>(half + c_at + i * kCQuad);
    }
  }

  __device__ __forceinline__ void find_decays(Quad& quad, const float (&step)[kQuad], bool exists) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      quad.decay[j][0] = j < kPolynomials ? exp2_of_product(fminf(step[j], most_step), rate[0])
                                          : fast_exp2(step[j] * rate[0]);
#pragma unroll
      for (int n = 1; n < 4; ++n) {
        quad.decay[j][n] = fast_exp2(step[j] * rate[n]);
      }
      if constexpr (kLocal) {
        sum += exists ? step[j] : 0.0F;
      }
    }
  }

  __device__ __forceinline__ void scan(const Quad& quad, float* y) {
    float of_channel = 0.0F;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      float change[4];
      const uint4& pair = quad.written[j / 2];
      narrow_product(change, word(pair, j % 2 * 2), word(pair, j % 2 * 2 + 1), word(quad.b, j));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        h[n] = fmaf(quad.decay[j][n], h[n], change[n]);
      }
      if constexpr (!kLocal) {
        // Times the C of all four tokens, the first eight states and the second apart: lane q has
        // the columns of token q.
        float parts[4];
        wide_product(parts, h, quad.c);
        if (j == 0 || q == j) {
          of_channel = parts[0] + parts[3];
        }
      }
    }
    if constexpr (!kLocal) {
      *y = of_channel;
    }
  }

  __device__ __forceinline__ static uint32_t word(const uint4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
  }

  TileMemory memory;
  int warp, g, q;
  int steps_at, written_at, b_at, c_at;  // of this lane in a half tile
  int64_t channel, row_size;
  float rate[4];    // of steps in units of ln 2
  float most_step;  // for polynomials, whose result is 2^-126 from it on
  float h[4] = {};
  float sum = 0.0F;  // of steps
};

/// kLocal: from a state of zero, for the state after the span (into carry) and the sum of its
/// steps; else from the state in carry, or without carry that before the segment.
template <bool kLocal, int kRows>
__global__ void __launch_bounds__(kTileThreads, 1)
    scan_tiles(const __grid_constant__ SelectiveScan<bf16> a,
               const __grid_constant__ ScanSpans spans, const __grid_constant__ TileGroups groups,
               float* carry, float* step_sums) {
  extern __shared__ __align__(16) float shared[];
  const int64_t index = blockIdx.x / groups.channel_blocks;
  const unsigned block_channel = blockIdx.x % groups.channel_blocks * kTileChannels;
  const ScanSpan span(a.segments, spans, index);
  if (!span.taken || (kLocal && span.last)) {
    return;
  }
  const auto tokens = static_cast<int>(span.end - span.begin);
  const TileMemory memory{shared, groups.b_slots, kLocal ? 0 : groups.c_slots};
  if (threadIdx.x < kHelpers) {
    Helper<kLocal, kRows> helper(a, groups, memory, block_channel,
                                 a.segments.begin(span.segment) + span.begin, tokens);
    helper.run();
    return;
  }

  Scanner<kLocal> scanner(a, groups, memory, block_channel);
  const int64_t row_size = a.channels * kTileStates;
  if constexpr (kLocal) {
    scanner.run(tokens, nullptr);
    scanner.store_state(carry + index * row_size);
    scanner.store_step_sum(step_sums + index * a.channels);
  } else {
    if (carry != nullptr) {
      scanner.load_state(carry + index * row_size);
    } else if (a.segments.continues(span.segment)) {
      scanner.load_state(a.state_of(span.segment));
    }
    float* kept = a.kept == nullptr
                      ? nullptr
                      : static_cast<float*>(a.kept) +
                            (spans.first_kept[span.segment] + span.begin / kKeptTokens) * row_size;
    scanner.run(tokens, kept);
    if (span.last && a.state != nullptr) {
      scanner.store_state(a.state_of(span.segment));
    }
  }
}

}  // namespace

bool scan_by_tiles(const SelectiveScan<bf16>& host, const DeviceSegments& segments,
                   unsigned lengths, const Launch& on) {
  SelectiveScan<bf16> a = host;
  a.segments = segments.walk;
  if (!fits_tiles(a)) {
    return false;
  }
  const TileGroups groups = tile_groups(a);
  const int slots = groups.b_slots + groups.c_slots;
  const bool few = slots <= kMaxSlots / 2;
  const size_t bytes =
      TileMemory::bytes(groups.b_slots, groups.c_slots, 3 + (few ? kMaxSlots / 4 : kMaxSlots / 2));
  if (bytes > most_shared()) {
    return false;
  }
  const int64_t span =
      on.batch_invariant ? kWholeSegments : span_tokens(segments, groups.channel_blocks, kSlots);
  ScanSpans spans{.count = a.segments.count, .tokens = span};
  std::shared_ptr<const ScanPlan> plan;
  if (a.kept != nullptr || span != kWholeSegments) {
    plan = scan_plan(host.segments, span, on);
    spans = plan->spans;
  }
  spans.lengths = lengths;
  const auto blocks = static_cast<unsigned>(spans.count * groups.channel_blocks);
  float* carry = nullptr;
  if (plan != nullptr && plan->cut) {
    carry = scratch<float>(on, spans.count * a.channels * a.states);
    float* step_sums = scratch<float>(on, spans.count * a.channels);
    launch(on, "selective_scan", scan_tiles<true, kMaxSlots / 4>, blocks, kTileThreads,
           TileMemory::bytes(groups.b_slots, 0, 2 + kMaxSlots / 4), a, spans, groups, carry,
           step_sums);
    carry_over_spans(a, spans, carry, step_sums, false, on);
  }
  launch(on, "selective_scan",
         few ? scan_tiles<false, kMaxSlots / 4> : scan_tiles<false, kMaxSlots / 2>, blocks,
         kTileThreads, bytes, a, spans, groups, carry, nullptr);
  return true;
}

}  // namespace cambium::cuda
