// The walk of kernels that go element by element: a thread takes 16 bytes of elements (one element
// where a view cannot be read so) of every input and writes them. Where all views are contiguous
// the rows do not matter and an element's number is its offset.
#pragma once

#include "ops/cuda.cuh"
#include "ops/pair_sets.h"
#include "tensor/view.h"

namespace cambium::cuda::elements {

constexpr int kThreads = 256;

/// The first of the elements of a thread: of contiguous results, and of a row of the inputs.
template <bool kFlat>
struct Place {
  int64_t element, row, channel;

  __device__ int64_t in(const Rows& rows) const {
    return kFlat ? element : rows.offset(row) + channel;
  }
};

template <int kVec, bool kFlat, class Body>
__global__ void __launch_bounds__(kThreads)
    each_element(Body body, int64_t count, int64_t channels) {
  const int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  await_inputs();
  if (e < count) {
    if constexpr (kFlat) {
      body.template operator()<kVec>(Place<kFlat>{e, 0, 0});
    } else {
      body.template operator()<kVec>(Place<kFlat>{e, e / channels, e % channels});
    }
  }
}

template <class T>
bool flat(const View<T>& v) {
  return v.rows.outer_stride == v.rows.inner * v.channels &&
         (v.rows.inner == 1 || v.rows.inner_stride == v.channels);
}

/// Runs `body` over the elements of x. `vectors`: 16 bytes of x at a time can be taken; `is_flat`:
/// all views are contiguous.
template <class T, class Body>
void run_each(const Launch& on, const char* operation, const View<T>& x, bool vectors, bool is_flat,
              const Body& body) {
  constexpr int kVec = 16 / sizeof(T);
  const int64_t count = x.count() * x.channels;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads * (vectors ? kVec : 1)));
  const auto kernel =
      vectors ? is_flat ? each_element<kVec, true, Body> : each_element<kVec, false, Body>
              : each_element<1, false, Body>;
  launch_ahead(on, operation, kernel, blocks, kThreads, 0, body, count, x.channels);
}

/// y = f(a, b), or f(a, 1) without a second input.
template <bool kTwo, class T, class F>
struct PairForward {
  View<T> a, b, y;
  F f;
  PairSets sets;  // of PairBackward

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    float left[kVec];
    float right[kVec];
    load_n<kVec>(a.data + at.in(a.rows), left);
    if constexpr (kTwo) {
      load_n<kVec>(b.data + at.in(b.rows), right);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      left[i] = f(left[i], kTwo ? right[i] : 1.0F);
    }
    store_n<kVec>(y.data + at.element, left);
  }
};

struct PairGrad {
  float a, b;
};

/// da += f(a, b, dy).a, db += f(a, b, dy).b, of those that are wanted; or set.
template <bool kTwo, class T, class F>
struct PairBackward {
  View<T> a, b, y;
  F f;
  PairSets sets;

  template <int kVec, class At>
  __device__ void operator()(const At& at) const {
    const int64_t at_a = at.in(a.rows);
    const int64_t at_b = kTwo ? at.in(b.rows) : 0;
    // a and b may be one tensor, whose gradient then takes both parts at once.
    const bool one_grad = kTwo && a.grad == b.grad;
    const bool wants_b = kTwo && b.grad != nullptr && !one_grad;
    float left[kVec];
    float right[kVec];
    float dy[kVec];
    float da[kVec] = {};
    float db[kVec] = {};
    load_n<kVec>(a.data + at_a, left);
    if constexpr (kTwo) {
      load_n<kVec>(b.data + at_b, right);
    }
    load_n<kVec>(y.grad + at.element, dy);
    if (a.grad != nullptr && !sets.a) {
      load_n<kVec>(a.grad + at_a, da);
    }
    if (wants_b && !sets.b) {
      load_n<kVec>(b.grad + at_b, db);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const PairGrad d = f(left[i], kTwo ? right[i] : 1.0F, dy[i]);
      da[i] += d.a;
      db[i] += d.b;
      da[i] += one_grad ? db[i] : 0.0F;
    }
    if (a.grad != nullptr) {
      store_n<kVec>(a.grad + at_a, da);
    }
    if (wants_b) {
      store_n<kVec>(b.grad + at_b, db);
    }
  }
};

/// Runs PairForward or PairBackward with f; b may be undefined.
template <template <bool, class, class> class Body, class T, class F>
void run_pairs(const Launch& on, const char* operation, const View<T>& a, const View<T>& b,
               const View<T>& y, const F& f, const PairSets& sets) {
  constexpr int64_t kVec = 16 / sizeof(T);
  const bool vectors = aligned(a, kVec) && aligned(y, kVec);
  if (b.defined()) {
    run_each(on, operation, a, vectors && aligned(b, kVec), flat(a) && flat(b),
             Body<true, T, F>{a, b, y, f, sets});
  } else {
    run_each(on, operation, a, vectors, flat(a), Body<false, T, F>{a, b, y, f, sets});
  }
}

}  // namespace cambium::cuda::elements
