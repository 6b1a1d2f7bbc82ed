// The gated RMS norm. A row is a group of a token's channels; how rows are divided among threads is
// in norm_cuda.cuh. Where every group has a weight of its own, a block of the backward kernel takes
// rows of one group only, so that its sums by column are of one weight.
#include "ops/norm/norm_cuda.cuh"
#include "ops/norm/norm_kernels.h"

namespace cambium::cuda {
namespace {

using namespace norm;

struct Gate {
  float value, slope;
};
template <class T>
__device__ __forceinline__ Gate gate_of(bool is_sigmoid, float z) {
  const float s = sigmoid_of<T>(z);
  return is_sigmoid ? Gate{s, s * (1.0F - s)} : Gate{z * s, s * (1.0F + z * (1.0F - s))};
}

template <class Tile, class T, bool kGateFirst>
__global__ void __launch_bounds__(kThreads) gated_forward(GatedNorm<T> a) {
  constexpr int kVec = Tile::kVec;
  await_inputs();
  const ForwardRow<Tile> row(a.x.count(), a.x.channels);
  const int64_t token = row.index / a.groups;
  const int64_t group = row.index - token * a.groups;
  const Held<Tile, T> x_row(a.x.row(token, group), row.channels);
  const Held<Tile, T> gate_row(a.gate.row(token, group), row.channels);
  const float* weight = a.weight.data + group * a.weight_step;
  // x a(z), once for both passes where a row is held.
  float gated[Tile::kHeld][kVec];
  float square[1] = {};
  const auto gate_at = [&](int i, int c, bool sums) {
    float x[kVec];
    float gate[kVec];
    x_row.get(i, c, x);
    gate_row.get(i, c, gate);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      gated[i][j] = x[j] * gate_of<T>(a.sigmoid, gate[j]).value;
      const float u = kGateFirst ? gated[i][j] : x[j];
      square[0] += sums ? u * u : 0.0F;
    }
  };
  Tile::each(row.channels, [&](int i, int c) { gate_at(i, c, true); });
  Tile::sum(square);
  const float rstd = rsqrtf(square[0] / static_cast<float>(a.x.channels) + a.eps);
  T* y = a.y.row(row.index);
  Tile::each(row.channels, [&](int i, int c) {
    if constexpr (Tile::kPer == 0) {
      gate_at(i, c, false);
    }
    float w[kVec];
    load_weight(weight + c, w);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      w[j] *= gated[i][j] * rstd;
    }
    store_n<kVec>(y + c, w);
  });
}

// With a(z) the gate, t = dy w and m = rstd^2 mean(x a(z) t):
//   gate first: du = rstd (t - x a(z) m), dx += du a(z), dz += du x a'(z)
//   norm first: dx += rstd (t a(z) - x m), dz += rstd t x a'(z)
// and dweight += dy x a(z) rstd in either order.
template <class Tile, class T, bool kGateFirst>
__global__ void __launch_bounds__(kThreads, Tile::kPer == 4 ? 1 : 2)
    gated_backward(GatedNorm<T> a, Chunks chunks, float* partial) {
  constexpr int kVec = Tile::kVec;
  const float* weight = a.weight.data + blockIdx.x % chunks.weights * a.weight_step;
  ColumnSums<Tile> dweight(partial, chunks, a.x.channels);
  for_rows<Tile>(chunks, a.x.channels, [&](int64_t r, int channels) {
    // x and the gate may be one tensor, whose gradient then takes both parts at once.
    T* dx = a.x.grad == nullptr ? nullptr : a.x.grad_row(r);
    T* dgate = a.gate.grad == nullptr || a.gate.grad == a.x.grad ? nullptr : a.gate.grad_row(r);
    const Held<Tile, T> x_row(a.x.row(r), channels);
    const Held<Tile, T> gate_row(a.gate.row(r), channels);
    const Held<Tile, T> dy_row(a.y.grad_row(r), channels);
    const Held<Tile, T> dx_row(dx, dx == nullptr ? 0 : channels);
    const Held<Tile, T> dgate_row(dgate, dgate == nullptr ? 0 : channels);
    float x[kVec];
    float gate[kVec];
    float dy[kVec];
    float w[kVec];
    float sum[2] = {};  // what is normalised squared, x a(z) t
    Tile::each(channels, [&](int i, int c) {
      x_row.get(i, c, x);
      gate_row.get(i, c, gate);
      dy_row.get(i, c, dy);
      load_weight(weight + c, w);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float gated = x[j] * gate_of<T>(a.sigmoid, gate[j]).value;
        sum[0] += kGateFirst ? gated * gated : x[j] * x[j];
        sum[1] += gated * (dy[j] * w[j]);
      }
    });
    Tile::sum(sum);
    const float n = static_cast<float>(a.x.channels);
    const float rstd = rsqrtf(sum[0] / n + a.eps);
    const float mean = rstd * rstd * (sum[1] / n);
    Tile::each(channels, [&](int i, int c) {
      float to_x[kVec] = {};
      float to_gate[kVec] = {};
      x_row.get(i, c, x);
      gate_row.get(i, c, gate);
      dy_row.get(i, c, dy);
      load_weight(weight + c, w);
      if (dx != nullptr) {
        dx_row.get(i, c, to_x);
      }
      if (dgate != nullptr) {
        dgate_row.get(i, c, to_gate);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const Gate g = gate_of<T>(a.sigmoid, gate[j]);
        const float t = dy[j] * w[j];
        if constexpr (kGateFirst) {
          const float du = rstd * (t - x[j] * g.value * mean);
          to_x[j] += du * g.value;
          to_gate[j] += du * x[j] * g.slope;
        } else {
          to_x[j] += rstd * (t * g.value - x[j] * mean);
          to_gate[j] += rstd * t * x[j] * g.slope;
        }
        to_x[j] += a.x.grad == a.gate.grad ? to_gate[j] : 0.0F;
        dy[j] *= x[j] * g.value * rstd;
      }
      if (dx != nullptr) {
        store_n<kVec>(dx + c, to_x);
      }
      if (dgate != nullptr) {
        store_n<kVec>(dgate + c, to_gate);
      }
      dweight.add(i, c, dy);
    });
  });
  dweight.finish();
}

template <class T>
bool in_vectors(const GatedNorm<T>& a) {
  return aligned(a.x) && aligned(a.gate) && aligned(a.y) && aligned(a.weight.data);
}

template <class T>
void run_forward(const GatedNorm<T>& a, const Launch& on) {
  const auto with = [&]<class Tile>(Tile) {
    launch_ahead(on, "gated_rms_norm",
                 a.gate_first ? gated_forward<Tile, T, true> : gated_forward<Tile, T, false>,
                 forward_blocks<Tile>(a.x.count()), kThreads, 0, a);
  };
  // Groups of 1,280 channels of bf16: a warp's loads of a whole row are on their way at once, where
  // a block would wait for itself twice a row. A few rows are sooner done by a block each.
  constexpr int kVec = 16 / sizeof(T);
  constexpr int64_t kManyRows = 4096;
  const int64_t vectors = a.x.channels / kVec;
  const bool many = on.batch_invariant || a.x.count() >= kManyRows;
  if (in_vectors(a) && many && vectors > 128 && vectors <= 160) {
    with(Tile<kVec, 32, 5>{});
  } else {
    with_tile<T>(a.x.channels, in_vectors(a), with);
  }
}

template <class T>
void run_backward(const GatedNorm<T>& a, const Launch& on) {
  with_tile<T>(a.x.channels, in_vectors(a), [&]<class Tile>(Tile) {
    const int64_t weights = a.weight_step == 0 ? 1 : a.groups;
    const Chunks chunks = chunks_of(a.x.count(), weights, Tile::kRows);
    const WeightGrad<Tile> dweight(on, chunks, a.x.channels, a.weight.grad);
    launch(on, "gated_rms_norm's gradient",
           a.gate_first ? gated_backward<Tile, T, true> : gated_backward<Tile, T, false>,
           static_cast<unsigned>(chunks.blocks()), kThreads, 0, a, chunks, dweight.partial());
    dweight.add(on, "gated_rms_norm's gradient");
  });
}

}  // namespace

void gated_norm_forward(const GatedNorm<float>& a, const Launch& on) {
  run_forward(a, on);
}
void gated_norm_forward(const GatedNorm<bf16>& a, const Launch& on) {
  run_forward(a, on);
}
void gated_norm_backward(const GatedNorm<float>& a, const Launch& on) {
  run_backward(a, on);
}
void gated_norm_backward(const GatedNorm<bf16>& a, const Launch& on) {
  run_backward(a, on);
}

}  // namespace cambium::cuda
