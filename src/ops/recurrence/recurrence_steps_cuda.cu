// The recurrence token by token: one block per segment, head and 64 columns of the value, the state
// in registers from the segment's first token to its last.
//
// token_kernel is for segments of one token, which is to say decoding, with the key dims that
// models have: the state is read and written once, 16 bytes a thread, a row by neighbours, all its
// loads in flight at once. Nobody reads a state again before the next step, and so it is the first
// to leave the L2, where it would be in the way of the next reads. steps_kernel is for any dims and
// lengths: it computes where the chunk form does not.
#include "ops/cuda_bulk.cuh"
#include "ops/recurrence/recurrence_cuda.cuh"

namespace cambium::cuda {
namespace {

template <class T, int kRows>
__global__ void __launch_bounds__(kStepThreads, kRows <= 16 ? 3 : 1)
    steps_kernel(Recurrence<T> a, const int32_t* first_chunk, RecurrenceKept kept, int64_t end,
                 bool wide, bool tokens_elsewhere) {
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
  if (length >= end || (tokens_elsewhere && length == 1)) {
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

// --- One token.
constexpr int kTokenRows = 16;  // of the state, a thread

// Groups of kLanes lanes have 16 rows and 4 kLanes columns each. Every group takes S' k, S' q and
// k q of its rows from the decayed state; from their sums, in the groups' order, each knows what is
// written, and the first one y = S' q + (k q) written. kKeys: the most rows of a state; threads:
// kLanes for 16 of its rows.
template <class T, int kKeys, int kLanes>
__global__ void __launch_bounds__(kKeys / kTokenRows * kLanes, 512 / (kKeys / kTokenRows * kLanes))
    token_kernel(Recurrence<T> a) {
  constexpr int kGroups = kKeys / kTokenRows;  // most that share a column
  constexpr int kColumns = 4 * kLanes;         // of the state, a block's
  static_assert(kGroups * kLanes >= kKeys && kColumns <= kGroups * kLanes);
  __shared__ __align__(16) float q[kKeys];
  __shared__ __align__(16) float k[kKeys];
  __shared__ __align__(16) float decay[kKeys];
  __shared__ __align__(16) float v[kColumns];
  __shared__ __align__(16) float reads[kGroups][kColumns];
  __shared__ __align__(16) float results[kGroups][kColumns];
  __shared__ float products[kGroups];
  __shared__ float weight;
  const auto thread = static_cast<int>(threadIdx.x);
  const int group = thread / kLanes;
  const int lane = thread % kLanes;
  const int first_row = group * kTokenRows;
  const uint64_t policy = first_to_leave();
  await_inputs();
  const int64_t slices = a.dim / kColumns;
  const int64_t slice = blockIdx.x % slices;
  const int64_t h = blockIdx.x / slices % a.heads;
  const int64_t segment = blockIdx.x / slices / a.heads;
  const int64_t t = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const bool continues = a.segments.position[segment] > 0;
  if (length > 1 || (length == 0 && continues)) {
    return;
  }
  float* state = a.state_of(segment, h);
  if (state != nullptr) {
    state += first_row * a.dim + slice * kColumns + lane * 4;
  }
  float s[kTokenRows][4] = {};
  if (length == 1 && continues && state != nullptr) {
#pragma unroll
    for (int r = 0; r < kTokenRows; ++r) {
      load_once(state + r * a.dim, policy, s[r]);
    }
  }
  if (length == 1) {
    if (thread < a.key_dim) {
      const int64_t key = a.key_head(h) * a.key_dim + thread;
      q[thread] = load(a.q.at(t, key));
      k[thread] = load(a.k.at(t, key));
      decay[thread] = expf(*a.log_decay.at(t, a.decay_per_channel ? h * a.key_dim + thread : h));
    }
    if (thread < kColumns) {
      v[thread] = load(a.v.at(t, h * a.dim + slice * kColumns + thread));
    }
    if (thread == 0) {
      weight = a.weight.defined() ? *a.weight.at(t, h) : 1.0F;
    }
    __syncthreads();
    float read[4] = {};
    float y[4] = {};
    float product = 0.0F;
#pragma unroll
    for (int r = 0; r < kTokenRows; r += 4) {
      float query[4];
      float keys[4];
      float d[4];
      load_n<4>(q + first_row + r, query);
      load_n<4>(k + first_row + r, keys);
      load_n<4>(decay + first_row + r, d);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        product = fmaf(query[i], keys[i], product);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          s[r + i][c] *= d[i];
          read[c] = fmaf(s[r + i][c], keys[i], read[c]);
          y[c] = fmaf(s[r + i][c], query[i], y[c]);
        }
      }
    }
    store_n<4>(reads[group] + lane * 4, read);
    store_n<4>(results[group] + lane * 4, y);
    if (lane == 0) {
      products[group] = product;
    }
    __syncthreads();
    const int groups = static_cast<int>(a.key_dim) / kTokenRows;
    float value[4];
    float written[4];
    load_n<4>(v + lane * 4, value);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      written[c] = value[c];
    }
    if (a.delta) {
      float all[4] = {};
      for (int g = 0; g < groups; ++g) {
        load_n<4>(reads[g] + lane * 4, read);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          all[c] += read[c];
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        written[c] -= all[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      written[c] *= weight;
    }
    if (group == 0) {
      float all[4] = {};
      float kq = 0.0F;
      for (int g = 0; g < groups; ++g) {
        load_n<4>(results[g] + lane * 4, y);
        kq += products[g];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          all[c] += y[c];
        }
      }
      const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        all[c] = fmaf(skip, value[c], fmaf(kq, written[c], all[c]));
      }
      store_n<4>(a.y.at(t, h * a.dim + slice * kColumns + lane * 4), all);
    }
#pragma unroll
    for (int r = 0; r < kTokenRows; r += 4) {
      float keys[4];
      load_n<4>(k + first_row + r, keys);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          s[r + i][c] = fmaf(keys[i], written[c], s[r + i][c]);
        }
      }
    }
  }
  if (state != nullptr) {
#pragma unroll
    for (int r = 0; r < kTokenRows; ++r) {
      store_once(state + r * a.dim, policy, s[r]);
    }
  }
}

/// token_kernel for the columns and rows of this call's states; null where steps_kernel computes
/// its segments of one token.
template <class T>
auto find_token_kernel(const Recurrence<T>& a) -> decltype(&token_kernel<T, 128, 16>) {
  if (a.kept != nullptr || !aligned(a.state) || !aligned(a.y, 4)) {
    return nullptr;
  }
  const bool by_64 = a.dim % 64 == 0;
  switch (by_64 || a.dim % 80 == 0 ? a.key_dim : 0) {
    case 64:
    case 128:
      return by_64 ? token_kernel<T, 128, 16> : token_kernel<T, 128, 20>;
    case 256:
      return by_64 ? token_kernel<T, 256, 16> : token_kernel<T, 256, 20>;
    default:
      return nullptr;
  }
}

}  // namespace

template <class T>
void recurrence_steps(const Recurrence<T>& a, const DeviceSegments& segments,
                      const DeviceChunks& chunks, int64_t end, const Launch& on) {
  Recurrence<T> on_device = a;
  on_device.segments = segments.walk;
  const int64_t blocks = a.segments.count * a.heads * ceil_div(a.dim, kStepColumns);
  // A segment of one token goes the same way whatever else is in the call.
  const auto by_token = find_token_kernel(a);
  const bool tokens = by_token != nullptr;
  if (tokens) {
    const int64_t lanes = a.dim % 64 == 0 ? 16 : 20;
    launch_ahead(on, "recurrence", by_token,
                 static_cast<unsigned>(a.segments.count * a.heads * (a.dim / (4 * lanes))),
                 static_cast<unsigned>(a.key_dim / kTokenRows * lanes), 0, on_device);
    if (segments.longest <= 1) {
      return;
    }
  }
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  const bool wide =
      a.dim % 4 == 0 && aligned(a.state, 16) && aligned(a.y.data, 16) && aligned(a.kept, 16);
  with_key_rows("recurrence", a.key_dim, [&]<int kRows>() {
    constexpr size_t kShared =
        sizeof(float) * kStepTokens<kRows> * (3 * kKeyPad<kRows> + kStepColumns + 1);
    launch_ahead(on, "recurrence", steps_kernel<T, kRows>, static_cast<unsigned>(blocks),
                 kStepThreads, kShared, on_device, chunks.first, kept, end, wide, tokens);
  });
}

template void recurrence_steps(const Recurrence<float>&, const DeviceSegments&, const DeviceChunks&,
                               int64_t, const Launch&);
template void recurrence_steps(const Recurrence<bf16>&, const DeviceSegments&, const DeviceChunks&,
                               int64_t, const Launch&);

}  // namespace cambium::cuda
