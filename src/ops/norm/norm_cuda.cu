// RMS, layer and L2 norms. How rows are divided among threads is in norm_cuda.cuh.
#include <algorithm>

#include "ops/norm/norm_cuda.cuh"
#include "ops/norm/norm_kernels.h"

namespace cambium::cuda {
namespace {

using namespace norm;

// --- y = x rstd w
template <class Tile, class T>
__global__ void __launch_bounds__(kThreads) rms_forward(RmsNorm<T> a) {
  await_inputs();
  const ForwardRow<Tile> row(a.x.count(), a.x.channels);
  const Held<Tile, T> x_row(a.x.row(row.index), row.channels);
  float x[Tile::kVec];
  float square[1] = {};
  Tile::each(row.channels, [&](int i, int c) {
    x_row.get(i, c, x);
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      square[0] += x[j] * x[j];
    }
  });
  Tile::sum(square);
  const float rstd = rsqrtf(square[0] / static_cast<float>(a.x.channels) + a.eps);
  const float one = a.zero_centred ? 1.0F : 0.0F;
  T* y = a.y.row(row.index);
  Tile::each(row.channels, [&](int i, int c) {
    float w[Tile::kVec];
    load_weight(a.weight.data + c, w);
    x_row.get(i, c, x);
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      x[j] *= rstd * (w[j] + one);
    }
    store_n<Tile::kVec>(y + c, x);
  });
}

// stream = keep stream + out y; x = stream rstd w
template <class Tile, class T>
__global__ void __launch_bounds__(kThreads) add_rms_forward(AddRmsNorm<T> a) {
  constexpr int kVec = Tile::kVec;
  ForwardRow<Tile> row(a.stream.count(), a.stream.channels);
  // The weight comes from far, as nobody has read it since the last step: it is on its way before
  // the row is there.
  constexpr bool kAhead = Tile::kPer > 0;
  float weight[Tile::kHeld][kVec];
  if (kAhead && a.weight.defined()) {
    Tile::each(row.channels, [&](int i, int c) { load_weight(a.weight.data + c, weight[i]); });
  }
  await_inputs();
  for (; row.any(); row.next()) {
    float* stream = a.stream.row(row.index);
    const T* added = a.y.row(row.index);
    float held[Tile::kHeld][kVec];
    float square[1] = {};
    // All that is read of a row is on its way before anything is written: what is written might be
    // what is read next, for all that the compiler knows.
    Tile::each(row.channels, [&](int i, int c) {
      float y[kVec];
      load_all<kVec>(added + c, y);
      if (a.keep != 0.0F) {
        load_all<kVec>(stream + c, held[i]);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          held[i][j] = fmaf(a.keep, held[i][j], a.out * y[j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          held[i][j] = a.out * y[j];
        }
      }
      if constexpr (Tile::kPer == 0) {
        store_all<kVec>(stream + c, held[i]);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        square[0] += held[i][j] * held[i][j];
      }
    });
    if constexpr (Tile::kPer > 0) {
      Tile::each(row.channels, [&](int i, int c) { store_all<kVec>(stream + c, held[i]); });
    }
    if (!a.x.defined()) {
      continue;
    }
    const float n = static_cast<float>(a.stream.channels);
    float mean = 0.0F;
    if (a.layer) {
      const auto each_held = [&](const auto& f) {
        Tile::each(row.channels, [&](int i, int c) {
          if constexpr (Tile::kPer == 0) {
            load_all<kVec>(stream + c, held[i]);
          }
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            f(held[i][j]);
          }
        });
      };
      float total[1] = {};
      each_held([&](float v) { total[0] += v; });
      Tile::sum(total);
      mean = total[0] / n;
      square[0] = 0.0F;
      each_held([&](float v) { square[0] += (v - mean) * (v - mean); });
    }
    Tile::sum(square);
    const float rstd = rsqrtf(square[0] / n + a.eps);
    const float one = a.zero_centred ? 1.0F : 0.0F;
    T* x = a.x.row(row.index);
    Tile::each(row.channels, [&](int i, int c) {
      if constexpr (Tile::kPer == 0) {
        load_all<kVec>(stream + c, held[i]);
      }
      if (a.weight.defined()) {
        if constexpr (!kAhead) {
          load_weight(a.weight.data + c, weight[i]);
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          held[i][j] = (held[i][j] - mean) * (rstd * (weight[i][j] + one));
        }
      }
      if (a.bias.defined()) {
        float b[kVec];
        load_weight(a.bias.data + c, b);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          held[i][j] += b[j];
        }
      }
      store_all<kVec>(x + c, held[i]);
    });
  }
}

// dx += rstd (t - x rstd^2 mean(x t)), dweight += dy x rstd, with t = dy w
template <class Tile, class T>
__global__ void __launch_bounds__(kThreads)
    rms_backward(RmsNorm<T> a, Chunks chunks, float* partial) {
  constexpr int kVec = Tile::kVec;
  const float one = a.zero_centred ? 1.0F : 0.0F;
  ColumnSums<Tile> dweight(partial, chunks, a.x.channels);
  for_rows<Tile>(chunks, a.x.channels, [&](int64_t r, int channels) {
    T* dx = a.x.grad == nullptr ? nullptr : a.x.grad_row(r);
    const Held<Tile, T> x_row(a.x.row(r), channels);
    const Held<Tile, T> dy_row(a.y.grad_row(r), channels);
    const Held<Tile, T> dx_row(dx, dx == nullptr ? 0 : channels);
    float x[kVec];
    float dy[kVec];
    float w[kVec];
    float sum[2] = {};  // x^2, x t
    Tile::each(channels, [&](int i, int c) {
      x_row.get(i, c, x);
      dy_row.get(i, c, dy);
      load_weight(a.weight.data + c, w);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sum[0] += x[j] * x[j];
        sum[1] += x[j] * dy[j] * (w[j] + one);
      }
    });
    Tile::sum(sum);
    const float n = static_cast<float>(a.x.channels);
    const float rstd = rsqrtf(sum[0] / n + a.eps);
    const float back = rstd * rstd * (sum[1] / n);
    Tile::each(channels, [&](int i, int c) {
      x_row.get(i, c, x);
      dy_row.get(i, c, dy);
      if (dx != nullptr) {
        float d[kVec];
        dx_row.get(i, c, d);
        load_weight(a.weight.data + c, w);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          d[j] += rstd * (dy[j] * (w[j] + one) - x[j] * back);
        }
        store_n<kVec>(dx + c, d);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        x[j] *= dy[j] * rstd;
      }
      dweight.add(i, c, x);
    });
  });
  dweight.finish();
}

// --- y = (x - mean) rstd w + b
template <class Tile, class T>
__global__ void __launch_bounds__(kThreads) layer_forward(LayerNorm<T> a) {
  const ForwardRow<Tile> row(a.x.count(), a.x.channels);
  const Held<Tile, T> x_row(a.x.row(row.index), row.channels);
  const float n = static_cast<float>(a.x.channels);
  float x[Tile::kVec];
  float sum[1] = {};
  Tile::each(row.channels, [&](int i, int c) {
    x_row.get(i, c, x);
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      sum[0] += x[j];
    }
  });
  Tile::sum(sum);
  const float mean = sum[0] / n;
  sum[0] = 0.0F;
  Tile::each(row.channels, [&](int i, int c) {
    x_row.get(i, c, x);
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      sum[0] += (x[j] - mean) * (x[j] - mean);
    }
  });
  Tile::sum(sum);
  const float rstd = rsqrtf(sum[0] / n + a.eps);
  T* y = a.y.row(row.index);
  Tile::each(row.channels, [&](int i, int c) {
    float w[Tile::kVec];
    float b[Tile::kVec] = {};
    load_weight(a.weight.data + c, w);
    if (a.bias.defined()) {
      load_weight(a.bias.data + c, b);
    }
    x_row.get(i, c, x);
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      x[j] = (x[j] - mean) * rstd * w[j] + b[j];
    }
    store_n<Tile::kVec>(y + c, x);
  });
}

// dx += rstd (t - mean(t) - (x - mean) rstd^2 mean((x - mean) t)), with t = dy w
template <class Tile, class T>
__global__ void __launch_bounds__(kThreads)
    layer_backward(LayerNorm<T> a, Chunks chunks, float* weight_partial, float* bias_partial) {
  constexpr int kVec = Tile::kVec;
  const float n = static_cast<float>(a.x.channels);
  ColumnSums<Tile> dweight(weight_partial, chunks, a.x.channels);
  ColumnSums<Tile> dbias(bias_partial, chunks, a.x.channels);
  for_rows<Tile>(chunks, a.x.channels, [&](int64_t r, int channels) {
    T* dx = a.x.grad == nullptr ? nullptr : a.x.grad_row(r);
    const Held<Tile, T> x_row(a.x.row(r), channels);
    const Held<Tile, T> dy_row(a.y.grad_row(r), channels);
    const Held<Tile, T> dx_row(dx, dx == nullptr ? 0 : channels);
    float x[kVec];
    float dy[kVec];
    float w[kVec];
    float first[2] = {};  // x, t
    Tile::each(channels, [&](int i, int c) {
      x_row.get(i, c, x);
      dy_row.get(i, c, dy);
      load_weight(a.weight.data + c, w);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        first[0] += x[j];
        first[1] += dy[j] * w[j];
      }
    });
    Tile::sum(first);
    const float mean = first[0] / n;
    const float mean_t = first[1] / n;
    float second[2] = {};  // (x - mean)^2, (x - mean) t
    Tile::each(channels, [&](int i, int c) {
      x_row.get(i, c, x);
      dy_row.get(i, c, dy);
      load_weight(a.weight.data + c, w);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        second[0] += (x[j] - mean) * (x[j] - mean);
        second[1] += (x[j] - mean) * (dy[j] * w[j]);
      }
    });
    Tile::sum(second);
    const float rstd = rsqrtf(second[0] / n + a.eps);
    const float back = rstd * rstd * (second[1] / n);
    Tile::each(channels, [&](int i, int c) {
      x_row.get(i, c, x);
      dy_row.get(i, c, dy);
      if (dx != nullptr) {
        float d[kVec];
        dx_row.get(i, c, d);
        load_weight(a.weight.data + c, w);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          d[j] += rstd * (dy[j] * w[j] - mean_t - (x[j] - mean) * back);
        }
        store_n<kVec>(dx + c, d);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        x[j] = dy[j] * (x[j] - mean) * rstd;
      }
      dweight.add(i, c, x);
      dbias.add(i, c, dy);
    });
  });
  dweight.finish();
  dbias.finish();
}

// --- y = scale x rsqrt(sum(x^2) + eps)
template <class Tile, class T>
__global__ void __launch_bounds__(kThreads) l2_forward(L2Norm<T> a) {
  await_inputs();
  const ForwardRow<Tile> row(a.x.count(), a.x.channels);
  const Held<Tile, T> x_row(a.x.row(row.index), row.channels);
  float x[Tile::kVec];
  float square[1] = {};
  Tile::each(row.channels, [&](int i, int c) {
    x_row.get(i, c, x);
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      square[0] += x[j] * x[j];
    }
  });
  Tile::sum(square);
  const float factor = a.scale * rsqrtf(square[0] + a.eps);
  T* y = a.y.row(row.index);
  Tile::each(row.channels, [&](int i, int c) {
    x_row.get(i, c, x);
#pragma unroll
    for (float& value : x) {
      value *= factor;
    }
    store_n<Tile::kVec>(y + c, x);
  });
}

// With r = rsqrt(sum(x^2) + eps): dx += scale r (dy - x r^2 (x . dy))
template <class Tile, class T>
__global__ void __launch_bounds__(kThreads) l2_backward(L2Norm<T> a) {
  constexpr int kVec = Tile::kVec;
  const ForwardRow<Tile> row(a.x.count(), a.x.channels);
  const Held<Tile, T> x_row(a.x.row(row.index), row.channels);
  const Held<Tile, T> dy_row(a.y.grad_row(row.index), row.channels);
  T* dx = a.x.grad_row(row.index);
  const Held<Tile, T> dx_row(dx, row.channels);
  float x[kVec];
  float dy[kVec];
  float sum[2] = {};  // x^2, x dy
  Tile::each(row.channels, [&](int i, int c) {
    x_row.get(i, c, x);
    dy_row.get(i, c, dy);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      sum[0] += x[j] * x[j];
      sum[1] += x[j] * dy[j];
    }
  });
  Tile::sum(sum);
  const float inverse = rsqrtf(sum[0] + a.eps);
  const float factor = a.scale * inverse;
  const float back = inverse * inverse * sum[1];
  Tile::each(row.channels, [&](int i, int c) {
    float d[kVec];
    x_row.get(i, c, x);
    dy_row.get(i, c, dy);
    dx_row.get(i, c, d);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      d[j] += factor * (dy[j] - x[j] * back);
    }
    store_n<kVec>(dx + c, d);
  });
}

// --- Launches.
template <class T>
void run_rms_forward(const RmsNorm<T>& a, const Launch& on) {
  const bool vectors = aligned(a.x) && aligned(a.y) && aligned(a.weight.data);
  with_tile<T>(a.x.channels, vectors, [&]<class Tile>(Tile) {
    launch_ahead(on, "rms_norm", rms_forward<Tile, T>, forward_blocks<Tile>(a.x.count()), kThreads,
                 0, a);
  });
}

template <class T>
void run_add_rms_forward(const AddRmsNorm<T>& a, const Launch& on) {
  const bool vectors = aligned(a.stream) && aligned(a.y) && aligned(a.x) &&
                       aligned(a.weight.data) && aligned(a.bias.data);
  with_tile<T>(a.stream.channels, vectors, [&]<class Tile>(Tile) {
    const auto kernel = add_rms_forward<Tile, T>;
    // No more blocks than fit at once, so that a weight is read once a block, not once a row.
    const int64_t blocks =
        std::min(ceil_div(a.stream.count(), Tile::kRows), resident_blocks(kernel, kThreads, 0));
    launch_ahead(on, "add_rms_norm", kernel, static_cast<unsigned>(blocks), kThreads, 0, a);
  });
}

template <class T>
void run_rms_backward(const RmsNorm<T>& a, const Launch& on) {
  const bool vectors = aligned(a.x) && aligned(a.y) && aligned(a.weight.data);
  with_tile<T>(a.x.channels, vectors, [&]<class Tile>(Tile) {
    const Chunks chunks = chunks_of(a.x.count(), 1, Tile::kRows);
    const WeightGrad<Tile> dweight(on, chunks, a.x.channels, a.weight.grad);
    launch(on, "rms_norm's gradient", rms_backward<Tile, T>, static_cast<unsigned>(chunks.blocks()),
           kThreads, 0, a, chunks, dweight.partial());
    dweight.add(on, "rms_norm's gradient");
  });
}

template <class T>
bool aligned_layer(const LayerNorm<T>& a) {
  return aligned(a.x) && aligned(a.y) && aligned(a.weight.data) && aligned(a.bias.data);
}

template <class T>
void run_layer_forward(const LayerNorm<T>& a, const Launch& on) {
  with_tile<T>(a.x.channels, aligned_layer(a), [&]<class Tile>(Tile) {
    launch(on, "layer_norm", layer_forward<Tile, T>, forward_blocks<Tile>(a.x.count()), kThreads, 0,
           a);
  });
}

template <class T>
void run_layer_backward(const LayerNorm<T>& a, const Launch& on) {
  with_tile<T>(a.x.channels, aligned_layer(a), [&]<class Tile>(Tile) {
    const Chunks chunks = chunks_of(a.x.count(), 1, Tile::kRows);
    const WeightGrad<Tile> dweight(on, chunks, a.x.channels, a.weight.grad);
    const WeightGrad<Tile> dbias(on, chunks, a.x.channels, a.bias.grad);
    launch(on, "layer_norm's gradient", layer_backward<Tile, T>,
           static_cast<unsigned>(chunks.blocks()), kThreads, 0, a, chunks, dweight.partial(),
           dbias.partial());
    dweight.add(on, "layer_norm's gradient");
    dbias.add(on, "layer_norm's gradient");
  });
}

template <class T>
void run_l2_forward(const L2Norm<T>& a, const Launch& on) {
  with_tile<T>(a.x.channels, aligned(a.x) && aligned(a.y), [&]<class Tile>(Tile) {
    launch_ahead(on, "l2_norm", l2_forward<Tile, T>, forward_blocks<Tile>(a.x.count()), kThreads, 0,
                 a);
  });
}

template <class T>
void run_l2_backward(const L2Norm<T>& a, const Launch& on) {
  with_tile<T>(a.x.channels, aligned(a.x) && aligned(a.y), [&]<class Tile>(Tile) {
    launch(on, "l2_norm's gradient", l2_backward<Tile, T>, forward_blocks<Tile>(a.x.count()),
           kThreads, 0, a);
  });
}

}  // namespace

void rms_norm_forward(const RmsNorm<float>& a, const Launch& on) {
  run_rms_forward(a, on);
}
void rms_norm_forward(const RmsNorm<bf16>& a, const Launch& on) {
  run_rms_forward(a, on);
}
void add_rms_norm_forward(const AddRmsNorm<float>& a, const Launch& on) {
  run_add_rms_forward(a, on);
}
void add_rms_norm_forward(const AddRmsNorm<bf16>& a, const Launch& on) {
  run_add_rms_forward(a, on);
}
void rms_norm_backward(const RmsNorm<float>& a, const Launch& on) {
  run_rms_backward(a, on);
}
void rms_norm_backward(const RmsNorm<bf16>& a, const Launch& on) {
  run_rms_backward(a, on);
}

void layer_norm_forward(const LayerNorm<float>& a, const Launch& on) {
  run_layer_forward(a, on);
}
void layer_norm_forward(const LayerNorm<bf16>& a, const Launch& on) {
  run_layer_forward(a, on);
}
void layer_norm_backward(const LayerNorm<float>& a, const Launch& on) {
  run_layer_backward(a, on);
}
void layer_norm_backward(const LayerNorm<bf16>& a, const Launch& on) {
  run_layer_backward(a, on);
}

void l2_norm_forward(const L2Norm<float>& a, const Launch& on) {
  run_l2_forward(a, on);
}
void l2_norm_forward(const L2Norm<bf16>& a, const Launch& on) {
  run_l2_forward(a, on);
}
void l2_norm_backward(const L2Norm<float>& a, const Launch& on) {
  run_l2_backward(a, on);
}
void l2_norm_backward(const L2Norm<bf16>& a, const Launch& on) {
  run_l2_backward(a, on);
}

}  // namespace cambium::cuda
