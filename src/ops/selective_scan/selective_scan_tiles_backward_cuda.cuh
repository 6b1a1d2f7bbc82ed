// The helpers of the scan backward by tiles (selective_scan_tiles_backward_cuda.cu), and what they
// and the scanners share: where things lie in a block's memory.
#pragma once

#include "ops/selective_scan/selective_scan_tiles_cuda.cuh"

namespace cambium::cuda::scan_backward {

inline constexpr int kGroup = 8;  // tokens
inline constexpr int kGroups = kTileTokens / kGroup;

// Places in a buffer, padded so that lanes meet in no bank.
// (warp, token, channel) of (step, step u, dy, gate).
inline constexpr int kStepToken = kWarpChannels * 4 + 4;
inline constexpr int kStepWarp = kTileTokens * kStepToken + 8;
inline constexpr int kSteps = kScanWarps * kStepWarp;
// (warp, token, channel) of dy, and of step u, as bf16.
inline constexpr int kNarrowWarp = kTileTokens * 4 + 8;
inline constexpr int kNarrow = kScanWarps * kNarrowWarp;
// (warp, token, channel) of sums over states: of C h, of dh B, of the decays.
inline constexpr int kSumToken = kWarpChannels + 4;
inline constexpr int kSumWarp = kTileTokens * kSumToken + 8;
inline constexpr int kSums = kScanWarps * kSumWarp;
// (warp, token, state) of sums over channels: dB, dC.
inline constexpr int kRowToken = kTileStates + 4;
inline constexpr int kRowWarp = kTileTokens * kRowToken;
inline constexpr int kRowSums = kScanWarps * kRowWarp;
// (group, scanner, 4 states): states before groups.
inline constexpr int kScanners = kTileThreads - kHelpers;
inline constexpr int kStarts = kGroups * kScanners * 4;
inline constexpr int kFixed = kSteps + 2 * kNarrow + 3 * kSums + 2 * kRowSums + kStarts;
// Beside the buffers: sums of the helping warps.
inline constexpr int kOfChannels = 2 * kHelpers / 32 * kTileChannels;
/// Rows of B and C as bf16 beside the widened ones.
inline constexpr int kNarrowSlot = kSlotWords / 2;

inline constexpr int buffer_words(int slots) {
  return kFixed + slots * (kSlotWords + kNarrowSlot);
}
inline constexpr size_t shared_bytes(int slots) {
  return sizeof(float) * (2 * buffer_words(slots) + kOfChannels);
}

struct TileWork {
  ScanSpans spans;
  int64_t units;
  TileGroups groups;
  const float* carry;  // (spans, d, N): the gradients of the states after the spans; or null: zero
  float* db;           // (T, channel_blocks, N) parts; null: straight into the gradient, if any
  float* dc;
  float* da_log;    // (units, d, N)
  float* dd;        // (units, d)
  float* ddt_bias;  // (units, d)
};

struct Buffer {
  float* at;
  int slots;

  __device__ __forceinline__ Buffer(float* memory, int number, int count)
      : at(memory + number % 2 * buffer_words(count)), slots(count) {}
  __device__ __forceinline__ float* steps() const { return at; }
  __device__ __forceinline__ float* dy() const { return at + kSteps; }
  __device__ __forceinline__ float* written() const { return dy() + kNarrow; }
  __device__ __forceinline__ float* sums() const { return written() + kNarrow; }
  __device__ __forceinline__ float* row_sums() const { return sums() + 3 * kSums; }
  __device__ __forceinline__ float* starts() const { return row_sums() + 2 * kRowSums; }
  __device__ __forceinline__ float* rows() const { return starts() + kStarts; }
  __device__ __forceinline__ float* narrow_rows() const { return rows() + slots * kSlotWords; }
};

/// A span as a block walks over it.
struct Walk {
  int64_t segment, first;  // its first token
  int64_t begin;           // that token, counted in the segment
  int tokens, tiles;

  __device__ __forceinline__ Walk(const SegmentWalk& segments, const ScanSpans& spans,
                                  int64_t index) {
    const ScanSpan span(segments, spans, index);
    segment = span.segment;
    begin = span.begin;
    first = segments.begin(segment) + begin;
    tokens = static_cast<int>(span.end - begin);
    tiles = (tokens + kTileTokens - 1) / kTileTokens;
  }
};

/// Four states of a channel as a scanner has them: lane (g, q) of channel g and states 4 q to
/// 4 q + 3.
struct Place {
  int warp, b_slot, c_slot, g, q;
  int64_t row_size, at;  // of a row of states, and in it
  float rate[4];

  __device__ __forceinline__ Place(const SelectiveScan<bf16>& a, const TileGroups& groups,
                                   unsigned block_channel, int scanner)
      : warp(scanner / 32),
        b_slot(warp / groups.b_warps),
        c_slot(groups.b_slots + warp / groups.c_warps),
        g(scanner % 32 / 4),
        q(scanner % 4),
        row_size(a.channels * kTileStates),
        at((static_cast<int64_t>(block_channel) + warp * kWarpChannels + g) * kTileStates + q * 4) {
    load_n<4>(a.a_log.data + at, rate);
#pragma unroll
    for (float& of_state : rate) {
      of_state = ScanMath<bf16>::rate(of_state);
    }
  }
  __device__ __forceinline__ const float* steps(const Buffer& buffer) const {
    return buffer.steps() + warp * kStepWarp + g * 4;
  }
  __device__ __forceinline__ const float* b_rows(const Buffer& buffer) const {
    return buffer.rows() + b_slot * kSlotWords + q * 4;
  }
  __device__ __forceinline__ const float* c_rows(const Buffer& buffer) const {
    return buffer.rows() + c_slot * kSlotWords + q * 4;
  }
};

/// y = a b
__device__ __forceinline__ void product(float (&y)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0F));
}

// --- Helpers.

/// Adds to the gradient of eight neighbouring channels.
struct OctetGradient {
  bf16* at;
  uint4 old;

  __device__ __forceinline__ OctetGradient(const View<bf16>& v, int64_t t, unsigned channel,
                                           bool exists)
      : at(exists ? v.grad_at(t, channel) : nullptr), old(load_octet(at, at != nullptr)) {}
  __device__ __forceinline__ void add(const float (&change)[8]) const {
    if (at != nullptr) {
      float x[8];
      widen(old, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] += change[i];
      }
      store_octet(at, x);
    }
  }
};

/// What a helper has of a tile: eight channels of a token.
struct Octets {
  uint4 u, dt, z, dout;
};

template <int kRows>
class Helper {
 public:
  __device__ __forceinline__ Helper(const SelectiveScan<bf16>& args, const TileWork& of,
                                    float* shared, unsigned first_channel)
      : a(args),
        work(of),
        memory(shared),
        block_channel(first_channel),
        slots(of.groups.b_slots + of.groups.c_slots),
        helper(static_cast<int>(threadIdx.x)),
        token(helper / kScanWarps),
        warp(helper % kScanWarps),
        channel(first_channel + warp * kWarpChannels),
        b_offset(first_channel / of.groups.b_channels * kTileStates + helper % 4 * 4),
        c_offset(first_channel / of.groups.c_channels * kTileStates + helper % 4 * 4),
        place(args, of.groups, first_channel, helper) {
#pragma unroll
    for (int g = 0; g < kWarpChannels; ++g) {
      bias[g] = a.dt_bias.data[channel + g];
      skip[g] = a.d.data[channel + g];
    }
  }

  /// `number` counts the block's tiles.
  __device__ __forceinline__ void span(const Walk& walk, int& number) {
    if (walk.tiles == 0) {
      return;
    }
    int tile = walk.tiles - 1;
    const int64_t last = static_cast<int64_t>(tile) * kTileTokens;
    RowsAhead<kRows> rows(a, work.groups, block_channel, slots, helper, walk.first + last);
    Octets ahead = load(walk, tile);
    rows.template load<-1>(walk.tokens - static_cast<int>(last));
    Octets behind = ahead;
    const float* kept =
        static_cast<const float*>(a.kept) +
        (work.spans.first_kept[walk.segment] + walk.begin / kKeptTokens + tile) * place.row_size +
        place.at;
    float state[4];
    load_n<4>(kept, state);
    for (; tile >= 0; --tile, ++number) {
      const Octets here = ahead;
      const Buffer buffer(memory, number, slots);
      fill(buffer, here);
      rows.store(buffer.rows(), slots, helper);
      rows.store_narrow(reinterpret_cast<uint4*>(buffer.narrow_rows()), slots, helper);
      wait_at<kHelpers>(kTogether);
      find_starts(buffer, (min(walk.tokens - tile * kTileTokens, kTileTokens) - 1) / kGroup, state);
      pass(kFilled + number % 2);
      if (tile > 0) {
        kept -= place.row_size;
        load_n<4>(kept, state);
        ahead = load(walk, tile - 1);
        rows.template load<-1>(kTileTokens);
      }
      if (tile + 1 < walk.tiles) {
        finish(walk, tile + 1, number - 1, behind);
      }
      behind = here;
    }
    finish(walk, 0, number - 1, behind);
  }

  /// The unit's gradients of weights that are a number a channel: over tokens in a fixed order.
  __device__ __forceinline__ void finish_unit(int64_t unit) {
    float* of_channels = memory + 2 * buffer_words(slots);
#pragma unroll
    for (int g = 0; g < kWarpChannels; ++g) {
#pragma unroll
      for (int lanes = kScanWarps; lanes < 32; lanes *= 2) {
        dd[g] += __shfl_xor_sync(kAllLanes, dd[g], lanes);
        dbias[g] += __shfl_xor_sync(kAllLanes, dbias[g], lanes);
      }
      if (helper % 32 < kScanWarps) {
        float* to = of_channels + helper / 32 * kTileChannels + warp * kWarpChannels + g;
        to[0] = dd[g];
        to[kOfChannels / 2] = dbias[g];
      }
    }
    wait_at<kHelpers>(kTogether);
    if (helper < kTileChannels) {
      float of_d = 0.0F;
      float of_bias = 0.0F;
#pragma unroll
      for (int i = 0; i < kHelpers / 32; ++i) {
        of_d += of_channels[i * kTileChannels + helper];
        of_bias += of_channels[kOfChannels / 2 + i * kTileChannels + helper];
      }
      work.dd[unit * a.channels + block_channel + helper] = of_d;
      work.ddt_bias[unit * a.channels + block_channel + helper] = of_bias;
    }
  }

 private:
  using Math = ScanMath<bf16>;
  static constexpr int kTogether = 5;  // a barrier of helpers

  __device__ __forceinline__ Octets load(const Walk& walk, int tile) const {
    const int at = tile * kTileTokens + token;
    const bool exists = at < walk.tokens;
    const int64_t t = walk.first + at;
    return {load_octet(a.u.at(t, channel), exists),
            load_octet(a.dt.at(t, channel), exists, kNoStep),
            load_octet(a.z.at(t, channel), exists), load_octet(a.y.grad_at(t, channel), exists)};
  }

  __device__ __forceinline__ void fill(const Buffer& buffer, const Octets& x) const {
    float u[kWarpChannels];
    float raw[kWarpChannels];
    float z[kWarpChannels];
    float dy[kWarpChannels];
    float written[kWarpChannels];
    widen(x.u, u);
    widen(x.dt, raw);
    widen(x.z, z);
    widen(x.dout, dy);
    auto* steps = reinterpret_cast<float4*>(buffer.steps() + warp * kStepWarp + token * kStepToken);
#pragma unroll
    for (int g = 0; g < kWarpChannels; ++g) {
      const float step = Math::softplus(raw[g] + bias[g]);
      const float gate = Math::gate(z[g]);
      written[g] = step * u[g];
      dy[g] *= scan_gate(a, z[g], gate);
      steps[g] = make_float4(step, written[g], dy[g], gate);
    }
    const int place = warp * kNarrowWarp + token * 4;
    store_octet(reinterpret_cast<bf16*>(buffer.dy() + place), dy);
    store_octet(reinterpret_cast<bf16*>(buffer.written() + place), written);
  }

  /// The states before groups up to the last, from that before the tile.
  __device__ __forceinline__ void find_starts(const Buffer& buffer, int last_group,
                                              float (&h)[4]) const {
    const float* steps = place.steps(buffer);
    const float* b_rows = place.b_rows(buffer);
    float* starts = buffer.starts() + helper * 4;
    store_n<4>(starts, h);
    for (int group = 0; group < last_group; ++group) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int at = group * kGroup + j;
        float step[2];  // step, step u
        float b[4];
        load_n<2>(steps + at * kStepToken, step);
        load_n<4>(b_rows + at * kTileStates, b);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          h[n] = fmaf(fast_exp2(step[0] * place.rate[n]), h[n], step[1] * b[n]);
        }
      }
      store_n<4>(starts + (group + 1) * kScanners * 4, h);
    }
  }

  __device__ __forceinline__ void finish(const Walk& walk, int tile, int number, const Octets& x) {
    const Buffer buffer(memory, number, slots);
    const int at = tile * kTileTokens + token;
    const bool exists = at < walk.tokens;
    const int64_t t = walk.first + at;
    const OctetGradient to_u(a.u, t, channel, exists);
    const OctetGradient to_dt(a.dt, t, channel, exists);
    const OctetGradient to_z(a.z, t, channel, exists);
    RowGradients to_rows(*this, t, exists);
    wait_at(kScanned + number % 2);
    const auto* steps =
        reinterpret_cast<const float4*>(buffer.steps() + warp * kStepWarp + token * kStepToken);
    const float* sums = buffer.sums() + warp * kSumWarp + token * kSumToken;
    float y[kWarpChannels];
    float read[kWarpChannels];
    float decays[kWarpChannels];
    load_all<kWarpChannels>(sums, y);
    load_all<kWarpChannels>(sums + kSums, read);
    load_all<kWarpChannels>(sums + 2 * kSums, decays);
    float u[kWarpChannels];
    float raw[kWarpChannels];
    float z[kWarpChannels];
    float dout[kWarpChannels];
    widen(x.u, u);
    widen(x.dt, raw);
    widen(x.z, z);
    widen(x.dout, dout);
    float du[kWarpChannels];
    float ddt[kWarpChannels];
    float dz[kWarpChannels];
#pragma unroll
    for (int g = 0; g < kWarpChannels; ++g) {
      const float4 of_step = steps[g];
      const float gate = of_step.w;
      const float dy = of_step.z;
      du[g] = fmaf(of_step.x, read[g], skip[g] * dy);
      ddt[g] = fmaf(u[g], read[g], decays[g] * Math::kRateUnit) * Math::gate(raw[g] + bias[g]);
      dz[g] = dout[g] * fmaf(skip[g], u[g], y[g]) * scan_gate_slope(a, z[g], gate);
      dd[g] = fmaf(dy, u[g], dd[g]);
      dbias[g] += exists ? ddt[g] : 0.0F;  // of groups without tokens nothing was left
    }
    to_u.add(du);
    to_dt.add(ddt);
    to_z.add(dz);
    to_rows.add(buffer);
  }

  /// The gradients of B and C at a helper's token: four states of each of their rows.
  struct RowGradients {
    static constexpr bool kAhead = kRows <= 2;  // else registers do not suffice
    const Helper& of;
    int64_t t;
    bool exists;
    bf16* b;  // where B has its gradient, of the first slot; null where there is none or parts
    bf16* c;  // are kept
    uint2 old[kAhead ? 2 * kRows : 1];

    __device__ __forceinline__ RowGradients(const Helper& helper, int64_t token, bool some)
        : of(helper),
          t(token),
          exists(some),
          b(of.work.db == nullptr ? of.a.b.grad_at(t, of.b_offset) : nullptr),
          c(of.work.dc == nullptr ? of.a.c.grad_at(t, of.c_offset) : nullptr) {
      if constexpr (kAhead) {
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i) {
          old[i] = before(straight(i));
        }
      }
    }
    __device__ __forceinline__ bf16* straight(int slot) const {
      const int slot_of_c = slot - of.work.groups.b_slots;
      bf16* first = slot_of_c < 0 ? b : c;
      return exists && slot < of.slots && first != nullptr
                 ? first + (slot_of_c < 0 ? slot : slot_of_c) * kTileStates
                 : nullptr;
    }
    __device__ __forceinline__ static uint2 before(const bf16* at) {
      return at != nullptr ? *reinterpret_cast<const uint2*>(at) : make_uint2(0, 0);
    }
    __device__ __forceinline__ void add(const Buffer& buffer) const {
      const float* from = buffer.row_sums() + of.token * kRowToken + of.helper % 4 * 4;
      const int64_t row = t * of.work.groups.channel_blocks + of.block_channel / kTileChannels;
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) {
        if (i >= of.slots) {
          break;
        }
        const int slot_of_c = i - of.work.groups.b_slots;
        const bool of_b = slot_of_c < 0;
        const int warps = of_b ? of.work.groups.b_warps : of.work.groups.c_warps;
        const float* first =
            from + (of_b ? 0 : kRowSums) + (of_b ? i : slot_of_c) * warps * kRowWarp;
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < kScanWarps; ++w) {
          if (w < warps) {
            float part[4];
            load_n<4>(first + w * kRowWarp, part);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              sum[n] += part[n];
            }
          }
        }
        float* parts = of_b ? of.work.db : of.work.dc;
        if (bf16* to = straight(i); to != nullptr) {
          const uint2 from_memory = kAhead ? old[i] : before(to);
          float x[4];
          widen(from_memory.x, x[0], x[1]);
          widen(from_memory.y, x[2], x[3]);
          *reinterpret_cast<uint2*>(to) =
              make_uint2(pack(x[0] + sum[0], x[1] + sum[1]), pack(x[2] + sum[2], x[3] + sum[3]));
        } else if (exists && parts != nullptr) {
          store_n<4>(parts + row * kTileStates + of.helper % 4 * 4, sum);
        }
      }
    }
  };

  const SelectiveScan<bf16>& a;
  const TileWork& work;
  float* memory;
  unsigned block_channel;
  int slots, helper, token, warp;
  unsigned channel;
  unsigned b_offset, c_offset;  // of this helper's states in rows of B and C: of the first slots
  Place place;                  // of the scanner that it works for
  float bias[kWarpChannels];
  float skip[kWarpChannels];
  float dd[kWarpChannels] = {};
  float dbias[kWarpChannels] = {};
};

}  // namespace cambium::cuda::scan_backward
