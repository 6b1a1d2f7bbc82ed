// The scan backward of bf16 and 16 states, by tiles from the last to the first
// (selective_scan_tiles_cuda.cuh); the equations are at the head of
// selective_scan_backward_cuda.cu.
//
// The states of a tile are computed again from the kept one: by the helpers those before groups of
// 8 tokens, by the scanners, group after group, backwards, those within, in registers with their
// decays. What is left are five sums a token: over the states of a channel, for y, for sum_n
// dh B and for the gradient of the step through the decays; over channels, for the gradients of B
// and C. Done by shuffles they would cost more than all else, so tensor cores add: a lane holds
// four states of a channel, which as bf16 are a fragment of A whose rows are channels (two tokens
// at once) and one of B whose columns are. The first gives the sums over states. The second times a
// permutation of one gives the states with channels across, a fragment of A again, and its product
// with dy or step u the sums over channels. A product with the other operand zero but in the
// columns of its own tokens puts each sum in the column of its token.
//
// Bounds, on an H100 at 1.755 GHz, for 8,192 tokens of 4,096 channels: about 0.8 GB read and
// written, 0.27 ms at 3.0 TB/s; 1.75 exponentials a state and 7 operations of their unit a channel,
// 0.32 ms; by the compiler's listing a scanning warp issues about 70 instructions for each token of
// 8 channels and a helping one 45, 0.54 ms at one a clock and scheduler: the floor of this division
// of the work.
#include "ops/selective_scan/selective_scan_tiles_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int64_t kSlots = 132;  // blocks that a large GPU holds
constexpr int kGroup = 8;        // tokens
constexpr int kGroups = kTileTokens / kGroup;

// Places in a buffer, padded so that lanes meet in no bank.
// (warp, token, channel) of (step, step u, dy, gate).
constexpr int kStepToken = kWarpChannels * 4 + 4;
constexpr int kStepWarp = kTileTokens * kStepToken + 8;
constexpr int kSteps = kScanWarps * kStepWarp;
// (warp, token, channel) of dy, and of step u, as bf16.
constexpr int kNarrowWarp = kTileTokens * 4 + 8;
constexpr int kNarrow = kScanWarps * kNarrowWarp;
// (warp, token, channel) of sums over states: of C h, of dh B, of the decays.
constexpr int kSumToken = kWarpChannels + 4;
constexpr int kSumWarp = kTileTokens * kSumToken + 8;
constexpr int kSums = kScanWarps * kSumWarp;
// (warp, token, state) of sums over channels: dB, dC.
constexpr int kRowToken = kTileStates + 4;
constexpr int kRowWarp = kTileTokens * kRowToken;
constexpr int kRowSums = kScanWarps * kRowWarp;
// (group, scanner, 4 states): states before groups.
constexpr int kScanners = kTileThreads - kHelpers;
constexpr int kStarts = kGroups * kScanners * 4;
constexpr int kFixed = kSteps + 2 * kNarrow + 3 * kSums + 2 * kRowSums + kStarts;
// Beside the buffers: sums of the helping warps.
constexpr int kOfChannels = 2 * kHelpers / 32 * kTileChannels;
/// Rows of B and C as bf16 beside the widened ones.
constexpr int kNarrowSlot = kSlotWords / 2;

constexpr int buffer_words(int slots) {
  return kFixed + slots * (kSlotWords + kNarrowSlot);
}
constexpr size_t shared_bytes(int slots) {
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
      dy[g] *= z[g] * gate;
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
      dz[g] = dout[g] * fmaf(skip[g], u[g], y[g]) * (gate * fmaf(z[g], 1.0F - gate, 1.0F));
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

// --- Scanners.

/// The states of a scanner are k = 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of fragments.
class Scanner {
 public:
  __device__ __forceinline__ Scanner(const SelectiveScan<bf16>& args, const TileWork& of,
                                     float* shared, unsigned first_channel)
      : a(args),
        work(of),
        memory(shared),
        slots(of.groups.b_slots + of.groups.c_slots),
        scanner(static_cast<int>(threadIdx.x) - kHelpers),
        place(args, of.groups, first_channel, scanner) {
    // Row m is state m: one in the column of the k that holds it.
    const auto one = [](int state, int m) { return state == m ? 1.0F : 0.0F; };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int state = place.q * 4 + i / 2 * 2;
      const int m = place.g + i % 2 * 8;
      order[i] = pack(one(state, m), one(state + 1, m));
    }
  }

  __device__ __forceinline__ void span(const Walk& walk, int64_t index, int& number) {
#pragma unroll
    for (float& x : dh) {
      x = 0.0F;
    }
    if (work.carry != nullptr) {
      load_n<4>(work.carry + index * place.row_size + place.at, dh);
    }
    for (int tile = walk.tiles - 1; tile >= 0; --tile, ++number) {
      const Buffer buffer(memory, number, slots);
      const int tokens = min(walk.tokens - tile * kTileTokens, kTileTokens);
      wait_at(kFilled + number % 2);
      for (int group = (tokens - 1) / kGroup; group >= 0; --group) {
        scan_group(buffer, group);
      }
      pass(kScanned + number % 2);
    }
  }

  __device__ __forceinline__ void finish_unit(int64_t unit) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      da[n] *= place.rate[n] * Math::kRateUnit;
    }
    store_n<4>(work.da_log + unit * place.row_size + place.at, da);
  }

 private:
  using Math = ScanMath<bf16>;

  __device__ __forceinline__ void scan_group(const Buffer& buffer, int group) {
    const int first = group * kGroup;
    const int g = place.g;
    const int q = place.q;
    const float* steps = place.steps(buffer);
    const float* b_rows = place.b_rows(buffer);
    const float* c_rows = place.c_rows(buffer);
    float before[kGroup + 1][4];
    float decay[kGroup][4];
    load_n<4>(buffer.starts() + (group * kScanners + scanner) * 4, before[0]);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      float step[2];
      float b[4];
      load_n<2>(steps + (first + j) * kStepToken, step);
      load_n<4>(b_rows + (first + j) * kTileStates, b);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        decay[j][n] = fast_exp2(step[0] * place.rate[n]);
        before[j + 1][n] = fmaf(decay[j][n], before[j][n], step[1] * b[n]);
      }
    }

    // Of token `first` + g: B and C of this lane's states, dy and step u of channels 2 q, 2 q + 1.
    const auto narrow_row = [&](int slot) {
      return *reinterpret_cast<const uint2*>(buffer.narrow_rows() + slot * kNarrowSlot +
                                             (first + g) * (kTileStates / 2) + q * 2);
    };
    const uint2 b_of = narrow_row(place.b_slot);
    const uint2 c_of = narrow_row(place.c_slot);
    const int narrow = place.warp * kNarrowWarp + (first + g) * 4 + q;
    const uint32_t dy_of = __float_as_uint(buffer.dy()[narrow]);
    const uint32_t written_of = __float_as_uint(buffer.written()[narrow]);
    float y[4] = {};
    float read[4] = {};
    float decays[4] = {};
    float db[4] = {};
    float dc[4] = {};
#pragma unroll
    for (int pair = kGroup / 2 - 1; pair >= 0; --pair) {
      uint32_t states[4];     // h
      uint32_t gradients[4];  // dh
      uint32_t changes[4];    // dh decay h_{t-1} rate
#pragma unroll
      for (int k = 1; k >= 0; --k) {
        const int j = 2 * pair + k;
        float step[4];  // step, step u, dy, gate
        float c[4];
        load_n<4>(steps + (first + j) * kStepToken, step);
        load_n<4>(c_rows + (first + j) * kTileStates, c);
        float change[4];
        const float(&after)[4] = before[j + 1];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          dh[n] = fmaf(step[2], c[n], dh[n]);
        }
        states[k] = pack(after[0], after[1]);
        states[k + 2] = pack(after[2], after[3]);
        gradients[k] = pack(dh[0], dh[1]);
        gradients[k + 2] = pack(dh[2], dh[3]);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          dh[n] *= decay[j][n];
          change[n] = dh[n] * before[j][n];
          da[n] = fmaf(change[n], step[0], da[n]);
          change[n] *= place.rate[n];
        }
        changes[k] = pack(change[0], change[1]);
        changes[k + 2] = pack(change[2], change[3]);
      }
      // Rows are the channels of the first token, then of the second.
      const bool even = g == 2 * pair;
      const bool odd = g == 2 * pair + 1;
      const bool either = even || odd;
      constexpr uint32_t kOnes = 0x3f803f80U;
      mma(y, states, either ? c_of.x : 0U, either ? c_of.y : 0U);
      mma(read, gradients, either ? b_of.x : 0U, either ? b_of.y : 0U);
      mma(decays, changes, either ? kOnes : 0U, either ? kOnes : 0U);
      add_over_channels(dc, states, even ? dy_of : 0U, odd ? dy_of : 0U);
      add_over_channels(db, gradients, even ? written_of : 0U, odd ? written_of : 0U);
    }

    // A lane has token 2 q of the first and 2 q + 1 of the second rows.
    float* sums = buffer.sums() + place.warp * kSumWarp + (first + 2 * q) * kSumToken + g;
    sums[0] = y[0];
    sums[kSumToken] = y[3];
    sums[kSums] = read[0];
    sums[kSums + kSumToken] = read[3];
    sums[2 * kSums] = decays[0];
    sums[2 * kSums + kSumToken] = decays[3];
    float* rows = buffer.row_sums() + place.warp * kRowWarp + (first + 2 * q) * kRowToken + g;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = i % 2 * kRowToken + i / 2 * 8;
      rows[place] = db[i];
      rows[kRowSums + place] = dc[i];
    }
  }

  /// sums (16 states, 8 tokens) += values (states, channels) weights (channels, tokens), of two
  /// tokens: `values` as rows of channels, weights in the column of their token.
  __device__ __forceinline__ void add_over_channels(float (&sums)[4], const uint32_t (&values)[4],
                                                    uint32_t first, uint32_t second) const {
    float across[2][4];
    uint32_t turned[4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      product(across[k], order, values[k], values[k + 2]);
      turned[2 * k] = pack(across[k][0], across[k][1]);
      turned[2 * k + 1] = pack(across[k][2], across[k][3]);
    }
    mma(sums, turned, first, second);
  }

  const SelectiveScan<bf16>& a;
  const TileWork& work;
  float* memory;
  int slots, scanner;
  Place place;
  uint32_t order[4];
  float dh[4] = {};
  float da[4] = {};
};

template <int kRows>
__global__ void __launch_bounds__(kTileThreads, 1)
    scan_tiles_backward(const __grid_constant__ SelectiveScan<bf16> a,
                        const __grid_constant__ TileWork work) {
  extern __shared__ __align__(16) float memory[];
  const int64_t unit = blockIdx.x / work.groups.channel_blocks;
  const unsigned channel = blockIdx.x % work.groups.channel_blocks * kTileChannels;
  const int64_t begin = unit * work.spans.count / work.units;
  const int64_t end = (unit + 1) * work.spans.count / work.units;
  int number = 0;
  if (threadIdx.x < kHelpers) {
    Helper<kRows> helper(a, work, memory, channel);
    for (int64_t i = begin; i < end; ++i) {
      helper.span(Walk(a.segments, work.spans, i), number);
    }
    helper.finish_unit(unit);
  } else {
    Scanner scanner(a, work, memory, channel);
    for (int64_t i = begin; i < end; ++i) {
      scanner.span(Walk(a.segments, work.spans, i), i, number);
    }
    scanner.finish_unit(unit);
  }
}

/// grad (T, groups, N) += the parts of the blocks of a group, in order. A block takes a token.
__global__ void __launch_bounds__(kScanThreads)
    add_block_parts(View<bf16> to, const float* parts, int values, unsigned channel_blocks,
                    int blocks_of_group) {
  const int64_t t = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < values / 4; i += kScanThreads) {
    const int quad = i % (kTileStates / 4) * 4;
    const int64_t block = static_cast<int64_t>(i / (kTileStates / 4)) * blocks_of_group;
    const float* part = parts + (t * channel_blocks + block) * kTileStates + quad;
    bf16* grad = to.grad_at(t, static_cast<int64_t>(i) * 4);
    float old[4];
    float sum[4] = {};
    load_n<4>(grad, old);
#pragma unroll 4
    for (int b = 0; b < blocks_of_group; ++b) {
      float x[4];
      load_n<4>(part + b * kTileStates, x);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        sum[n] += x[n];
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      old[n] += sum[n];
    }
    store_n<4>(grad, old);
  }
}

}  // namespace

bool scan_backward_by_tiles(const SelectiveScan<bf16>& host, const DeviceSegments& segments,
                            const Launch& on) {
  SelectiveScan<bf16> a = host;
  a.segments = segments.walk;
  if (!fits_tiles(a) ||
      !gradients_apart<bf16>({a.u.grad, a.dt.grad, a.z.grad, a.b.grad, a.c.grad})) {
    return false;
  }
  TileWork work{};
  work.groups = tile_groups(a);
  const int slots = work.groups.b_slots + work.groups.c_slots;
  const size_t shared = shared_bytes(slots);
  if (!has_shared_memory(shared)) {
    return false;
  }
  const unsigned channel_blocks = work.groups.channel_blocks;
  const int64_t span = span_tokens(segments, channel_blocks, kSlots);
  const auto plan = scan_plan(host.segments, span, on);
  work.spans = plan->spans;
  // More units balance better; their parts of gradients take memory.
  work.units = std::min(work.spans.count, std::max<int64_t>(4 * kSlots / channel_blocks, 1));
  const int64_t row_size = a.channels * a.states;
  if (plan->cut) {
    work.carry = carry_gradients(a, work.spans, on);
  }
  const auto parts = [&](const View<bf16>& v, unsigned channels) {
    return v.grad != nullptr && channels > kTileChannels
               ? scratch<float>(on, segments.tokens * channel_blocks * kTileStates)
               : nullptr;
  };
  work.db = parts(a.b, work.groups.b_channels);
  work.dc = parts(a.c, work.groups.c_channels);
  work.da_log = scratch<float>(on, work.units * row_size);
  work.dd = scratch<float>(on, work.units * a.channels);
  work.ddt_bias = scratch<float>(on, work.units * a.channels);
  launch(on, "selective_scan_backward",
         slots <= kMaxSlots / 2 ? scan_tiles_backward<kMaxSlots / 4>
                                : scan_tiles_backward<kMaxSlots / 2>,
         static_cast<unsigned>(work.units * channel_blocks), kTileThreads, shared, a, work);
  const auto add_blocks = [&](const View<bf16>& to, const float* from, int64_t groups,
                              unsigned channels) {
    if (from != nullptr) {
      launch(on, "selective_scan_backward", add_block_parts, static_cast<unsigned>(segments.tokens),
             kScanThreads, 0, to, from, static_cast<int>(groups * kTileStates), channel_blocks,
             static_cast<int>(channels / kTileChannels));
    }
  };
  add_blocks(a.b, work.db, a.b_groups, work.groups.b_channels);
  add_blocks(a.c, work.dc, a.c_groups, work.groups.c_channels);
  add_units(a.a_log.grad, work.da_log, row_size, work.units, on);
  add_units(a.d.grad, work.dd, a.channels, work.units, on);
  add_units(a.dt_bias.grad, work.ddt_bias, a.channels, work.units, on);
  return true;
}

}  // namespace cambium::cuda
