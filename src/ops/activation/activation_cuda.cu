// The functions inside feed-forwards, by the walk of ops/elements.cuh. xIELU's two numbers get
// their gradients from sums of rows, which a second kernel adds in order.
#include "ops/activation/activation_kernels.h"
#include "ops/elements.cuh"

namespace cambium::cuda {
namespace {

using namespace elements;

/// f(x) and df/dx.
struct Activated {
  float value, slope;
};

struct Silu {
  template <class T>
  __device__ static Activated at(float x) {
    const float s = sigmoid_of<T>(x);
    return {x * s, s * (1.0F + x * (1.0F - s))};
  }
};

struct Relu2 {
  template <class T>
  __device__ static Activated at(float x) {
    const float r = x > 0.0F ? x : 0.0F;
    return {r * r, 2.0F * r};
  }
};

struct Gelu {
  template <class T>
  __device__ static Activated at(float x) {
    const float phi = normcdff(x);
    return {x * phi, phi + x * expf(-0.5F * x * x) * 0.39894228040143268F};
  }
};

struct GeluTanh {
  template <class T>
  __device__ static Activated at(float x) {
    constexpr float kSlope = 1.5957691216057308F;  // 2 sqrt(2 / pi)
    constexpr float kCubic = 0.044715F;
    const float s = sigmoid_of<T>(kSlope * x * (1.0F + kCubic * x * x));
    return {x * s, s + x * s * (1.0F - s) * kSlope * (1.0F + 3.0F * kCubic * x * x)};
  }
};

template <class T, class F>
struct Gated {
  __device__ float operator()(float x, float up) const { return F::template at<T>(x).value * up; }
  __device__ PairGrad operator()(float x, float up, float dy) const {
    const Activated f = F::template at<T>(x);
    return {dy * up * f.slope, dy * f.value};
  }
};

template <template <bool, class, class> class Body, class T>
void run_activation(const Activate<T>& a, const Launch& on, const char* operation) {
  with_kind<Silu, Relu2, Gelu, GeluTanh>(a.kind, [&]<class F>(F) {
    run_pairs<Body>(on, operation, a.x, a.up, a.y, Gated<T, F>{}, a.sets);
  });
}

// --- Clamped SwiGLU
template <class T>
struct Clamped {
  float limit;

  __device__ float clamp_gate(float x) const { return x > limit ? limit : x; }
  __device__ float clamp_up(float x) const { return x > limit ? limit : x < -limit ? -limit : x; }
  __device__ float operator()(float gate, float up) const {
    const float g = clamp_gate(gate);
    return (clamp_up(up) + 1.0F) * g * sigmoid_of<T>(kClampedSlope * g);
  }
  __device__ PairGrad operator()(float gate, float up, float dy) const {
    const float g = clamp_gate(gate);
    const float u = clamp_up(up);
    const float s = sigmoid_of<T>(kClampedSlope * g);
    const float slope = s * (1.0F + kClampedSlope * g * (1.0F - s));
    return {gate <= limit ? dy * (u + 1.0F) * slope : 0.0F, up == u ? dy * g * s : 0.0F};
  }
};

template <template <bool, class, class> class Body, class T>
void run_clamped(const ClampedSwiglu<T>& a, const Launch& on, const char* operation) {
  run_pairs<Body>(on, operation, a.gate, a.up, a.y, Clamped<T>{a.limit}, a.sets);
}

// --- xIELU
__device__ float softplus(float x) {
  return x > 20.0F ? x : log1pf(expf(x));
}

/// The function's numbers beside x.
struct XieluNumbers {
  template <class T>
  __device__ explicit XieluNumbers(const Xielu<T>& a)
      : beta(a.beta),
        eps(a.eps),
        p(softplus(a.alpha_p.data[0])),
        n(a.beta + softplus(a.alpha_n.data[0])) {}
  /// expm1(min(x, eps)) - x
  __device__ float low(float x) const { return expm1f(x < eps ? x : eps) - x; }
  float beta, eps, p, n;
};

template <class T>
struct XieluForward {
  Xielu<T> a;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    const XieluNumbers k(a);
    float x[kVec];
    load_n<kVec>(a.x.data + at.in(a.x.rows), x);
#pragma unroll
    for (float& v : x) {
      v = (v > 0.0F ? k.p * v * v : k.n * k.low(v)) + k.beta * v;
    }
    store_n<kVec>(a.y.data + at.element, x);
  }
};

/// A block takes a row.
template <class T>
__global__ void __launch_bounds__(kThreads) xielu_rows(Xielu<T> a) {
  const XieluNumbers k(a);
  const int64_t r = blockIdx.x;
  const T* row = a.x.row(r);
  const T* dy_row = a.y.grad_row(r);
  T* dx_row = a.x.grad == nullptr ? nullptr : a.x.grad_row(r);
  float dp = 0.0F;
  float dn = 0.0F;
  for (int64_t c = threadIdx.x; c < a.x.channels; c += kThreads) {
    const float x = load(row + c);
    const float dy = load(dy_row + c);
    if (dx_row != nullptr) {
      const float rise = x < k.eps ? expf(x) : 0.0F;
      const float slope = x > 0.0F ? 2.0F * k.p * x : k.n * (rise - 1.0F);
      add_to(dx_row + c, dy * (slope + k.beta));
    }
    dp += x > 0.0F ? dy * x * x : 0.0F;
    dn += x > 0.0F ? 0.0F : dy * k.low(x);
  }
  dp = block_sum<kThreads>(dp);
  dn = block_sum<kThreads>(dn);
  if (threadIdx.x == 0) {
    a.sums[r] = dp;
    a.sums[a.x.count() + r] = dn;
  }
}

/// Block 0 adds up for alpha_p, block 1 for alpha_n.
template <class T>
__global__ void __launch_bounds__(kThreads) xielu_sums(Xielu<T> a) {
  const auto& alpha = blockIdx.x == 0 ? a.alpha_p : a.alpha_n;
  if (alpha.grad == nullptr) {
    return;
  }
  const int64_t rows = a.x.count();
  float sum = 0.0F;
  for (int64_t r = threadIdx.x; r < rows; r += kThreads) {
    sum += a.sums[blockIdx.x * rows + r];
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    const float raw = alpha.data[0];
    alpha.grad[0] += sum * (raw > 20.0F ? 1.0F : sigmoid(raw));
  }
}

template <class T>
void run_xielu_forward(const Xielu<T>& a, const Launch& on) {
  constexpr int64_t kVec = 16 / sizeof(T);
  run_each(on, "xielu", a.x, aligned(a.x, kVec) && aligned(a.y, kVec), flat(a.x),
           XieluForward<T>{a});
}

template <class T>
void run_xielu_backward(const Xielu<T>& a, const Launch& on) {
  constexpr const char* kName = "xielu's gradient";
  launch(on, kName, xielu_rows<T>, static_cast<unsigned>(a.x.count()), kThreads, 0, a);
  launch(on, kName, xielu_sums<T>, a.x.count() == 0 ? 0U : 2U, kThreads, 0, a);
}

// --- cap tanh(x / cap), and the gradient through it
template <class T>
struct SoftCapBody {
  SoftCap<T> a;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    float x[kVec];
    load_n<kVec>(a.x.data + at.element, x);
    if (a.y.defined()) {
      float y[kVec];
      load_n<kVec>(a.y.data + at.element, y);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        y[i] /= a.cap;
        x[i] *= 1.0F - y[i] * y[i];
      }
    } else {
#pragma unroll
      for (float& v : x) {
        v = a.cap * tanhf(v / a.cap);
      }
    }
    store_n<kVec>(a.x.data + at.element, x);
  }
};

template <class T>
void run_soft_cap(const SoftCap<T>& a, const Launch& on) {
  constexpr int64_t kVec = 16 / sizeof(T);
  run_each(on, "soft_cap", a.x, aligned(a.x, kVec) && (!a.y.defined() || aligned(a.y, kVec)), true,
           SoftCapBody<T>{a});
}

}  // namespace

void activation_forward(const Activate<float>& a, const Launch& on) {
  run_activation<PairForward>(a, on, "activation");
}
void activation_forward(const Activate<bf16>& a, const Launch& on) {
  run_activation<PairForward>(a, on, "activation");
}
void activation_backward(const Activate<float>& a, const Launch& on) {
  run_activation<PairBackward>(a, on, "activation's gradient");
}
void activation_backward(const Activate<bf16>& a, const Launch& on) {
  run_activation<PairBackward>(a, on, "activation's gradient");
}
void clamped_swiglu_forward(const ClampedSwiglu<float>& a, const Launch& on) {
  run_clamped<PairForward>(a, on, "clamped_swiglu");
}
void clamped_swiglu_forward(const ClampedSwiglu<bf16>& a, const Launch& on) {
  run_clamped<PairForward>(a, on, "clamped_swiglu");
}
void clamped_swiglu_backward(const ClampedSwiglu<float>& a, const Launch& on) {
  run_clamped<PairBackward>(a, on, "clamped_swiglu's gradient");
}
void clamped_swiglu_backward(const ClampedSwiglu<bf16>& a, const Launch& on) {
  run_clamped<PairBackward>(a, on, "clamped_swiglu's gradient");
}
void xielu_forward(const Xielu<float>& a, const Launch& on) {
  run_xielu_forward(a, on);
}
void xielu_forward(const Xielu<bf16>& a, const Launch& on) {
  run_xielu_forward(a, on);
}
void xielu_backward(const Xielu<float>& a, const Launch& on) {
  run_xielu_backward(a, on);
}
void xielu_backward(const Xielu<bf16>& a, const Launch& on) {
  run_xielu_backward(a, on);
}

void soft_cap_rows(const SoftCap<float>& a, const Launch& on) {
  run_soft_cap(a, on);
}
void soft_cap_rows(const SoftCap<bf16>& a, const Launch& on) {
  run_soft_cap(a, on);
}

}  // namespace cambium::cuda
