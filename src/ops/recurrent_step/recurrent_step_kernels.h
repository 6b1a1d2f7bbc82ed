// Private to the operation: what its definition and its kernels are given.
#pragma once

#include "ops/kernel.h"
#include "ops/segment_walk.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct RecurrentStep {
  SegmentWalk segments;  // of one token each
  int64_t heads, q_heads, k_heads, v_heads;
  int64_t key_dim;                 // K
  int64_t dim;                     // V
  int64_t q_from, k_from, v_from;  // first channels
  View<T> x;                       // (T, C)
  View<Sum<T>> conv_weight;        // (C, taps)
  View<Sum<T>> conv_bias;          // (C), or undefined
  Sum<T>* conv;                    // (slots, C, taps - 1): the inputs before; leaves those after
  float unit_eps;                  // 0: q and k keep their length
  float q_scale;
  int64_t half;  // pairs of a key that turn; 0 = none
  bool interleaved;
  const float* cos;               // (T, half)
  const float* sin;               // (T, half)
  const int32_t* position;        // (T): the definition turns by position * frequency, times
  const float* const* frequency;  // amplitude
  float amplitude;
  View<T> decay;         // (T, H) or (T, H K)
  View<T> weight;        // (T, H), or undefined
  View<Sum<T>> a_log;    // (H)
  View<Sum<T>> dt_bias;  // as a row of decay
  View<Sum<T>> skip;     // (H), or undefined
  View<T> z;             // (T, H V)
  View<Sum<T>> norm;     // of head h: at h * norm_step; or undefined
  Sum<T>* state;         // (slots, H, K, V)
  View<T> y;             // (T, H V) contiguous
  int64_t norm_step;     // V, or 0 where heads share the weight
  float strongest, bound, norm_eps;
  bool delta, gate_first, sigmoid;

  constexpr int64_t channels() const { return x.channels; }
  constexpr int64_t taps() const { return conv_weight.channels; }
  constexpr int64_t q_channel(int64_t h) const { return q_from + h / (heads / q_heads) * key_dim; }
  constexpr int64_t k_channel(int64_t h) const { return k_from + h / (heads / k_heads) * key_dim; }
  constexpr int64_t v_channel(int64_t h) const { return v_from + h / (heads / v_heads) * dim; }
  /// Where key channel i of head h has its decay.
  constexpr int64_t decay_at(int64_t h, int64_t i) const {
    return decay.channels == heads ? h : h * key_dim + i;
  }
  constexpr Sum<T>* conv_of(int64_t segment) const {
    return conv + segments.row(segment) * channels() * (taps() - 1);
  }
  constexpr Sum<T>* state_of(int64_t segment, int64_t head) const {
    return state + (segments.row(segment) * heads + head) * key_dim * dim;
  }
};

CAMBIUM_PLANNED_KERNEL(recurrent_step_forward, RecurrentStep)

namespace cuda {
/// Whether the current device has what the kernel is made of.
bool has_recurrent_step();
}  // namespace cuda

}  // namespace cambium
