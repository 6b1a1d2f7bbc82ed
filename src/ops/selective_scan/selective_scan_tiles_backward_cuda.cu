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
#include "ops/selective_scan/selective_scan_tiles_backward_cuda.cuh"

namespace cambium::cuda {
namespace scan_backward {
namespace {

constexpr int64_t kSlots = 132;  // blocks that a large GPU holds

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

bool run(const SelectiveScan<bf16>& host, const DeviceSegments& segments, const Launch& on) {
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
  if (shared > most_shared()) {
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

}  // namespace
}  // namespace scan_backward

bool scan_backward_by_tiles(const SelectiveScan<bf16>& a, const DeviceSegments& segments,
                            const Launch& on) {
  return scan_backward::run(a, segments, on);
}

}  // namespace cambium::cuda
