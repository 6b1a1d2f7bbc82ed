// Kernels of the short convolution for numbers of taps that have registers: a thread takes a few
// neighbouring channels (four forward where memory allows, two backward, where a channel takes more
// registers) and a run of tokens, and keeps the taps and the last K - 1 inputs in registers: each
// input is read once, but for the K - 1 tokens where runs meet. Threads of a block lie along the
// channels.
#pragma once

#include "ops/conv/conv_kernels.h"
#include "ops/cuda.cuh"
#include "ops/cuda_mma.cuh"

namespace cambium::cuda::conv {

inline constexpr int kThreads = 128;
inline constexpr int kBatch = 4;  // tokens whose loads are in flight together
inline constexpr int64_t kFewTokens = 8;
inline constexpr int64_t kLeastRun = 16;
inline constexpr int64_t kMostRun = 32;
// Backward: threads of a block along channels and along runs of tokens.
inline constexpr int kColumns = 32;
inline constexpr int kRuns = 8;

/// Where segment s lies, and a walk to the next that has tokens.
struct Place {
  int64_t s, begin, end;

  __device__ Place(const SegmentWalk& walk, int64_t segment)
      : s(segment), begin(walk.begin(segment)), end(begin + walk.length(segment)) {}
  __device__ void advance(const SegmentWalk& walk) {
    do {
      ++s;
      begin = end;
      end = begin + walk.length(s);
    } while (begin == end);
  }
};

/// Floats of an access to N in a row that belong to V channels.
constexpr int float_pack(int channels, int n) {
  return channels == 1 ? 1 : n % 4 == 0 ? 4 : 2;
}
template <int V, int N>
__device__ __forceinline__ void load_floats(const float* p, float (&out)[N]) {
  constexpr int kPack = float_pack(V, N);
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    float pack[kPack];
    load_n<kPack>(p + i, pack);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      out[i + j] = pack[j];
    }
  }
}
template <int V, int N>
__device__ __forceinline__ void store_floats(float* p, const float (&in)[N]) {
  constexpr int kPack = float_pack(V, N);
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    float pack[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      pack[j] = in[i + j];
    }
    store_n<kPack>(p + i, pack);
  }
}

/// As store_n. Four are one access for certain: in a long loop the compiler makes four of store_n.
template <class T, int V>
__device__ __forceinline__ void store_channels(T* p, const float (&in)[V]) {
  if constexpr (V == 4 && sizeof(T) == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(pack(in[0], in[1])), "r"(pack(in[2], in[3]))
                 : "memory");
  } else if constexpr (V == 4) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "f"(in[0]), "f"(in[1]), "f"(in[2]), "f"(in[3])
                 : "memory");
  } else {
    store_n<V>(p, in);
  }
}

/// The weight and the bias of V channels.
template <int V, int kTaps>
struct Taps {
  float weight[kTaps][V];
  float bias[V];

  template <class T>
  __device__ __forceinline__ Taps(const ShortConv<T>& a, int64_t c) {
    float rows[V * kTaps];
    load_floats<V>(a.weight.data + c * kTaps, rows);
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        weight[j][v] = rows[v * kTaps + j];
      }
      bias[v] = a.bias.defined() ? a.bias.data[c + v] : 0.0F;
    }
  }
};

/// The inputs before a token, oldest first.
template <int V, int kTaps>
struct Past {
  float value[kTaps - 1][V];

  /// Those before token t of segment `place`; row `row` of `state` has those before the segment.
  template <class T>
  __device__ __forceinline__ void load(const ShortConv<T>& a, const float* state, int64_t row,
                                       const Place& place, int64_t t, int64_t c) {
    constexpr int kBack = kTaps - 1;
    const int64_t i = t - place.begin;
    if (i < kBack && a.segments.continues(place.s)) {
      float rows[V * kBack];
      load_floats<V>(state + (row * a.channels() + c) * kBack, rows);
#pragma unroll
      for (int j = 0; j < kBack; ++j) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          // Column j + i without an index that only the running program knows.
          float x = 0.0F;
#pragma unroll
          for (int column = 0; column < kBack; ++column) {
            x = column == j + i ? rows[v * kBack + column] : x;
          }
          value[j][v] = x;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kBack; ++j) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          value[j][v] = 0.0F;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kBack; ++j) {
      if (kBack - j <= i) {
        load_n<V>(a.x.at(t - (kBack - j), c), value[j]);
      }
    }
  }
  __device__ __forceinline__ void push(const float (&x)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int j = 0; j + 2 < kTaps; ++j) {
        value[j][v] = value[j + 1][v];
      }
      value[kTaps - 2][v] = x[v];
    }
  }
  /// As rows of a state.
  __device__ __forceinline__ void turn(float (&rows)[V * (kTaps - 1)]) const {
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        rows[v * (kTaps - 1) + j] = value[j][v];
      }
    }
  }
  /// Before the activation, with x the input of the token.
  __device__ __forceinline__ float sum(const Taps<V, kTaps>& taps, const float (&x)[V],
                                       int v) const {
    float sum = taps.bias[v];
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
      sum = fmaf(taps.weight[j][v], value[j][v], sum);
    }
    return fmaf(taps.weight[kTaps - 1][v], x[v], sum);
  }
};

template <class T, int V, int kTaps>
__device__ __forceinline__ void convolve(const ShortConv<T>& a, const Taps<V, kTaps>& taps,
                                         Past<V, kTaps>& past, const float (&x)[V], int64_t t,
                                         int64_t c) {
  // Without a branch, in which elements would wait for each other and be stored one by one: what a
  // sum is multiplied by is its sigmoid, or one, as no sigmoid is more.
  const float least = a.silu ? 0.0F : 1.0F;
  float y[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float sum = past.sum(taps, x, v);
    y[v] = sum * fmaxf(sigmoid_of<T>(sum), least);
  }
  store_channels(a.y.at(t, c), y);
  past.push(x);
}

/// A segment a thread; those of more than `most` tokens are left out.
template <class T, int V, int kTaps>
__global__ void __launch_bounds__(kThreads)
    few_tokens_forward(ShortConv<T> a, int64_t columns, int64_t most) {
  constexpr int kBack = kTaps - 1;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  await_inputs();
  const Place place(a.segments, min(index / columns, a.segments.count - 1));
  if (index / columns >= a.segments.count || place.begin == place.end ||
      place.end - place.begin > most) {
    return;
  }
  const int64_t c = index % columns * V;
  const int64_t row = a.segments.row(place.s);
  float x[V];
  load_n<V>(a.x.at(place.begin, c), x);
  const Taps<V, kTaps> taps(a, c);
  Past<V, kTaps> past;
  past.load(a, a.state, row, place, place.begin, c);
  float rows[V * kBack];
  if (a.kept != nullptr && a.segments.continues(place.s)) {
    past.turn(rows);
    store_floats<V>(static_cast<float*>(a.kept) + (place.s * a.channels() + c) * kBack, rows);
  }
  for (int64_t t = place.begin; t < place.end; ++t) {
    if (t > place.begin) {
      load_n<V>(a.x.at(t, c), x);
    }
    convolve(a, taps, past, x, t, c);
  }
  if (a.state != nullptr) {
    past.turn(rows);
    store_floats<V>(a.state + (row * a.channels() + c) * kBack, rows);
  }
}

/// A run of `run` tokens a thread; those of segments of fewer than `least` tokens are left out. The
/// inputs of kBatch tokens are on their way while those before are convolved. With `leaves`, which
/// no segment that continues allows, as its state may still be read, the run that ends a segment
/// leaves its state.
template <class T, int V, int kTaps>
__global__ void __launch_bounds__(kThreads, 6)
    runs_forward(ShortConv<T> a, const int32_t* segment, int64_t channel_blocks, int64_t run,
                 int64_t least, bool leaves) {
  constexpr int kBack = kTaps - 1;
  const int64_t c = (blockIdx.x % channel_blocks * kThreads + threadIdx.x) * V;
  if (c >= a.channels()) {
    return;
  }
  const int64_t begin = blockIdx.x / channel_blocks * run;
  const int64_t end = min(begin + run, a.x.count());
  Packed<V, T> next[kBatch];
  const auto fetch = [&](int64_t t, int64_t stop) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (t + j < stop) {
        next[j] = *reinterpret_cast<const Packed<V, T>*>(a.x.at(t + j, c));
      }
    }
  };
  fetch(begin, end);
  const Taps<V, kTaps> taps(a, c);
  Place place(a.segments, segment[begin]);
  for (int64_t t = begin; t < end;) {
    if (t == place.end) {
      place.advance(a.segments);
    }
    const int64_t stop = min(end, place.end);  // of what the segment has of the run
    if (place.end - place.begin < least) {
      t = stop;
      fetch(t, end);
      continue;
    }
    Past<V, kTaps> past;
    past.load(a, a.state, a.segments.row(place.s), place, t, c);
    while (t < stop) {
      Packed<V, T> here[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        here[j] = next[j];
      }
      const int64_t first = t;
      t = min(t + kBatch, stop);
      fetch(t, end);
      const auto take = [&](int j) {
        float x[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          x[v] = load(&here[j].value[v]);
        }
        convolve(a, taps, past, x, first + j, c);
      };
      if (t == first + kBatch) {  // without a branch between tokens
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          take(j);
        }
      } else {
#pragma unroll
        for (int j = 0; j + 1 < kBatch; ++j) {
          if (first + j < t) {
            take(j);
          }
        }
      }
    }
    if (leaves && stop == place.end) {
      float rows[V * kBack];
      past.turn(rows);
      store_floats<V>(a.state + (a.segments.row(place.s) * a.channels() + c) * kBack, rows);
    }
  }
}

/// Runs of `run` tokens; a block sums the gradients of the weight and the bias over its runs into
/// part (token blocks, taps + 1, channels), the bias last.
template <class T, int V, int kTaps>
__global__ void __launch_bounds__(kColumns* kRuns, 2)
    runs_backward(ShortConv<T> a, const int32_t* segment, int64_t channel_blocks, int64_t run,
                  float* part) {
  constexpr int kBack = kTaps - 1;
  const int64_t token_block = blockIdx.x / channel_blocks;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int group = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t first = blockIdx.x % channel_blocks * kColumns * V;
  const int64_t c = first + column * V;
  const int64_t tokens = a.x.count();
  const int64_t begin = (token_block * kRuns + group) * run;
  float dweight[kTaps][V] = {};
  float dbias[V] = {};
  if (c < a.channels() && begin < tokens) {
    const auto* initial = static_cast<const float*>(a.kept);
    const int64_t end = min(begin + run, tokens);
    const int64_t stop = min(end + kBack, tokens);  // later tokens read the last inputs too
    Place place(a.segments, segment[begin]);
    const Taps<V, kTaps> taps(a, c);
    Past<V, kTaps> past;
    past.load(a, initial, place.s, place, begin, c);
    float dx[kTaps][V] = {};  // of the inputs `kBack - j` tokens before the current
    bool live = true;
    for (int64_t t = begin; t < end + kBack; t += kBatch) {
      float x[kBatch][V];
      float dy[kBatch][V];
      float grad[kBatch][V];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (t + j < stop) {
          load_n<V>(a.x.at(t + j, c), x[j]);
          load_n<V>(a.y.grad_at(t + j, c), dy[j]);
        }
        const int64_t input = t + j - kBack;
        if (a.x.grad != nullptr && input >= begin && input < end) {
          load_n<V>(a.x.grad_at(input, c), grad[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        live = live && t + j < stop;
        if (live && t + j == place.end) {
          live = t + j < end;
          if (live) {
            place.advance(a.segments);
            past.load(a, initial, place.s, place, t + j, c);
          }
        }
        if (live) {
          const int64_t i = t + j - place.begin;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float d = a.silu ? dy[j][v] * silu_grad_of<T>(past.sum(taps, x[j], v)) : dy[j][v];
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
              dx[tap][v] = kBack - tap <= i ? fmaf(taps.weight[tap][v], d, dx[tap][v]) : dx[tap][v];
            }
            const float own = t + j < end ? d : 0.0F;
            dbias[v] += own;
#pragma unroll
            for (int tap = 0; tap < kBack; ++tap) {
              dweight[tap][v] = fmaf(own, past.value[tap][v], dweight[tap][v]);
            }
            dweight[kBack][v] = fmaf(own, x[j][v], dweight[kBack][v]);
          }
          past.push(x[j]);
        }
        const int64_t input = t + j - kBack;
        if (a.x.grad != nullptr && input >= begin && input < end) {
          float sum[V];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sum[v] = grad[j][v] + dx[0][v];
          }
          store_n<V>(a.x.grad_at(input, c), sum);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int tap = 0; tap < kBack; ++tap) {
            dx[tap][v] = dx[tap + 1][v];
          }
          dx[kBack][v] = 0.0F;
        }
      }
    }
  }
  if (part == nullptr) {
    return;
  }
  __shared__ float sums[kRuns][kTaps + 1][kColumns * V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      sums[group][tap][column * V + v] = dweight[tap][v];
    }
    sums[group][kTaps][column * V + v] = dbias[v];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < (kTaps + 1) * kColumns * V;
       i += kColumns * kRuns) {
    const int tap = i / (kColumns * V);
    const int channel = i % (kColumns * V);
    float sum = 0.0F;
#pragma unroll
    for (int g = 0; g < kRuns; ++g) {
      sum += sums[g][tap][channel];
    }
    if (first + channel < a.channels()) {
      part[(token_block * (kTaps + 1) + tap) * a.channels() + first + channel] = sum;
    }
  }
}

}  // namespace cambium::cuda::conv
