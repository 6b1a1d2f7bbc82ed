// The walk of kernels that go element by element: a thread takes 16 bytes of elements (one element
// where a view cannot be read so) of every input and writes them. Where all views are contiguous
// the rows do not matter and an element's number is its offset.
#pragma once

#include "ops/cuda.cuh"
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

}  // namespace cambium::cuda::elements
