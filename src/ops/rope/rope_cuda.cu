// Rotary position embedding. A thread turns kVec pairs of a head: 16 bytes of its first half and 16
// of its second, or copies 16 bytes of what is not turned. The cosines and sines of a token come
// from memory once and from the cache for its other heads.
#include "ops/rope/rope_kernels.h"
#include "ops/rope/rope_turn.cuh"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;

template <int kVec>
__device__ __forceinline__ void load_angles(const float* p, float (&out)[kVec]) {
  constexpr int kStep = kVec < 4 ? kVec : 4;
#pragma unroll
  for (int i = 0; i < kVec; i += kStep) {
    float part[kStep];
    load_n<kStep>(p + i, part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      out[i + j] = part[j];
    }
  }
}

/// Units of the first tensor, then those of the second.
template <int kVec, bool kBackward, class T>
__global__ void __launch_bounds__(kThreads) turn(const Ropes<T> all, int64_t first, int64_t count) {
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= count) {
    return;
  }
  const Rope<T>& a = unit < first ? all.each[0] : all.each[1];
  unit -= unit < first ? 0 : first;
  // The units of a head: its pairs, then what is copied.
  const int64_t units = (a.x.channels - a.half) / kVec;
  const int64_t row = unit / units;
  const int64_t c = unit % units * kVec;
  const bool turns = c < a.half;
  // What the host worked out is in its memory, which is far: it is on its way before x is there.
  float cos[kVec];
  float sin[kVec];
  if (turns) {
    const int64_t angle = row / a.x.rows.inner * a.half + c;
    load_angles(a.cos + angle, cos);
    load_angles(a.sin + angle, sin);
  }
  const float scale = a.scale == nullptr ? 1.0F : a.scale[row / a.x.rows.inner];
  await_inputs();
  const T* in = kBackward ? a.y.grad_row(row) : a.x.row(row);
  T* out = kBackward ? a.x.grad_row(row) : a.y.row(row);
  // What the result is added to.
  float y1[kVec] = {};
  float y2[kVec] = {};
  float x1[kVec];
  float x2[kVec];
  load_n<kVec>(in + a.half + c, x2);
  if constexpr (kBackward) {
    load_n<kVec>(out + a.half + c, y2);
  }
  if (!turns) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      y2[i] = fmaf(x2[i], scale, y2[i]);
    }
    store_n<kVec>(out + a.half + c, y2);
    return;
  }
  load_n<kVec>(in + c, x1);
  if constexpr (kBackward) {
    load_n<kVec>(out + c, y1);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    turn_pair(cos[i], kBackward ? -sin[i] : sin[i], x1[i], x2[i]);
    y1[i] += x1[i] * scale;
    y2[i] += x2[i] * scale;
  }
  store_n<kVec>(out + c, y1);
  store_n<kVec>(out + a.half + c, y2);
}

/// A thread for each interleaved pair of a head and for each number that is copied.
template <bool kBackward, class T>
__global__ void __launch_bounds__(kThreads)
    turn_neighbours(const Ropes<T> all, int64_t first, int64_t count) {
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  await_inputs();
  if (unit >= count) {
    return;
  }
  const Rope<T>& a = unit < first ? all.each[0] : all.each[1];
  unit -= unit < first ? 0 : first;
  const int64_t units = a.x.channels - a.half;
  const int64_t row = unit / units;
  const int64_t i = unit % units;
  const int64_t token = row / a.x.rows.inner;
  const T* in = kBackward ? a.y.grad_row(row) : a.x.row(row);
  T* out = kBackward ? a.x.grad_row(row) : a.y.row(row);
  const float scale = a.scale == nullptr ? 1.0F : a.scale[token];
  const auto put = [&](int64_t c, float value) {
    store(out + c, kBackward ? load(out + c) + value * scale : value * scale);
  };
  if (i >= a.half) {
    put(i + a.half, load(in + i + a.half));
    return;
  }
  const float cos = a.cos[token * a.half + i];
  const float sin = kBackward ? -a.sin[token * a.half + i] : a.sin[token * a.half + i];
  const float x1 = load(in + 2 * i);
  const float x2 = load(in + 2 * i + 1);
  put(2 * i, x1 * cos - x2 * sin);
  put(2 * i + 1, x2 * cos + x1 * sin);
}

template <bool kBackward, class T>
void run_rope(const Ropes<T>& all, const Launch& on) {
  constexpr int kVec = 16 / sizeof(T);
  const bool neighbours = all.each[0].interleaved;
  bool vectors = !neighbours;
  Ropes<T> wanted;
  for (int64_t i = 0; i < all.count; ++i) {
    const Rope<T>& a = all.each[i];
    vectors = vectors && aligned(a.x, kVec) && aligned(a.y, kVec) && a.half % kVec == 0 &&
              aligned(a.cos) && aligned(a.sin);
    if (!kBackward || a.x.grad != nullptr) {
      wanted.each[wanted.count++] = a;
    }
  }
  int64_t units[2] = {};
  for (int64_t i = 0; i < wanted.count; ++i) {
    const Rope<T>& a = wanted.each[i];
    units[i] = a.x.count() * ((a.x.channels - a.half) / (vectors ? kVec : 1));
  }
  const int64_t count = units[0] + units[1];
  launch_ahead(on, kBackward ? "rope's gradient" : "rope",
               neighbours ? turn_neighbours<kBackward, T>
               : vectors  ? turn<kVec, kBackward, T>
                          : turn<1, kBackward, T>,
               static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, wanted, units[0],
               count);
}

}  // namespace

void rope_forward(const Ropes<float>& a, const Launch& on) {
  run_rope<false>(a, on);
}
void rope_forward(const Ropes<bf16>& a, const Launch& on) {
  run_rope<false>(a, on);
}
void rope_backward(const Ropes<float>& a, const Launch& on) {
  run_rope<true>(a, on);
}
void rope_backward(const Ropes<bf16>& a, const Launch& on) {
  run_rope<true>(a, on);
}

}  // namespace cambium::cuda
