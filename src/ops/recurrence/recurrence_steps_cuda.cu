// The recurrence token by token, for any dims and types: one block per segment, head and 64 columns
// of the value, the state in registers from the segment's first token to its last. It is what
// decodes (the state is read and written once, 16 bytes a thread, all its loads in flight at once)
// and what computes where the chunk form does not.
#include "ops/recurrence/recurrence_cuda.cuh"

namespace cambium::cuda {
namespace {

template <class T, int kRows>
__global__ void __launch_bounds__(kStepThreads, kRows <= 16 ? 3 : 1)
    steps_kernel(Recurrence<T> a, const int32_t* first_chunk, RecurrenceKept kept, int64_t end,
                 bool wide) {
  extern __shared__ float4 shared[];
  auto* q = reinterpret_cast<float*>(shared);
  float* k = q + kStepTokens<kRows> * kKeyPad<kRows>;
  float* decay = k + kStepTokens<kRows> * kKeyPad<kRows>;
  float* v = decay + kStepTokens<kRows> * kKeyPad<kRows>;
  float* weight = v + kStepTokens<kRows> * kStepColumns;
  await_inputs();
  const int64_t slices = (a.dim + kStepColumns - 1) / kStepColumns;
  const int64_t slice = blockIdx.x % slices;
  const int64_t h = blockIdx.x / slices % a.heads;
  const int64_t segment = blockIdx.x / slices / a.heads;
  const StepLane<kRows> at(slice);
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  if (length >= end) {
    return;
  }
  const int64_t position = a.segments.position[segment];
  float* state = a.state_of(segment, h);
  float s[kRows][4];
  load_state<kRows>(position > 0 ? state : nullptr, a.key_dim, a.dim, at, wide, s);
  const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
  const bool writes = threadIdx.x % 32 < 4 && at.column < a.dim;
  for (int64_t from = 0; from < length; from += kStepTokens<kRows>) {
    const int n =
        static_cast<int>(length - from < kStepTokens<kRows> ? length - from : kStepTokens<kRows>);
    __syncthreads();
    stage_keys<T, kRows>(a, begin + from, n, h, q, k, decay);
    stage_columns(a.v.at(begin + from, h * a.dim), a.v.rows.outer_stride, n, slice, a.dim, v);
    stage_weights(a, begin + from, n, h, weight);
    __syncthreads();
    for (int token = 0; token < n; ++token) {
      const int64_t t = begin + from + token;
      const int64_t in_chunks = position % kChunkTokens + from + token;
      if (kept.states != nullptr && (from + token == 0 || in_chunks % kChunkTokens == 0)) {
        const int64_t chunk = first_chunk[segment] + in_chunks / kChunkTokens;
        store_state<kRows>(kept.states + (chunk * a.heads + h) * a.key_dim * a.dim, a.key_dim,
                           a.dim, at, wide, s);
      }
      const float* q_row = q + token * kKeyPad<kRows> + at.key;
      const float* k_row = k + token * kKeyPad<kRows> + at.key;
      const float* decay_row = decay + token * kKeyPad<kRows> + at.key;
      float value[4];
      load_n<4>(v + token * kStepColumns + at.column % kStepColumns, value);
      float read[4] = {};
#pragma unroll
      for (int r = 0; r < kRows; r += 4) {
        float d[4];
        float key[4];
        load_n<4>(decay_row + r, d);
        load_n<4>(k_row + r, key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            s[r + i][c] *= d[i];
            read[c] = fmaf(s[r + i][c], key[i], read[c]);
          }
        }
      }
      float written[4] = {value[0], value[1], value[2], value[3]};
      if (a.delta) {
        sum_over_rows(read);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          written[c] -= read[c];
        }
        if (kept.errors != nullptr && writes) {
          store_columns(kept.errors + (t * a.heads + h) * a.dim, at.column, a.dim, wide, written);
        }
      }
      const float w = weight[token];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        written[c] *= w;
      }
      float y[4] = {};
#pragma unroll
      for (int r = 0; r < kRows; r += 4) {
        float key[4];
        float query[4];
        load_n<4>(k_row + r, key);
        load_n<4>(q_row + r, query);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            s[r + i][c] = fmaf(key[i], written[c], s[r + i][c]);
            y[c] = fmaf(s[r + i][c], query[i], y[c]);
          }
        }
      }
      sum_over_rows(y);
      if (writes) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          y[c] = fmaf(skip, value[c], y[c]);
        }
        store_columns(a.y.at(t, h * a.dim), at.column, a.dim, wide, y);
      }
    }
  }
  if (state != nullptr) {
    store_state<kRows>(state, a.key_dim, a.dim, at, wide, s);
  }
}

}  // namespace

template <class T>
void recurrence_steps(const Recurrence<T>& a, const DeviceSegments& segments,
                      const DeviceChunks& chunks, int64_t end, const Launch& on) {
  Recurrence<T> on_device = a;
  on_device.segments = segments.walk;
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  const bool wide =
      a.dim % 4 == 0 && aligned(a.state, 16) && aligned(a.y.data, 16) && aligned(a.kept, 16);
  const int64_t blocks = a.segments.count * a.heads * ceil_div(a.dim, kStepColumns);
  with_key_rows("recurrence", a.key_dim, [&]<int kRows>() {
    constexpr size_t kShared =
        sizeof(float) * kStepTokens<kRows> * (3 * kKeyPad<kRows> + kStepColumns + 1);
    launch_ahead(on, "recurrence", steps_kernel<T, kRows>, static_cast<unsigned>(blocks),
                 kStepThreads, kShared, on_device, chunks.first, kept, end, wide);
  });
}

template void recurrence_steps(const Recurrence<float>&, const DeviceSegments&, const DeviceChunks&,
                               int64_t, const Launch&);
template void recurrence_steps(const Recurrence<bf16>&, const DeviceSegments&, const DeviceChunks&,
                               int64_t, const Launch&);

}  // namespace cambium::cuda
