// Queries and keys turn, keys and values go to their pages. A thread turns kVec pairs of a head, as
// in rope_cuda.cu, or copies kVec numbers of what does not turn. Angles, which are in the host's
// memory, and places in the pages are known before the numbers are there.
#include "ops/attention/attention_cuda.cuh"
#include "ops/rope/rope_turn.cuh"
#include "ops/turned_write/turned_write_kernels.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 128;

/// K: of the pages.
template <class T, class K>
struct TurnArgs {
  const int64_t* targets;  // (T): of the tokens
  View<T> q, turned_q, k, v;
  View<K> keys, values;
  const float* cos;    // (T, half)
  const float* sin;    // (T, half)
  const float* scale;  // (T) of queries, or null
  int half;
  int units;  // of a head of q or k: its pairs, then what is copied
  int q_units, k_units, count;
};

template <int kVec, class T, class K>
__global__ void __launch_bounds__(kThreads) turn_and_write(const TurnArgs<T, K> a) {
  int unit = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (unit >= a.count) {
    return;
  }
  const bool of_q = unit < a.q_units;
  const bool of_v = unit >= a.k_units;
  unit -= of_q ? 0 : of_v ? a.k_units : a.q_units;
  const View<T>& from = of_q ? a.q : of_v ? a.v : a.k;
  const int units = of_v ? static_cast<int>(from.channels) / kVec : a.units;
  const auto heads = static_cast<int>(from.rows.inner);
  const int c = unit % units * kVec;
  const int head = unit / units % heads;
  const int token = unit / units / heads;
  const bool turns = !of_v && c < a.half;
  float cos[kVec];
  float sin[kVec];
  if (turns) {
    load_all<kVec>(a.cos + token * a.half + c, cos);
    load_all<kVec>(a.sin + token * a.half + c, sin);
  }
  const float scale = of_q && a.scale != nullptr ? a.scale[token] : 1.0F;
  const int64_t target = of_q ? 0 : a.targets[token];
  await_inputs();
  const T* in = from.row(token, head);
  const auto put = [&](int at, const float(&x)[kVec]) {
    if (of_q) {
      store_n<kVec>(a.turned_q.row(token, head) + at, x);
    } else {
      store_n<kVec>((of_v ? a.values : a.keys).row(target, head) + at, x);
    }
  };
  const int second = of_v ? c : a.half + c;
  float x2[kVec];
  load_n<kVec>(in + second, x2);
  if (!turns) {
#pragma unroll
    for (float& x : x2) {
      x *= scale;
    }
    put(second, x2);
    return;
  }
  float x1[kVec];
  load_n<kVec>(in + c, x1);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    turn_pair(cos[i], sin[i], x1[i], x2[i]);
    x1[i] *= scale;
    x2[i] *= scale;
  }
  put(c, x1);
  put(second, x2);
}

template <class T, class K>
void write(const TurnedWrite<T>& a, const View<K>& keys, const View<K>& values, const Launch& on) {
  const attention::TokenRows rows = attention::token_rows(a.write.shape, on);
  const View<T>& v = a.write.each[1].rows;
  const auto run = [&]<int kVec>() {
    const auto units = static_cast<int>((a.q.x.channels - a.q.half) / kVec);
    const auto q_units = static_cast<int>(a.q.x.count()) * units;
    const int k_units = q_units + static_cast<int>(a.k.x.count()) * units;
    const int count = k_units + static_cast<int>(v.count() * (v.channels / kVec));
    launch_ahead(
        on, "turned_write", turn_and_write<kVec, T, K>,
        static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0,
        TurnArgs<T, K>{rows.rows, a.q.x, a.q.y, a.k.x, v, keys, values, a.q.cos, a.q.sin, a.q.scale,
                       static_cast<int>(a.q.half), units, q_units, k_units, count});
  };
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  if (aligned(a.q.x, kWide) && aligned(a.q.y, kWide) && aligned(a.k.x, kWide) &&
      aligned(v, kWide) && aligned(keys, kWide) && aligned(values, kWide) &&
      a.q.half % kWide == 0 && aligned(a.q.cos) && aligned(a.q.sin)) {
    run.template operator()<kWide>();
  } else {
    run.template operator()<1>();
  }
}

template <class T>
void run_turned_write(const TurnedWrite<T>& a, const Launch& on) {
  const auto& [keys, values] = a.write.each;
  if (a.write.shape.segments == 0) {
    return;
  }
  if (keys.narrow.defined()) {
    write<T, bf16>(a, keys.narrow, values.narrow, on);
  } else {
    write<T, T>(a, keys.pages, values.pages, on);
  }
}

}  // namespace

void turned_write_forward(const TurnedWrite<float>& a, const Launch& on) {
  run_turned_write(a, on);
}
void turned_write_forward(const TurnedWrite<bf16>& a, const Launch& on) {
  run_turned_write(a, on);
}

}  // namespace cambium::cuda
