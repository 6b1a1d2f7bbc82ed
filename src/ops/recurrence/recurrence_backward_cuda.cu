// The gradients, token by token, for any dims and types (bf16 of the usual dims has a form in
// chunks, recurrence_backward_chunks_cuda.cu). With dS the gradient by S_t of all that
// reads it, dy_t included, and e, w e what token t wrote (recurrence.h):
//
//   du = dS' k      dv = w du + skip dy      dweight = du . e
//   dq = S_t dy     dk = dS (w e) - decayed S_(t-1) (w du)       [the last term: delta only]
//
// 1. chain_kernel walks each segment backwards with dS in registers (a block per segment, head and
//    64 columns): du, and the part of dk by dS. It reads no state.
// 2. reads_kernel walks each chunk forwards from its kept state, all chunks at once: dq, and the
//    part of dk by S. What was written is kept, so neither walk waits for a sum over rows but du.
// 3. Sums over channels and heads. The gradient by a log decay follows from those by q and k:
//    x_t = S_t . (dS_t without dy_t), row by row, is the gradient by the log decay of token t + 1,
//    and
//      x_(t-1) = x_t + q * dq_t + k * (dk_t by S - dk_t by dS).
//    The walk starts anew at the end of every chunk from the kept state, so that errors do not add
//    up along a sequence.
//
// Every part has its own place in scratch memory and is summed in a fixed order.
#include <type_traits>

#include "ops/recurrence/recurrence_backward_cuda.cuh"
#include "ops/shared_limit.h"

namespace cambium::cuda {
namespace {

constexpr const char* kName = "recurrence (backward)";

// Parts of the gradients of keys, each summed over 64 columns of the value.
struct KeyParts {
  int64_t slices;
  float* dq;        // (slices, T, heads, K)
  float* dk_write;  // (slices, T, heads, K) by dS
  float* dk_read;   // (slices, T, heads, K) by S; delta only, else null
  float* end;       // (slices, chunks, heads, K) x at the ends of chunks
  float* du;        // (T, heads, V)
};

// The sums of the warps of a block, `n` rows of (kStepWarps, kKeyPad), to rows `stride` apart.
template <int kRows>
__device__ __forceinline__ void sum_warps(const float* part, int n, int64_t key_dim, float* to,
                                          int64_t stride) {
  for (int x = static_cast<int>(threadIdx.x); x < n * 8 * kRows; x += kStepThreads) {
    const int i = x % (8 * kRows);
    if (i >= key_dim) {
      continue;
    }
    const float* from = part + x / (8 * kRows) * kStepWarps * kKeyPad<kRows> + key_at<kRows>(i);
    float sum = 0.0F;
#pragma unroll
    for (int warp = 0; warp < kStepWarps; ++warp) {
      sum += from[warp * kKeyPad<kRows>];
    }
    to[x / (8 * kRows) * stride + i] = sum;
  }
}

template <class T, int kRows, int kTokens = kStepTokens<kRows>>
struct StagedTokens {
  float* q;        // (kTokens, kKeyPad)
  float* k;        // (kTokens, kKeyPad)
  float* decay;    // (kTokens, kKeyPad)
  float* dy;       // (kTokens, kStepColumns)
  float* written;  // (kTokens, kStepColumns) e
  float* du;       // (kTokens, kStepColumns)
  float* weight;   // (kTokens)
  float* part;     // (kTokens, kStepWarps, kKeyPad)
  float* part2;    // the same

  static constexpr size_t bytes(int parts) {
    return sizeof(float) * kTokens *
           ((3 + parts * kStepWarps) * kKeyPad<kRows> + 3 * kStepColumns + 1);
  }
  __device__ explicit StagedTokens(float* shared) {
    constexpr int kKeys = kTokens * kKeyPad<kRows>;
    q = shared;
    k = q + kKeys;
    decay = k + kKeys;
    part = decay + kKeys;
    dy = part + kKeys * kStepWarps;
    written = dy + kTokens * kStepColumns;
    du = written + kTokens * kStepColumns;
    part2 = du + kTokens * kStepColumns;
    // After part2 where there is one; the chain has none.
    weight = part2;
  }
  __device__ void stage(const Recurrence<T>& a, const RecurrenceKept& kept, int64_t t, int n,
                        int64_t h, int64_t slice) const {
    stage_keys<T, kRows>(a, t, n, h, q, k, decay);
    stage_columns(a.y.grad_at(t, h * a.dim), a.heads * a.dim, n, slice, a.dim, dy);
    if (kept.errors != nullptr) {
      stage_columns(kept.errors + (t * a.heads + h) * a.dim, a.heads * a.dim, n, slice, a.dim,
                    written);
    } else {
      stage_columns(a.v.at(t, h * a.dim), a.v.rows.outer_stride, n, slice, a.dim, written);
    }
    stage_weights(a, t, n, h, weight);
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(kStepThreads)
    chain_kernel(Recurrence<T> a, const int32_t* first_chunk, int64_t chunks, RecurrenceKept kept,
                 KeyParts parts, bool wide) {
  extern __shared__ float4 shared[];
  const StagedTokens<T, kRows> staged(reinterpret_cast<float*>(shared));
  const int64_t slice = blockIdx.x % parts.slices;
  const int64_t h = blockIdx.x / parts.slices % a.heads;
  const int64_t segment = blockIdx.x / parts.slices / a.heads;
  const StepLane<kRows> at(slice);
  const int local = static_cast<int>(at.column % kStepColumns);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t begin = a.segments.begin(segment);
  const int64_t length = a.segments.length(segment);
  const int64_t position = a.segments.position[segment];
  const int64_t tokens = a.y.rows.outer;
  const int64_t count = chunks_of(position, length);
  float ds[kRows][4] = {};
  for (int64_t c = count - 1; c >= 0; --c) {
    const int64_t chunk = first_chunk[segment] + c;
    const int64_t chunk_start = chunk_begin(position, c);
    int64_t end = c + 1 == count ? length : chunk_begin(position, c + 1);
    {
      float x[kRows] = {};
      if (c + 1 < count) {
        const float* state = kept.states + ((chunk + 1) * a.heads + h) * a.key_dim * a.dim;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (at.row + r < a.key_dim) {
            float s[4];
            load_columns(state + (at.row + r) * a.dim, at.column, a.dim, wide, s);
            x[r] = s[0] * ds[r][0] + s[1] * ds[r][1] + s[2] * ds[r][2] + s[3] * ds[r][3];
          }
        }
      }
      __syncthreads();
      sum_over_columns<kRows>(x, staged.part + warp * kKeyPad<kRows>);
      __syncthreads();
      sum_warps<kRows>(staged.part, 1, a.key_dim,
                       parts.end + ((slice * chunks + chunk) * a.heads + h) * a.key_dim, 0);
    }
    while (end > chunk_start) {
      const int n = static_cast<int>(end - chunk_start < kStepTokens<kRows> ? end - chunk_start
                                                                            : kStepTokens<kRows>);
      end -= n;
      const int64_t t = begin + end;
      __syncthreads();
      staged.stage(a, kept, t, n, h, slice);
      __syncthreads();
      for (int token = n - 1; token >= 0; --token) {
        const float* q_row = staged.q + token * kKeyPad<kRows> + at.key;
        const float* k_row = staged.k + token * kKeyPad<kRows> + at.key;
        const float* decay_row = staged.decay + token * kKeyPad<kRows> + at.key;
        const float w = staged.weight[token];
        float dy[4];
        float written[4];
        load_n<4>(staged.dy + token * kStepColumns + local, dy);
        load_n<4>(staged.written + token * kStepColumns + local, written);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          written[j] *= w;
        }
        float du[4] = {};
        float dk[kRows];
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          float query[4];
          float key[4];
          load_n<4>(q_row + r, query);
          load_n<4>(k_row + r, key);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            dk[r + i] = 0.0F;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              ds[r + i][j] = fmaf(query[i], dy[j], ds[r + i][j]);
              du[j] = fmaf(ds[r + i][j], key[i], du[j]);
              dk[r + i] = fmaf(ds[r + i][j], written[j], dk[r + i]);
            }
          }
        }
        sum_over_columns<kRows>(dk, staged.part + (token * kStepWarps + warp) * kKeyPad<kRows>);
        sum_over_rows(du);
        if (threadIdx.x % 32 < 4 && at.column < a.dim) {
          store_columns(parts.du + ((t + token) * a.heads + h) * a.dim, at.column, a.dim, wide, du);
        }
        const float by_error = a.delta ? -w : 0.0F;
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          float d[4];
          float key[4];
          load_n<4>(decay_row + r, d);
          load_n<4>(k_row + r, key);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              ds[r + i][j] = d[i] * fmaf(key[i], by_error * du[j], ds[r + i][j]);
            }
          }
        }
      }
      __syncthreads();
      sum_warps<kRows>(staged.part, n, a.key_dim,
                       parts.dk_write + ((slice * tokens + t) * a.heads + h) * a.key_dim,
                       a.heads * a.key_dim);
    }
  }
}

template <class T, int kRows, int kTokens>
__global__ void __launch_bounds__(kStepThreads)
    reads_kernel(Recurrence<T> a, const ChunkSpan* spans, RecurrenceKept kept, KeyParts parts,
                 bool wide) {
  extern __shared__ float4 shared[];
  StagedTokens<T, kRows, kTokens> staged(reinterpret_cast<float*>(shared));
  staged.weight += kTokens * kStepWarps * kKeyPad<kRows>;
  const int64_t slice = blockIdx.x % parts.slices;
  const int64_t h = blockIdx.x / parts.slices % a.heads;
  const int64_t chunk = blockIdx.x / parts.slices / a.heads;
  const StepLane<kRows> at(slice);
  const int local = static_cast<int>(at.column % kStepColumns);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const ChunkSpan span = spans[chunk];
  const int64_t tokens = a.y.rows.outer;
  float s[kRows][4];
  load_state<kRows>(kept.states + (chunk * a.heads + h) * a.key_dim * a.dim, a.key_dim, a.dim, at,
                    wide, s);
  for (int from = 0; from < span.tokens; from += kTokens) {
    const int n = span.tokens - from < kTokens ? span.tokens - from : kTokens;
    const int64_t t = span.token + from;
    __syncthreads();
    staged.stage(a, kept, t, n, h, slice);
    if (a.delta) {
      stage_columns(parts.du + (t * a.heads + h) * a.dim, a.heads * a.dim, n, slice, a.dim,
                    staged.du);
    }
    __syncthreads();
    for (int token = 0; token < n; ++token) {
      const float* k_row = staged.k + token * kKeyPad<kRows> + at.key;
      const float* decay_row = staged.decay + token * kKeyPad<kRows> + at.key;
      const float w = staged.weight[token];
      const int row = (token * kStepWarps + warp) * kKeyPad<kRows>;
      float dy[4];
      float written[4];
      load_n<4>(staged.dy + token * kStepColumns + local, dy);
      load_n<4>(staged.written + token * kStepColumns + local, written);
      float by_row[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r += 4) {
        float d[4];
        load_n<4>(decay_row + r, d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[r + i][j] *= d[i];
          }
        }
      }
      if (a.delta) {
        float du[4];
        load_n<4>(staged.du + token * kStepColumns + local, du);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          by_row[r] = -w * (s[r][0] * du[0] + s[r][1] * du[1] + s[r][2] * du[2] + s[r][3] * du[3]);
        }
        sum_over_columns<kRows>(by_row, staged.part2 + row);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        written[j] *= w;
      }
#pragma unroll
      for (int r = 0; r < kRows; r += 4) {
        float key[4];
        load_n<4>(k_row + r, key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          by_row[r + i] = 0.0F;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[r + i][j] = fmaf(key[i], written[j], s[r + i][j]);
            by_row[r + i] = fmaf(s[r + i][j], dy[j], by_row[r + i]);
          }
        }
      }
      sum_over_columns<kRows>(by_row, staged.part + row);
    }
    __syncthreads();
    const int64_t to = ((slice * tokens + t) * a.heads + h) * a.key_dim;
    sum_warps<kRows>(staged.part, n, a.key_dim, parts.dq + to, a.heads * a.key_dim);
    if (a.delta) {
      sum_warps<kRows>(staged.part2, n, a.key_dim, parts.dk_read + to, a.heads * a.key_dim);
    }
  }
}

__device__ __forceinline__ float sum_slices(const float* part, int64_t at, int64_t slices,
                                            int64_t stride) {
  float sum = 0.0F;
  for (int64_t s = 0; part != nullptr && s < slices; ++s) {
    sum += part[s * stride + at];
  }
  return sum;
}

// A thread per token, key head and channel: the heads that share a key in order. q and k may be one
// tensor.
template <class T>
__global__ void __launch_bounds__(256) keys_kernel(Recurrence<T> a, KeyParts parts) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t tokens = a.y.rows.outer;
  const int64_t row = a.key_heads * a.key_dim;
  if (index >= tokens * row) {
    return;
  }
  const int64_t t = index / row;
  const int64_t offset = index % row;
  const int64_t sharing = a.heads / a.key_heads;
  const int64_t stride = tokens * a.heads * a.key_dim;
  float dq = 0.0F;
  float dk = 0.0F;
  for (int64_t i = 0; i < sharing; ++i) {
    const int64_t h = offset / a.key_dim * sharing + i;
    const int64_t at = (t * a.heads + h) * a.key_dim + offset % a.key_dim;
    dq += sum_slices(parts.dq, at, parts.slices, stride);
    dk += sum_slices(parts.dk_write, at, parts.slices, stride) +
          sum_slices(parts.dk_read, at, parts.slices, stride);
  }
  if (a.q.grad != nullptr) {
    add_to(a.q.grad_at(t, offset), dq);
  }
  if (a.k.grad != nullptr) {
    add_to(a.k.grad_at(t, offset), dk);
  }
}

// A block per chunk and head: the gradients by log decays.
template <class T>
__global__ void __launch_bounds__(128)
    decays_kernel(Recurrence<T> a, const ChunkSpan* spans, int64_t chunks, KeyParts parts) {
  __shared__ float change[kChunkTokens];
  const int64_t chunk = blockIdx.x / a.heads;
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  const int64_t tokens = a.y.rows.outer;
  const int64_t stride = tokens * a.heads * a.key_dim;
  const int64_t key_offset = a.key_head(h) * a.key_dim;
  const auto change_by = [&](int64_t t, int64_t i) {
    const int64_t at = (t * a.heads + h) * a.key_dim + i;
    const float by_k = sum_slices(parts.dk_read, at, parts.slices, stride) -
                       sum_slices(parts.dk_write, at, parts.slices, stride);
    return load(a.q.at(t, key_offset + i)) * sum_slices(parts.dq, at, parts.slices, stride) +
           load(a.k.at(t, key_offset + i)) * by_k;
  };
  const auto at_end = [&](int64_t i) {
    return sum_slices(parts.end, (chunk * a.heads + h) * a.key_dim + i, parts.slices,
                      chunks * a.heads * a.key_dim);
  };
  if (a.decay_per_channel) {
    for (int64_t i = threadIdx.x; i < a.key_dim; i += 128) {
      float sum = at_end(i);
      for (int64_t t = span.token + span.tokens - 1; t >= span.token; --t) {
        sum += change_by(t, i);
        *a.log_decay.grad_at(t, h * a.key_dim + i) += sum;
      }
    }
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int token = static_cast<int>(threadIdx.x) / 32; token < span.tokens; token += 4) {
    float sum = 0.0F;
    for (int64_t i = lane; i < a.key_dim; i += 32) {
      sum += change_by(span.token + token, i);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      change[token] = sum;
    }
  }
  float end = 0.0F;
  for (int64_t i = threadIdx.x; i < a.key_dim; i += 128) {
    end += at_end(i);
  }
  end = block_sum<128>(end);  // and `change` is written
  if (threadIdx.x == 0) {
    for (int token = span.tokens - 1; token >= 0; --token) {
      end += change[token];
      *a.log_decay.grad_at(span.token + token, h) += end;
    }
  }
}

// A warp per token and head: the gradients by v and weight.
template <class T>
__global__ void __launch_bounds__(256)
    values_kernel(Recurrence<T> a, RecurrenceKept kept, const float* du) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  const int64_t t = index / a.heads;
  const int64_t h = index % a.heads;
  if (t >= a.y.rows.outer) {
    return;
  }
  const float w = a.weight.defined() ? *a.weight.at(t, h) : 1.0F;
  const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
  const T* dy = a.y.grad_at(t, h * a.dim);
  float dweight = 0.0F;
  for (int64_t j = threadIdx.x % 32; j < a.dim; j += 32) {
    const float u = du[(t * a.heads + h) * a.dim + j];
    if (a.weight.grad != nullptr) {
      dweight = fmaf(u,
                     kept.errors != nullptr ? kept.errors[(t * a.heads + h) * a.dim + j]
                                            : load(a.v.at(t, h * a.dim + j)),
                     dweight);
    }
    if (a.v.grad != nullptr) {
      add_to(a.v.grad_at(t, h * a.dim + j), w * u + skip * load(dy + j));
    }
  }
  if (a.weight.grad != nullptr) {
    dweight = warp_sum(dweight);
    if (threadIdx.x % 32 == 0) {
      *a.weight.grad_at(t, h) += dweight;
    }
  }
}

// The gradient by skip: a block per head and share of the tokens, then a thread per head.
template <class T>
__global__ void __launch_bounds__(256) skip_kernel(Recurrence<T> a, int64_t shares, float* part) {
  const int64_t h = blockIdx.x / shares;
  const int64_t share = blockIdx.x % shares;
  const int64_t tokens = a.y.rows.outer;
  const int64_t end = (share + 1) * tokens / shares * a.dim;
  float sum = 0.0F;
  for (int64_t x = share * tokens / shares * a.dim + threadIdx.x; x < end; x += 256) {
    const int64_t t = x / a.dim;
    const int64_t offset = h * a.dim + x % a.dim;
    sum = fmaf(load(a.y.grad_at(t, offset)), load(a.v.at(t, offset)), sum);
  }
  sum = block_sum<256>(sum);
  if (threadIdx.x == 0) {
    part[blockIdx.x] = sum;
  }
}
__global__ void __launch_bounds__(128)
    add_skip_kernel(const float* part, int64_t shares, int64_t heads, float* grad) {
  const int64_t h = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (h < heads) {
    float sum = 0.0F;
    for (int64_t share = 0; share < shares; ++share) {
      sum += part[h * shares + share];
    }
    grad[h] += sum;
  }
}

template <class T>
void add_skip_gradient(const Recurrence<T>& a, const Launch& on) {
  if (a.skip.grad == nullptr) {
    return;
  }
  const int64_t tokens = a.y.rows.outer;
  const int64_t shares = ceil_div(tokens, 128) < 64 ? ceil_div(tokens, 128) : 64;
  auto* part = scratch<float>(on, a.heads * shares);
  launch(on, kName, skip_kernel<T>, static_cast<unsigned>(a.heads * shares), 256, 0, a, shares,
         part);
  launch(on, kName, add_skip_kernel, static_cast<unsigned>(ceil_div(a.heads, 128)), 128, 0, part,
         shares, a.heads, a.skip.grad);
}

template <class T>
void add_gradients(const Recurrence<T>& a, const DeviceChunks& chunks, const RecurrenceKept& kept,
                   const KeyParts& parts, const Launch& on) {
  const int64_t tokens = a.y.rows.outer;
  if (a.q.grad != nullptr || a.k.grad != nullptr) {
    launch(on, kName, keys_kernel<T>,
           static_cast<unsigned>(ceil_div(tokens * a.key_heads * a.key_dim, 256)), 256, 0, a,
           parts);
  }
  if (a.log_decay.grad != nullptr) {
    launch(on, kName, decays_kernel<T>, static_cast<unsigned>(chunks.count * a.heads), 128, 0, a,
           chunks.span, chunks.count, parts);
  }
  if (a.v.grad != nullptr || a.weight.grad != nullptr) {
    launch(on, kName, values_kernel<T>, static_cast<unsigned>(ceil_div(tokens * a.heads, 8)), 256,
           0, a, kept, parts.du);
  }
}

template <class T>
void backward(const Recurrence<T>& args, const Launch& on) {
  const int64_t tokens = args.segments.tokens();
  if (tokens == 0) {
    return;
  }
  const DeviceSegments segments = on_device(args.segments, on);
  const DeviceChunks chunks = device_chunks(args.segments, on);
  Recurrence<T> a = args;
  a.segments = segments.walk;
  a.y.rows.outer = tokens;
  if constexpr (std::is_same_v<T, bf16>) {
    if (recurrence_has_backward_chunks(args)) {
      if (!recurrence_has_backward_scan(args)) {
        add_skip_gradient(a, on);
      }
      recurrence_backward_chunks(a, chunks, on);
      return;
    }
  }
  add_skip_gradient(a, on);
  const RecurrenceKept kept = recurrence_kept(a, chunks.count);
  const int64_t slices = ceil_div(a.dim, kStepColumns);
  const int64_t keys = slices * tokens * a.heads * a.key_dim;
  const KeyParts parts{
      .slices = slices,
      .dq = scratch<float>(on, keys),
      .dk_write = scratch<float>(on, keys),
      .dk_read = a.delta ? scratch<float>(on, keys) : nullptr,
      .end = scratch<float>(on, slices * chunks.count * a.heads * a.key_dim),
      .du = scratch<float>(on, tokens * a.heads * a.dim),
  };
  const bool wide = a.dim % 4 == 0 && aligned(a.kept, 16) && aligned(parts.du, 16);
  with_key_rows(kName, a.key_dim, [&]<int kRows>() {
    launch(on, kName, chain_kernel<T, kRows>,
           static_cast<unsigned>(a.segments.count * a.heads * slices), kStepThreads,
           StagedTokens<T, kRows>::bytes(1), a, chunks.first, chunks.count, kept, parts, wide);
    // Half the tokens at a time where a block may have less shared memory: the same sums.
    constexpr int kTokens = kStepTokens<kRows>;
    constexpr int kLess = StagedTokens<T, kRows>::bytes(2) > kSharedOfSm86 ? kTokens / 2 : kTokens;
    static_assert(StagedTokens<T, kRows, kLess>::bytes(2) <= kSharedOfSm86);
    const bool all = StagedTokens<T, kRows>::bytes(2) <= most_shared();
    launch(on, kName, all ? reads_kernel<T, kRows, kTokens> : reads_kernel<T, kRows, kLess>,
           static_cast<unsigned>(chunks.count * a.heads * slices), kStepThreads,
           all ? StagedTokens<T, kRows>::bytes(2) : StagedTokens<T, kRows, kLess>::bytes(2), a,
           chunks.span, kept, parts, wide);
  });
  add_gradients(a, chunks, kept, parts, on);
}

}  // namespace

void recurrence_backward(const Recurrence<float>& a, const Launch& on) {
  backward(a, on);
}
void recurrence_backward(const Recurrence<bf16>& a, const Launch& on) {
  backward(a, on);
}

}  // namespace cambium::cuda
