// Element by element operations, by the walk of ops/elements.cuh. The gradient of a parameter of
// heads is summed by chunks of tokens, whose sums a second kernel adds in order.
#include "ops/elements.cuh"
#include "ops/pointwise/pointwise_kernels.h"

namespace cambium::cuda {
namespace {

using namespace elements;

// --- Blocks of columns times constants
template <class T>
struct ScaleBlocksForward {
  ScaleBlocks<T> s;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    float x[kVec];
    load_n<kVec>(s.x.data + at.in(s.x.rows), x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] *= static_cast<float>(s.factor_of(at.channel + i));
    }
    store_n<kVec>(s.y.data + at.element, x);
  }
};

template <class T>
struct ScaleBlocksBackward {
  ScaleBlocks<T> s;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    const int64_t at_x = at.in(s.x.rows);
    float dx[kVec];
    float dy[kVec];
    load_n<kVec>(s.x.grad + at_x, dx);
    load_n<kVec>(s.y.grad + at.element, dy);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      dx[i] += static_cast<float>(s.factor_of(at.channel + i)) * dy[i];
    }
    store_n<kVec>(s.x.grad + at_x, dx);
  }
};

template <class T, class Body>
void run_scale_blocks(const ScaleBlocks<T>& s, const Launch& on, const char* operation,
                      const Body& body) {
  constexpr int64_t kVec = 16 / sizeof(T);
  run_each(on, operation, s.x, aligned(s.x, kVec) && aligned(s.y, kVec), false, body);
}

// --- a or sigmoid(a) as a factor of b
struct Product {
  __device__ float operator()(float a, float b) const { return b * a; }
  __device__ PairGrad operator()(float a, float b, float dy) const { return {dy * b, dy * a}; }
};

template <class T>
struct SigmoidGate {
  __device__ float operator()(float gate, float x) const { return x * sigmoid_of<T>(gate); }
  __device__ PairGrad operator()(float gate, float x, float dy) const {
    const float s = sigmoid_of<T>(gate);
    return {dy * x * (s * (1.0F - s)), dy * s};
  }
};

template <template <bool, class, class> class Body, class T, class F>
void run_product(const Pointwise<T>& p, const Launch& on, const char* operation, const F& f) {
  run_pairs<Body>(on, operation, p.a, p.b, p.y, f, p.sets);
}

// --- scale / (1 + exp(-x)), in the type of sums
template <class T>
struct SigmoidForward {
  Sigmoid<T> s;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    float x[kVec];
    load_n<kVec>(s.x.data + at.in(s.x.rows), x);
#pragma unroll
    for (float& value : x) {
      value = s.scale * sigmoid_of<T>(value);
    }
    store_all<kVec>(s.y.data + at.element, x);
  }
};

template <class T>
struct SigmoidBackward {
  Sigmoid<T> s;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    const int64_t at_x = at.in(s.x.rows);
    float x[kVec];
    float dy[kVec];
    float dx[kVec];
    load_n<kVec>(s.x.data + at_x, x);
    load_all<kVec>(s.y.grad + at.element, dy);
    load_n<kVec>(s.x.grad + at_x, dx);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float y = sigmoid_of<T>(x[i]);
      dx[i] += s.scale * dy[i] * y * (1.0F - y);
    }
    store_n<kVec>(s.x.grad + at_x, dx);
  }
};

template <class T, class Body>
void run_sigmoid(const Sigmoid<T>& s, const Launch& on, const char* operation, const Body& body) {
  const bool vectors = aligned(s.x, 16 / sizeof(T)) && aligned(s.y.data) && aligned(s.y.grad);
  run_each(on, operation, s.x, vectors, flat(s.x), body);
}

// --- a x + b y
template <class T>
struct AddScaledForward {
  AddScaled<T> s;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    float x[kVec];
    float y[kVec];
    load_n<kVec>(s.x.data + at.in(s.x.rows), x);
    load_n<kVec>(s.y.data + at.in(s.y.rows), y);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] = s.a * x[i] + s.b * y[i];
    }
    store_n<kVec>(s.sum.data + at.element, x);
  }
};

template <class T>
struct AddScaledBackward {
  AddScaled<T> s;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    const int64_t at_x = at.in(s.x.rows);
    const int64_t at_y = at.in(s.y.rows);
    // x and y may be one tensor, whose gradient then takes both parts at once.
    const bool one_grad = s.x.grad == s.y.grad;
    const bool wants_y = s.y.grad != nullptr && !one_grad;
    float d[kVec];
    float dx[kVec] = {};
    float dy[kVec] = {};
    load_n<kVec>(s.sum.grad + at.element, d);
    if (s.x.grad != nullptr && !s.sets.a) {
      load_n<kVec>(s.x.grad + at_x, dx);
    }
    if (wants_y && !s.sets.b) {
      load_n<kVec>(s.y.grad + at_y, dy);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      dx[i] += s.a * d[i];
      dy[i] += s.b * d[i];
      dx[i] += one_grad ? dy[i] : 0.0F;
    }
    if (s.x.grad != nullptr) {
      store_n<kVec>(s.x.grad + at_x, dx);
    }
    if (wants_y) {
      store_n<kVec>(s.y.grad + at_y, dy);
    }
  }
};

template <class T, class Body>
void run_add_scaled(const AddScaled<T>& s, const Launch& on, const char* operation,
                    const Body& body) {
  constexpr int64_t kVec = 16 / sizeof(T);
  const bool vectors = aligned(s.x, kVec) && aligned(s.y, kVec) && aligned(s.sum, kVec);
  run_each(on, operation, s.x, vectors, flat(s.x) && flat(s.y), body);
}

// --- Gates of heads: y = value(x, p, q), and the gradients of all as grad() gives them. Functions
// of one parameter take 0 for q.
struct HeadGrad {
  float x, p, q;
};

struct StepSize {
  float lo, hi;

  __device__ static float softplus(float x) { return x > 20.0F ? x : log1pf(expf(x)); }
  __device__ float value(float x, float p, float /*q*/) const {
    const float step = softplus(x + p);
    return step < lo ? lo : hi < step ? hi : step;  // NaN stays
  }
  __device__ HeadGrad grad(float x, float p, float /*q*/, float dy) const {
    const float raw = x + p;
    const float step = softplus(raw);
    const float slope = raw > 20.0F ? 1.0F : sigmoid(raw);
    const float d = step > lo && step < hi ? dy * slope : 0.0F;
    return {d, d, 0.0F};
  }
};

struct LogDecay {
  __device__ float value(float x, float p, float /*q*/) const { return -expf(p) * x; }
  __device__ HeadGrad grad(float x, float p, float /*q*/, float dy) const {
    const float d = -expf(p) * dy;
    return {d, d * x, 0.0F};
  }
};

struct BoundedDecay {
  float bound;

  __device__ float value(float x, float p, float q) const {
    return bound * sigmoid(expf(q) * (x + p));
  }
  __device__ HeadGrad grad(float x, float p, float q, float dy) const {
    const float rate = expf(q);
    const float raw = rate * (x + p);
    const float s = sigmoid(raw);
    const float d = bound * s * (1.0F - s) * dy;
    return {rate * d, rate * d, raw * d};
  }
};

template <class T>
__device__ float second(const PerHead<T>& h, int64_t head) {
  return h.q.data == nullptr ? 0.0F : h.q.data[head];
}

template <class T, class Function>
struct HeadForward {
  PerHead<T> h;
  Function f;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    static_assert(kVec == 1);
    h.y.data[at.element] =
        f.value(load(h.x.data + at.in(h.x.rows)), h.p.data[at.channel], second(h, at.channel));
  }
};

template <class T, class Function>
void run_head_forward(const PerHead<T>& h, const Launch& on, const char* operation,
                      const Function& f) {
  using Body = HeadForward<T, Function>;
  const int64_t count = h.x.count() * h.x.channels;
  launch_ahead(on, operation, each_element<1, false, Body>,
               static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, Body{h, f}, count,
               h.x.channels);
}

constexpr int kHeadColumns = 32;  // heads of a block
constexpr int kHeadRows = kThreads / kHeadColumns;
constexpr int64_t kChunks = 264;  // of tokens: a constant, as the order of sums depends on it

/// partial (2, H, chunks): the sums of dp and dq over chunks of tokens; null where none is wanted.
template <class T, class Function>
__global__ void __launch_bounds__(kThreads)
    head_backward(PerHead<T> h, Function f, int64_t chunks, int64_t chunk, float* partial) {
  __shared__ float part[2][kHeadRows][kHeadColumns];
  const int64_t piece = blockIdx.x % chunks;
  const int64_t head = blockIdx.x / chunks * kHeadColumns + threadIdx.x;
  const int64_t end = (piece + 1) * chunk < h.x.count() ? (piece + 1) * chunk : h.x.count();
  float sums[2] = {};
  if (head < h.x.channels) {
    const float p = h.p.data[head];
    const float q = second(h, head);
    for (int64_t t = piece * chunk + threadIdx.y; t < end; t += kHeadRows) {
      const float dy = h.y.grad[t * h.x.channels + head];
      const HeadGrad d = f.grad(load(h.x.row(t) + head), p, q, dy);
      if (h.x.grad != nullptr) {
        add_to(h.x.grad_row(t) + head, d.x);
      }
      sums[0] += d.p;
      sums[1] += d.q;
    }
  }
  if (partial == nullptr) {
    return;
  }
  part[0][threadIdx.y][threadIdx.x] = sums[0];
  part[1][threadIdx.y][threadIdx.x] = sums[1];
  __syncthreads();
  if (threadIdx.y < 2 && head < h.x.channels) {
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeadRows; ++i) {
      sum += part[threadIdx.y][i][threadIdx.x];
    }
    partial[(threadIdx.y * h.x.channels + head) * chunks + piece] = sum;
  }
}

/// grad[i] += the sum of partial (count, chunks) over its chunks: a warp each.
__global__ void __launch_bounds__(kThreads)
    add_partial_sums(const float* partial, int64_t count, int64_t chunks, float* grad) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= count) {
    return;
  }
  float sum = 0.0F;
#pragma unroll 4
  for (int64_t k = threadIdx.x % 32; k < chunks; k += 32) {
    sum += partial[i * chunks + k];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    grad[i] += sum;
  }
}

template <class T, class Function>
void run_head_backward(const PerHead<T>& h, const Launch& on, const char* operation,
                       const Function& f) {
  const int64_t tokens = h.x.count();
  const int64_t heads = h.x.channels;
  if (tokens == 0) {
    return;
  }
  const int64_t chunk = ceil_div(tokens, kChunks) < 32 ? 32 : ceil_div(tokens, kChunks);
  const int64_t chunks = ceil_div(tokens, chunk);
  const bool wanted = h.p.grad != nullptr || h.q.grad != nullptr;
  float* partial = wanted ? scratch<float>(on, 2 * heads * chunks) : nullptr;
  launch(on, operation, head_backward<T, Function>,
         static_cast<unsigned>(chunks * ceil_div(heads, kHeadColumns)),
         dim3(kHeadColumns, kHeadRows), 0, h, f, chunks, chunk, partial);
  const auto add_sums = [&](const float* sums, float* grad) {
    if (grad != nullptr) {
      launch(on, operation, add_partial_sums, static_cast<unsigned>(ceil_div(heads, kThreads / 32)),
             kThreads, 0, sums, heads, chunks, grad);
    }
  };
  add_sums(partial, h.p.grad);
  add_sums(partial + heads * chunks, h.q.grad);
}

// --- Copies of heads. A thread takes its elements of a head and all of its copies.
template <class T>
struct RepeatForward {
  RepeatHeads<T> h;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    const auto x = *reinterpret_cast<const Packed<kVec, T>*>(h.x.data + at.in(h.x.rows));
    T* y = h.y.data + at.row * h.times * h.x.channels + at.channel;
    for (int64_t i = 0; i < h.times; ++i) {
      *reinterpret_cast<Packed<kVec, T>*>(y + i * h.x.channels) = x;
    }
  }
};

template <class T>
struct RepeatBackward {
  RepeatHeads<T> h;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    T* at_x = h.x.grad + at.in(h.x.rows);
    const T* at_y = h.y.grad + at.row * h.times * h.x.channels + at.channel;
    float dx[kVec];
    load_n<kVec>(at_x, dx);
#pragma unroll 4
    for (int64_t i = 0; i < h.times; ++i) {
      float dy[kVec];
      load_n<kVec>(at_y + i * h.x.channels, dy);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        dx[j] += dy[j];
      }
    }
    store_n<kVec>(at_x, dx);
  }
};

template <class T, class Body>
void run_repeat(const RepeatHeads<T>& h, const Launch& on, const char* operation,
                const Body& body) {
  constexpr int64_t kVec = 16 / sizeof(T);
  run_each(on, operation, h.x, aligned(h.x, kVec) && aligned(h.y, kVec), false, body);
}

// --- Heads of two mixers, mixed by a gate each.
template <class T>
__device__ float open_share(const MixHeads<T>& h, int64_t row) {
  return h.is_closed(row) ? 0.0F : sigmoid(load(h.gate.row(row)));
}

template <class T>
struct MixForward {
  MixHeads<T> h;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    const float s = open_share(h, at.row);
    float a[kVec];
    float b[kVec];
    load_n<kVec>(h.a.data + at.in(h.a.rows), a);
    load_n<kVec>(h.b.data + at.in(h.b.rows), b);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      a[i] = s * a[i] + (1.0F - s) * b[i];
    }
    store_n<kVec>(h.y.data + at.element, a);
  }
};

/// A warp takes a head of a token.
template <class T>
__global__ void __launch_bounds__(kThreads) mix_backward(MixHeads<T> h) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= h.a.count()) {
    return;
  }
  const float s = open_share(h, row);
  const T* a = h.a.row(row);
  const T* b = h.b.row(row);
  const T* y = h.y.grad_row(row);
  float sum = 0.0F;
  for (int64_t c = threadIdx.x % 32; c < h.a.channels; c += 32) {
    const float dy = load(y + c);
    sum += dy * (load(a + c) - load(b + c));
    if (h.a.grad != nullptr) {
      add_to(h.a.grad_row(row) + c, s * dy);
    }
    if (h.b.grad != nullptr) {
      add_to(h.b.grad_row(row) + c, (1.0F - s) * dy);
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0 && h.gate.grad != nullptr) {
    add_to(h.gate.grad_row(row), s * (1.0F - s) * sum);
  }
}

template <class T>
void run_mix_forward(const MixHeads<T>& h, const Launch& on) {
  constexpr int64_t kVec = 16 / sizeof(T);
  const bool vectors = aligned(h.a, kVec) && aligned(h.b, kVec) && aligned(h.y, kVec);
  run_each(on, "mix_heads", h.a, vectors, false, MixForward<T>{h});
}

template <class T>
void run_mix_backward(const MixHeads<T>& h, const Launch& on) {
  launch(on, "mix_heads's gradient", mix_backward<T>,
         static_cast<unsigned>(ceil_div(h.a.count(), kThreads / 32)), kThreads, 0, h);
}

}  // namespace

void multiply_forward(const Pointwise<float>& p, const Launch& on) {
  run_product<PairForward>(p, on, "multiply", Product{});
}
void multiply_forward(const Pointwise<bf16>& p, const Launch& on) {
  run_product<PairForward>(p, on, "multiply", Product{});
}
void multiply_backward(const Pointwise<float>& p, const Launch& on) {
  run_product<PairBackward>(p, on, "multiply's gradient", Product{});
}
void multiply_backward(const Pointwise<bf16>& p, const Launch& on) {
  run_product<PairBackward>(p, on, "multiply's gradient", Product{});
}

void scale_blocks_forward(const ScaleBlocks<float>& s, const Launch& on) {
  run_scale_blocks(s, on, "scale_blocks", ScaleBlocksForward<float>{s});
}
void scale_blocks_forward(const ScaleBlocks<bf16>& s, const Launch& on) {
  run_scale_blocks(s, on, "scale_blocks", ScaleBlocksForward<bf16>{s});
}
void scale_blocks_backward(const ScaleBlocks<float>& s, const Launch& on) {
  run_scale_blocks(s, on, "scale_blocks's gradient", ScaleBlocksBackward<float>{s});
}
void scale_blocks_backward(const ScaleBlocks<bf16>& s, const Launch& on) {
  run_scale_blocks(s, on, "scale_blocks's gradient", ScaleBlocksBackward<bf16>{s});
}

void sigmoid_gate_forward(const Pointwise<float>& p, const Launch& on) {
  run_product<PairForward>(p, on, "sigmoid_gate", SigmoidGate<float>{});
}
void sigmoid_gate_forward(const Pointwise<bf16>& p, const Launch& on) {
  run_product<PairForward>(p, on, "sigmoid_gate", SigmoidGate<bf16>{});
}
void sigmoid_gate_backward(const Pointwise<float>& p, const Launch& on) {
  run_product<PairBackward>(p, on, "sigmoid_gate's gradient", SigmoidGate<float>{});
}
void sigmoid_gate_backward(const Pointwise<bf16>& p, const Launch& on) {
  run_product<PairBackward>(p, on, "sigmoid_gate's gradient", SigmoidGate<bf16>{});
}

void sigmoid_forward(const Sigmoid<float>& s, const Launch& on) {
  run_sigmoid(s, on, "sigmoid", SigmoidForward<float>{s});
}
void sigmoid_forward(const Sigmoid<bf16>& s, const Launch& on) {
  run_sigmoid(s, on, "sigmoid", SigmoidForward<bf16>{s});
}
void sigmoid_backward(const Sigmoid<float>& s, const Launch& on) {
  run_sigmoid(s, on, "sigmoid's gradient", SigmoidBackward<float>{s});
}
void sigmoid_backward(const Sigmoid<bf16>& s, const Launch& on) {
  run_sigmoid(s, on, "sigmoid's gradient", SigmoidBackward<bf16>{s});
}

void add_scaled_forward(const AddScaled<float>& s, const Launch& on) {
  run_add_scaled(s, on, "add_scaled", AddScaledForward<float>{s});
}
void add_scaled_forward(const AddScaled<bf16>& s, const Launch& on) {
  run_add_scaled(s, on, "add_scaled", AddScaledForward<bf16>{s});
}
void add_scaled_backward(const AddScaled<float>& s, const Launch& on) {
  run_add_scaled(s, on, "add_scaled's gradient", AddScaledBackward<float>{s});
}
void add_scaled_backward(const AddScaled<bf16>& s, const Launch& on) {
  run_add_scaled(s, on, "add_scaled's gradient", AddScaledBackward<bf16>{s});
}

void step_size_forward(const PerHead<float>& h, const Launch& on) {
  run_head_forward(h, on, "step_size", StepSize{h.lo, h.hi});
}
void step_size_forward(const PerHead<bf16>& h, const Launch& on) {
  run_head_forward(h, on, "step_size", StepSize{h.lo, h.hi});
}
void step_size_backward(const PerHead<float>& h, const Launch& on) {
  run_head_backward(h, on, "step_size's gradient", StepSize{h.lo, h.hi});
}
void step_size_backward(const PerHead<bf16>& h, const Launch& on) {
  run_head_backward(h, on, "step_size's gradient", StepSize{h.lo, h.hi});
}

void log_decay_forward(const PerHead<float>& h, const Launch& on) {
  run_head_forward(h, on, "log_decay", LogDecay{});
}
void log_decay_forward(const PerHead<bf16>& h, const Launch& on) {
  run_head_forward(h, on, "log_decay", LogDecay{});
}
void log_decay_backward(const PerHead<float>& h, const Launch& on) {
  run_head_backward(h, on, "log_decay's gradient", LogDecay{});
}
void log_decay_backward(const PerHead<bf16>& h, const Launch& on) {
  run_head_backward(h, on, "log_decay's gradient", LogDecay{});
}

void bounded_decay_forward(const PerHead<float>& h, const Launch& on) {
  run_head_forward(h, on, "bounded_decay", BoundedDecay{h.lo});
}
void bounded_decay_forward(const PerHead<bf16>& h, const Launch& on) {
  run_head_forward(h, on, "bounded_decay", BoundedDecay{h.lo});
}
void bounded_decay_backward(const PerHead<float>& h, const Launch& on) {
  run_head_backward(h, on, "bounded_decay's gradient", BoundedDecay{h.lo});
}
void bounded_decay_backward(const PerHead<bf16>& h, const Launch& on) {
  run_head_backward(h, on, "bounded_decay's gradient", BoundedDecay{h.lo});
}

void repeat_heads_forward(const RepeatHeads<float>& h, const Launch& on) {
  run_repeat(h, on, "repeat_heads", RepeatForward<float>{h});
}
void repeat_heads_forward(const RepeatHeads<bf16>& h, const Launch& on) {
  run_repeat(h, on, "repeat_heads", RepeatForward<bf16>{h});
}
void repeat_heads_backward(const RepeatHeads<float>& h, const Launch& on) {
  run_repeat(h, on, "repeat_heads's gradient", RepeatBackward<float>{h});
}
void repeat_heads_backward(const RepeatHeads<bf16>& h, const Launch& on) {
  run_repeat(h, on, "repeat_heads's gradient", RepeatBackward<bf16>{h});
}

void mix_heads_forward(const MixHeads<float>& h, const Launch& on) {
  run_mix_forward(h, on);
}
void mix_heads_forward(const MixHeads<bf16>& h, const Launch& on) {
  run_mix_forward(h, on);
}
void mix_heads_backward(const MixHeads<float>& h, const Launch& on) {
  run_mix_backward(h, on);
}
void mix_heads_backward(const MixHeads<bf16>& h, const Launch& on) {
  run_mix_backward(h, on);
}

}  // namespace cambium::cuda
