// What an optimiser does to elements: each is read and written once, four to a thread. A matrix
// that Muon holds transposed goes through tiles in shared memory, so that both sides are read and
// written along their rows. Reductions take a warp for each block of elements.
#include "ops/cuda.cuh"
#include "ops/optimizer/optimizer_kernels.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVec = 4;

// --- Element by element.
template <class Body>
__global__ void __launch_bounds__(kThreads) each_element(Body body, int64_t count, bool vectors) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (vectors && i + kVec <= count) {
    body.template operator()<kVec>(i);
  } else {
    for (int64_t k = i; k < i + kVec && k < count; ++k) {
      body.template operator()<1>(k);
    }
  }
}

template <class... Pointers>
bool all_aligned(const Pointers*... p) {
  return (... && aligned(p));
}

template <class Body>
void run_each(const Launch& on, const char* operation, int64_t count, bool vectors,
              const Body& body) {
  launch(on, operation, each_element<Body>, static_cast<unsigned>(ceil_div(count, kThreads * kVec)),
         kThreads, 0, body, count, vectors);
}

/// Moves kN elements of a parameter and of its moments by their gradients.
template <int kN>
__device__ __forceinline__ void adamw_step(const AdamwConfig& o, float (&p)[kN], float (&g)[kN],
                                           float (&m)[kN], float (&v)[kN]) {
  const float keep = 1.0F - o.rate * o.weight_decay;
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    g[k] *= o.gradient_scale;
    m[k] = o.beta1 * m[k] + (1.0F - o.beta1) * g[k];
    v[k] = o.beta2 * v[k] + (1.0F - o.beta2) * g[k] * g[k];
    p[k] =
        p[k] * keep - o.rate * (m[k] * o.m_correction) / (sqrtf(v[k] * o.v_correction) + o.epsilon);
  }
}

template <class T>
struct AdamwBody {
  Adamw<T> a;

  template <int kN>
  __device__ void operator()(int64_t i) const {
    float p[kN];
    float g[kN];
    float m[kN];
    float v[kN];
    load_n<kN>(a.p + i, p);
    load_n<kN>(a.g + i, g);
    load_n<kN>(a.m + i, m);
    load_n<kN>(a.v + i, v);
    adamw_step(a.config, p, g, m, v);
    store_n<kN>(a.p + i, p);
    store_n<kN>(a.m + i, m);
    store_n<kN>(a.v + i, v);
  }
};

template <class T>
void run_adamw(const Adamw<T>& a, const Launch& on) {
  run_each(on, "adamw_update", a.n, all_aligned(a.p, a.g, a.m, a.v), AdamwBody<T>{a});
}

template <class T>
struct AdamwNarrowBody {
  AdamwNarrow<T> a;

  template <int kN>
  __device__ void operator()(int64_t i) const {
    float p[kN];
    float g[kN];
    float m[kN];
    float v[kN];
    load_n<kN>(a.p + i, p);
    load_n<kN>(a.g + i, g);
    load_n<kN>(a.m + i, m);
    load_n<kN>(a.v + i, v);
    adamw_step(a.config, p, g, m, v);
    store_n<kN>(a.p + i, p);
    Packed<kN, bf16> m_next;
    Packed<kN, bf16> v_next;
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      m_next.value[k] = rounded_m(a.key, i + k, m[k]);
      v_next.value[k] = rounded_v(a.key, i + k, v[k]);
    }
    *reinterpret_cast<Packed<kN, bf16>*>(a.m + i) = m_next;
    *reinterpret_cast<Packed<kN, bf16>*>(a.v + i) = v_next;
  }
};

template <class T>
void run_adamw_narrow(const AdamwNarrow<T>& a, const Launch& on) {
  run_each(on, "adamw_update", a.n, all_aligned(a.p, a.g, a.m, a.v), AdamwNarrowBody<T>{a});
}

template <class T>
struct ScaleBody {
  Scale<T> a;

  template <int kN>
  __device__ void operator()(int64_t i) const {
    float x[kN];
    load_n<kN>(a.x + i, x);
#pragma unroll
    for (float& value : x) {
      value *= a.factor;
    }
    store_n<kN>(a.x + i, x);
  }
};

template <class T>
void run_scale(const Scale<T>& a, const Launch& on) {
  run_each(on, "scale_in_place", a.n, all_aligned(a.x), ScaleBody<T>{a});
}

template <class T>
struct PolynomialBody {
  MuonPolynomial<T> a;

  template <int kN>
  __device__ void operator()(int64_t i) const {
    float x[kN];
    float square[kN];
    load_n<kN>(a.x + i, x);
    load_n<kN>(a.square + i, square);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      square[k] = a.b * x[k] + a.c * square[k];
      if ((i + k) % (a.n * a.n) % (a.n + 1) == 0) {
        square[k] += a.a;
      }
    }
    store_n<kN>(a.square + i, square);
  }
};

template <class T>
void run_polynomial(const MuonPolynomial<T>& a, const Launch& on) {
  run_each(on, "muon_update", a.count * a.n * a.n, all_aligned(a.x, a.square),
           PolynomialBody<T>{a});
}

// --- Muon's matrices. x lies as p does where p is wide.
struct Momentum {
  float m, u;
};
__device__ __forceinline__ Momentum momentum_of(float g, float m, float scale, float momentum) {
  g = (1.0F - momentum) * (g * scale);
  m = momentum * m + g;
  return {m, momentum * m + g};
}

template <class T>
struct MomentumBody {
  MuonMomentum<T> a;

  template <int kN>
  __device__ void operator()(int64_t i) const {
    float g[kN];
    float m[kN];
    load_n<kN>(a.g + i, g);
    load_n<kN>(a.m + i, m);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      const Momentum next = momentum_of(g[k], m[k], a.gradient_scale, a.momentum);
      m[k] = next.m;
      g[k] = next.u;
    }
    store_n<kN>(a.m + i, m);
    store_n<kN>(a.x + i, g);
  }
};

template <class T>
struct ApplyBody {
  MuonApply<T> a;

  template <int kN>
  __device__ void operator()(int64_t i) const {
    float p[kN];
    float x[kN];
    load_n<kN>(a.p + i, p);
    load_n<kN>(a.x + i, x);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      p[k] = p[k] * a.keep - a.factor * x[k];
      x[k] = 0.0F;
    }
    store_n<kN>(a.p + i, p);
    store_n<kN>(a.g + i, x);
  }
};

constexpr int kTile = 32;
constexpr int kTileRows = kThreads / kTile;

/// A tile of a matrix (rows, columns) and where this thread stands in it.
struct TilePlace {
  __device__ TilePlace(int64_t columns)
      : row(static_cast<int64_t>(blockIdx.x) / ceil_div(columns, kTile) * kTile),
        column(static_cast<int64_t>(blockIdx.x) % ceil_div(columns, kTile) * kTile) {}
  int64_t row, column;  // of its first element
};

template <class T>
__global__ void __launch_bounds__(kThreads) momentum_transposed(MuonMomentum<T> a) {
  __shared__ float tile[kTile][kTile + 1];
  const TilePlace at(a.columns);
  for (int k = static_cast<int>(threadIdx.y); k < kTile; k += kTileRows) {
    const int64_t r = at.row + k;
    const int64_t c = at.column + threadIdx.x;
    if (r < a.rows && c < a.columns) {
      const int64_t i = r * a.columns + c;
      const Momentum next = momentum_of(a.g[i], a.m[i], a.gradient_scale, a.momentum);
      a.m[i] = next.m;
      tile[k][threadIdx.x] = next.u;
    }
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.y); k < kTile; k += kTileRows) {
    const int64_t r = at.row + threadIdx.x;
    const int64_t c = at.column + k;
    if (r < a.rows && c < a.columns) {
      a.x[c * a.rows + r] = tile[threadIdx.x][k];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) apply_transposed(MuonApply<T> a) {
  __shared__ float tile[kTile][kTile + 1];
  const TilePlace at(a.columns);
  for (int k = static_cast<int>(threadIdx.y); k < kTile; k += kTileRows) {
    const int64_t r = at.row + threadIdx.x;
    const int64_t c = at.column + k;
    if (r < a.rows && c < a.columns) {
      tile[threadIdx.x][k] = a.x[c * a.rows + r];
    }
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.y); k < kTile; k += kTileRows) {
    const int64_t r = at.row + k;
    const int64_t c = at.column + threadIdx.x;
    if (r < a.rows && c < a.columns) {
      const int64_t i = r * a.columns + c;
      store(a.p + i, load(a.p + i) * a.keep - a.factor * tile[k][threadIdx.x]);
      a.g[i] = 0.0F;
    }
  }
}

template <class Args>
unsigned tiles_of(const Args& a) {
  return static_cast<unsigned>(ceil_div(a.rows, kTile) * ceil_div(a.columns, kTile));
}

template <class T>
void run_momentum(const MuonMomentum<T>& a, const Launch& on) {
  if (a.rows <= a.columns) {
    run_each(on, "muon_update", a.rows * a.columns, all_aligned(a.g, a.m, a.x), MomentumBody<T>{a});
  } else {
    launch(on, "muon_update", momentum_transposed<T>, tiles_of(a), dim3(kTile, kTileRows), 0, a);
  }
}

template <class T>
void run_apply(const MuonApply<T>& a, const Launch& on) {
  if (a.rows <= a.columns) {
    run_each(on, "muon_update", a.rows * a.columns, all_aligned(a.p, a.g, a.x), ApplyBody<T>{a});
  } else {
    launch(on, "muon_update", apply_transposed<T>, tiles_of(a), dim3(kTile, kTileRows), 0, a);
  }
}

// --- Reductions.
constexpr int kWarps = kThreads / 32;

struct Square {
  __device__ float operator()(float x) const { return x * x; }
};
struct NotFinite {
  __device__ float operator()(float x) const { return isfinite(x) ? 0.0F : 1.0F; }
};

/// part[i] = the sum of f over block i. A thread's elements are summed in fp32, by their place in a
/// vector; the warp's sums in double precision.
template <int kN, class T, class Function>
__global__ void __launch_bounds__(kThreads) reduce_blocks(Reduction<T> a, Function f) {
  __shared__ double found[kWarps];  // written at once: part may lie across a bus
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps;
  const int64_t block = first + threadIdx.x / 32;
  if (block < a.blocks()) {
    const int64_t end = a.end(block);
    const int64_t begin = block * kReductionBlock + threadIdx.x % 32 * kN;
    float sum[kN] = {};
#pragma unroll
    for (int k = 0; k < kReductionBlock / (32 * kN); ++k) {
      const int64_t i = begin + k * 32 * kN;
      float x[kN];
      if (i + kN <= end) {
        load_n<kN>(a.x + i, x);
      } else {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          x[j] = i + j < end ? load(a.x + i + j) : 0.0F;
        }
      }
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        sum[j] += f(x[j]);
      }
    }
    double total = 0.0;
#pragma unroll
    for (const float s : sum) {
      total += static_cast<double>(s);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      total += __shfl_xor_sync(0xffffffffU, total, lanes);
    }
    if (threadIdx.x % 32 == 0) {
      found[threadIdx.x / 32] = total;
    }
  }
  __syncthreads();
  if (threadIdx.x < kWarps && first + threadIdx.x < a.blocks()) {
    a.part[first + threadIdx.x] = found[threadIdx.x];
  }
}

/// A group a warp.
__global__ void __launch_bounds__(kThreads) fold(FoldParts<float> a) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (group >= a.groups()) {
    return;
  }
  const int64_t end = a.end(group);
  double sum = 0.0;
  for (int64_t i = group * kReductionBlock + threadIdx.x % 32; i < end; i += 32) {
    sum += a.part[i];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, lanes);
  }
  if (threadIdx.x % 32 == 0) {
    a.total[group] = sum;
  }
}

void run_fold(const FoldParts<float>& a, const Launch& on) {
  launch(on, "sum_squares", fold, static_cast<unsigned>(ceil_div(a.groups(), kWarps)), kThreads, 0,
         a);
}

template <class T, class Function>
void run_reduction(const Reduction<T>& a, const Launch& on, const char* operation, Function f) {
  const auto kernel =
      all_aligned(a.x) ? reduce_blocks<kVec, T, Function> : reduce_blocks<1, T, Function>;
  launch(on, operation, kernel, static_cast<unsigned>(ceil_div(a.blocks(), kWarps)), kThreads, 0, a,
         f);
}

}  // namespace

void adamw(const Adamw<float>& a, const Launch& on) {
  run_adamw(a, on);
}
void adamw(const Adamw<bf16>& a, const Launch& on) {
  run_adamw(a, on);
}

void adamw_narrow(const AdamwNarrow<float>& a, const Launch& on) {
  run_adamw_narrow(a, on);
}
void adamw_narrow(const AdamwNarrow<bf16>& a, const Launch& on) {
  run_adamw_narrow(a, on);
}

void fold_parts(const FoldParts<float>& a, const Launch& on) {
  run_fold(a, on);
}
void fold_parts(const FoldParts<bf16>& a, const Launch& on) {
  run_fold({a.n, a.part, a.total}, on);
}

void muon_momentum(const MuonMomentum<float>& a, const Launch& on) {
  run_momentum(a, on);
}
void muon_momentum(const MuonMomentum<bf16>& a, const Launch& on) {
  run_momentum(a, on);
}

void scale_in_place(const Scale<float>& a, const Launch& on) {
  run_scale(a, on);
}
void scale_in_place(const Scale<bf16>& a, const Launch& on) {
  run_scale(a, on);
}

void muon_polynomial(const MuonPolynomial<float>& a, const Launch& on) {
  run_polynomial(a, on);
}
void muon_polynomial(const MuonPolynomial<bf16>& a, const Launch& on) {
  run_polynomial(a, on);
}

void muon_apply(const MuonApply<float>& a, const Launch& on) {
  run_apply(a, on);
}
void muon_apply(const MuonApply<bf16>& a, const Launch& on) {
  run_apply(a, on);
}

void block_squares(const Reduction<float>& a, const Launch& on) {
  run_reduction(a, on, "sum_squares", Square{});
}
void block_squares(const Reduction<bf16>& a, const Launch& on) {
  run_reduction(a, on, "sum_squares", Square{});
}
void block_not_finite(const Reduction<float>& a, const Launch& on) {
  run_reduction(a, on, "all_finite", NotFinite{});
}
void block_not_finite(const Reduction<bf16>& a, const Launch& on) {
  run_reduction(a, on, "all_finite", NotFinite{});
}

}  // namespace cambium::cuda
