// Rotary position embedding. A thread turns kVec pairs of a head: 16 bytes of its first half and 16
// of its second, or copies 16 bytes of what is not turned. The cosines and sines of a token come
// from memory once and from the cache for its other heads.
#include <algorithm>

#include "ops/rope/rope_kernels.h"
#include "ops/rope/rope_turn.cuh"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;
/// Pieces of a head, from which on a thread takes several heads.
constexpr int64_t kManyUnits = int64_t{1} << 18;

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

/// Units of the first tensor, then those of the second: of kHeads heads of a token the same kVec
/// pairs, whose cosines and sines are loaded once, or what is copied.
template <int kVec, int kHeads, bool kBackward, class T>
__global__ void __launch_bounds__(kThreads) turn(const Ropes<T> all, int64_t first, int64_t count) {
  using Vector = Packed<kVec, T>;
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= count) {
    return;
  }
  const Rope<T>& a = unit < first ? all.each[0] : all.each[1];
  unit -= unit < first ? 0 : first;
  // The units of a head: its pairs, then what is copied.
  const int64_t units = (a.x.channels - a.half) / kVec;
  const int64_t heads = a.x.rows.inner;
  const int64_t groups = ceil_div(heads, kHeads);
  const int64_t c = unit % units * kVec;
  const int64_t head = unit / units % groups * kHeads;
  const int64_t token = unit / units / groups;
  const bool turns = c < a.half;
  // What the host worked out is in its memory, which is far: it is on its way before x is there.
  float cos[kVec];
  float sin[kVec];
  if (turns) {
    load_angles(a.cos + token * a.half + c, cos);
    load_angles(a.sin + token * a.half + c, sin);
  }
  const float scale = a.scale == nullptr ? 1.0F : a.scale[token];
  await_inputs();
  const auto in = [&](int h) {
    return (kBackward ? a.y.grad_row(token, head + h) : a.x.row(token, head + h)) + c;
  };
  const auto out = [&](int h) {
    return (kBackward ? a.x.grad_row(token, head + h) : a.y.row(token, head + h)) + c;
  };
  Vector x1[kHeads];
  Vector x2[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (head + h < heads) {
      x2[h] = *reinterpret_cast<const Vector*>(in(h) + a.half);
      if (turns) {
        x1[h] = *reinterpret_cast<const Vector*>(in(h));
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (head + h >= heads) {
      break;
    }
    // What the result is added to.
    float y1[kVec] = {};
    float y2[kVec] = {};
    if (kBackward && !a.set) {
      load_n<kVec>(out(h) + a.half, y2);
      if (turns) {
        load_n<kVec>(out(h), y1);
      }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float second = load(&x2[h].value[i]);
      if (turns) {
        float one = load(&x1[h].value[i]);
        turn_pair(cos[i], kBackward ? -sin[i] : sin[i], one, second);
        y1[i] += one * scale;
      }
      y2[i] += second * scale;
    }
    if (turns) {
      store_n<kVec>(out(h), y1);
    }
    store_n<kVec>(out(h) + a.half, y2);
  }
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
    store(out + c, kBackward && !a.set ? load(out + c) + value * scale : value * scale);
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
  // Few tokens are spread over as many threads as there are pieces.
  constexpr int kHeads = 4;
  const Rope<T>& widest = all.each[0];
  const bool many = vectors && widest.x.count() * widest.half / kVec >= kManyUnits;
  int64_t units[2] = {};
  for (int64_t i = 0; i < wanted.count; ++i) {
    const Rope<T>& a = wanted.each[i];
    const int64_t heads = a.x.rows.inner;
    units[i] = a.x.count() / std::max<int64_t>(heads, 1) *
               (many ? ceil_div(heads, kHeads) : heads) *
               ((a.x.channels - a.half) / (vectors ? kVec : 1));
  }
  const int64_t count = units[0] + units[1];
  launch_ahead(on, kBackward ? "rope's gradient" : "rope",
               neighbours ? turn_neighbours<kBackward, T>
               : many     ? turn<kVec, kHeads, kBackward, T>
               : vectors  ? turn<kVec, 1, kBackward, T>
                          : turn<1, 1, kBackward, T>,
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
