// What the scan's CUDA kernels share. A thread has kStates states of one channel in registers,
// kLanes neighbouring threads the states of a channel. What is of a token and channel alone (the
// step, the gate) is worked out by one of them for some of kTokens tokens and handed to the others;
// sums over states come back the same way.
//
// A segment may be cut into spans, multiples of kKeptTokens, that are scanned beside each other: of
// each span what it makes of a state of zero and the sum of its steps; from these the states where
// spans meet, span after span; then all of the span from the state before it.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>

#include "ops/cuda.cuh"
#include "ops/cuda_mma.cuh"
#include "ops/selective_scan/selective_scan_kernels.h"

namespace cambium::cuda {

inline constexpr int kScanThreads = 128;
/// Forward keeps the states before every so many tokens.
inline constexpr int64_t kKeptTokens = 32;
/// Up to so many, segments are too short for tiles of kKeptTokens.
inline constexpr int64_t kFewTokens = 8;
inline constexpr unsigned kAllLanes = 0xffffffffU;

// --- Spans.

/// Lengths of segments that have forms of their own where a segment's form must not depend on the
/// others: bits.
inline constexpr unsigned kOneToken = 1;
inline constexpr unsigned kFew = 2;  // up to kFewTokens, or none
inline constexpr unsigned kMany = 4;
inline constexpr unsigned kAnyLength = kOneToken | kFew | kMany;
__host__ __device__ constexpr unsigned length_kind(int64_t length) {
  return length == 1 ? kOneToken : length <= kFewTokens ? kFew : kMany;
}

/// Spans as kernels take them. Without arrays every segment is one.
struct ScanSpans {
  int64_t count = 0;
  int64_t tokens = 0;                   // of a span that is not the last of its segment
  const int32_t* segment = nullptr;     // (count)
  const int32_t* begin = nullptr;       // (count): the first token, counted in the segment
  const int32_t* first_span = nullptr;  // (segments + 1)
  const int32_t* first_kept = nullptr;  // (segments): its first kept state
  unsigned lengths = kAnyLength;        // of the segments that are taken
};

/// One of them.
struct ScanSpan {
  int64_t segment, begin, end;
  bool last;
  bool taken;

  __device__ __forceinline__ ScanSpan(const SegmentWalk& walk, const ScanSpans& spans, int64_t i) {
    segment = spans.segment == nullptr ? i : spans.segment[i];
    begin = spans.segment == nullptr ? 0 : spans.begin[i];
    end = walk.length(segment);
    taken = (spans.lengths & length_kind(end)) != 0;
    last = spans.segment == nullptr || end - begin <= spans.tokens;
    end = last ? end : begin + spans.tokens;
  }
};

struct ScanPlan {
  struct Key {
    int64_t tokens;
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray memory;
  ScanSpans spans;
  bool cut = false;  // whether a segment has more than one
};
/// Spans of `tokens` tokens; `segments` is of the host.
std::shared_ptr<const ScanPlan> scan_plan(const SegmentWalk& segments, int64_t tokens,
                                          const Launch& on);

/// No cuts: longer than any segment.
inline constexpr int64_t kWholeSegments = int64_t{1} << 40;
/// How many tokens a span takes where a span occupies `warps` warps and the GPU has `slots` for
/// them. Cutting repeats part of the work: not where a third of the slots is taken without.
int64_t span_tokens(const DeviceSegments& segments, int64_t warps, int64_t slots);

/// Adds up: state before span i + 1 = exp(A sum of steps) state before i + local[i]. `carry`
/// (spans, d, N) has the local states and gets those before the spans. `initial`: the states before
/// the segments count; else zero. Backward: of gradients, from the last span to the first.
template <class T>
void carry_over_spans(const SelectiveScan<T>& a, const ScanSpans& spans, float* carry,
                      const float* step_sums, bool backward, const Launch& on);

/// The step of one token each for many sequences, where it has a kernel of its own: returns whether
/// it was launched. `a` has segments of the device. Batch-invariant it leaves out segments of other
/// lengths; else it is not for calls that have some.
bool scan_decode(const SelectiveScan<float>& a, const DeviceSegments& segments, const Launch& on);
bool scan_decode(const SelectiveScan<bf16>& a, const DeviceSegments& segments, const Launch& on);
/// The scan of bf16 and 16 states by tiles, where the inputs fit it: returns whether it was
/// launched. `a` has segments of the host, of which those of `lengths` are taken.
bool scan_by_tiles(const SelectiveScan<bf16>& a, const DeviceSegments& segments, unsigned lengths,
                   const Launch& on);

/// The same backward.
bool scan_backward_by_tiles(const SelectiveScan<bf16>& a, const DeviceSegments& segments,
                            const Launch& on);
/// Backward: (spans, d, N), the gradients of the states after the spans, in scratch memory.
const float* carry_gradients(const SelectiveScan<bf16>& a, const ScanSpans& spans,
                             const Launch& on);
/// grad (size) += the parts of all units, in order; nothing where grad is null.
void add_units(float* grad, const float* parts, int64_t size, int64_t units, const Launch& on);
/// Whether those that are there are different.
template <class T>
bool gradients_apart(std::initializer_list<const T*> pointers) {
  for (const T* const* p = pointers.begin(); p != pointers.end(); ++p) {
    if (*p != nullptr && std::count(p, pointers.end(), *p) > 1) {
      return false;
    }
  }
  return true;
}

// --- Arithmetic: for bf16 by the hardware's approximations, whose errors are far below bf16's.

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
struct ScanMath {
  static constexpr float kRateUnit = 1.0F;
  __device__ __forceinline__ static float rate(float a_log) { return -expf(a_log); }
  __device__ __forceinline__ static float decay(float x) { return expf(x); }
  __device__ __forceinline__ static float gate(float x) { return sigmoid(x); }
  __device__ __forceinline__ static float softplus(float x) {
    return x > 20.0F ? x : log1pf(expf(x));
  }
};
template <>
struct ScanMath<bf16> {
  static constexpr float kRateUnit = 0.693147180559945309F;  // rates are of powers of two
  __device__ __forceinline__ static float rate(float a_log) {
    return -1.44269504088896341F * expf(a_log);
  }
  __device__ __forceinline__ static float decay(float x) { return fast_exp2(x); }
  __device__ __forceinline__ static float gate(float x) {
    return fast_reciprocal(1.0F + fast_exp2(-1.44269504088896341F * x));
  }
  __device__ __forceinline__ static float softplus(float x) {
    const float e = fast_exp2(1.44269504088896341F * x);
    const float series = e * fmaf(e, fmaf(e, 0.333333333F, -0.5F), 1.0F);
    const float whole = kRateUnit * fast_log2(1.0F + e);
    return x > 20.0F ? x : e < 0.015625F ? series : whole;
  }
};

/// The gate act(z) of a scan and its slope, where s is sigmoid(z).
template <class T>
__device__ __forceinline__ float scan_gate(const SelectiveScan<T>& a, float z, float s) {
  return a.sigmoid ? s : z * s;
}
template <class T>
__device__ __forceinline__ float scan_gate_slope(const SelectiveScan<T>& a, float z, float s) {
  return s * (a.sigmoid ? 1.0F - s : fmaf(z, 1.0F - s, 1.0F));
}

// --- Rows of states, kStates of N from `first` on; kFull: there are as many, in 16-byte steps.

template <int kStates, bool kFull, class T>
__device__ __forceinline__ void load_states(const T* row, int64_t first, int64_t n,
                                            float (&out)[kStates]) {
  if constexpr (kFull) {
    constexpr int kWidth =
        static_cast<int>(16 / sizeof(T)) < kStates ? static_cast<int>(16 / sizeof(T)) : kStates;
#pragma unroll
    for (int i = 0; i < kStates; i += kWidth) {
      float pack[kWidth];
      load_n<kWidth>(row + first + i, pack);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        out[i + j] = pack[j];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      out[i] = first + i < n ? load(row + first + i) : 0.0F;
    }
  }
}
template <int kStates, bool kFull>
__device__ __forceinline__ void store_states(float* row, int64_t first, int64_t n,
                                             const float (&in)[kStates]) {
#pragma unroll
  for (int i = 0; i < kStates; i += kFull ? 4 : 1) {
    if constexpr (kFull) {
      *reinterpret_cast<float4*>(row + first + i) =
          make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]);
    } else if (first + i < n) {
      row[first + i] = in[i];
    }
  }
}
/// The rates of a channel's states; zero for those that are not.
template <int kStates, bool kFull, class T>
__device__ __forceinline__ void load_rates(const SelectiveScan<T>& a, int64_t channel,
                                           int64_t first, float (&rate)[kStates]) {
  load_states<kStates, kFull>(a.a_log.data + channel * a.states, first, a.states, rate);
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    rate[i] = first + i < a.states ? ScanMath<T>::rate(rate[i]) : 0.0F;
  }
}

// --- Between threads.

/// The sums of kValues values over kCount lanes that lie kStride apart, dealt to the lanes: lane q
/// gets those from q * kValues / kCount on, in the first places.
template <int kCount, int kStride, int kValues>
__device__ __forceinline__ void sum_and_deal(float (&v)[kValues], int q) {
  int held = kValues;
#pragma unroll
  for (int bit = kCount / 2; bit > 0; bit /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = (q & bit) != 0;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        if (i < held) {
          const float give = upper ? v[i] : v[i + held];
          const float keep = upper ? v[i + held] : v[i];
          v[i] = keep + __shfl_xor_sync(kAllLanes, give, bit * kStride);
        }
      }
    } else {
      v[0] += __shfl_xor_sync(kAllLanes, v[0], bit * kStride);
    }
  }
}

/// How kTokens tokens are dealt to the kLanes lanes of a channel.
template <int kTokens, int kLanes>
struct Deal {
  static constexpr int kOwn = kTokens > kLanes ? kTokens / kLanes : 1;   // tokens of a lane
  static constexpr int kSame = kLanes > kTokens ? kLanes / kTokens : 1;  // lanes of a token
  __device__ __forceinline__ static int first(int lane) { return lane / kSame * kOwn; }
  __device__ __forceinline__ static bool leads(int lane) { return lane % kSame == 0; }
  /// What the lane of token j found.
  __device__ __forceinline__ static float of(const float (&x)[kOwn], int j) {
    if constexpr (kLanes == 1 || kTokens == 1) {
      return x[j];
    } else {
      return __shfl_sync(kAllLanes, x[j % kOwn], j / kOwn * kSame, kLanes);
    }
  }
};

}  // namespace cambium::cuda
