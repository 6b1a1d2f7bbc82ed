// Products of experts with few rows by plain multiply-adds: a warp takes outputs of one row where
// most experts have none, and else of the rows of an expert, for which it reads the weight once.
// Either way an element is summed in the same order.
#include "ops/experts/experts_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kOutputs = 2;  // of a warp

/// sum[i] += x . row[i] over the elements of this lane, kVec at a time.
template <int kVec, int kRows, class T, class W>
__device__ __forceinline__ void add_products(const T* x, const W* const (&row)[kRows],
                                             int64_t depth, float (&sum)[kRows]) {
#pragma unroll 4
  for (int64_t p = static_cast<int64_t>(threadIdx.x % 32) * kVec; p < depth; p += 32 * kVec) {
    float values[kVec];
    load_all<kVec>(x + p, values);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float w[kVec];
      load_all<kVec>(row[i] + p, w);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sum[i] = fmaf(values[j], w[j], sum[i]);
      }
    }
  }
}

/// Blocks (outputs, rows): a warp has kOutputs outputs of a row, kVec elements a lane.
template <class T, class W, int kVec>
__global__ void __launch_bounds__(kThreads) few_rows(ExpertsMatmul<T> a, const W* weight) {
  await_inputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t r = blockIdx.y;
  const int64_t n =
      (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * int64_t{kOutputs};
  const int64_t outputs = a.y.channels;
  const int64_t depth = a.x.channels;
  if (n >= outputs) {
    return;
  }
  const int64_t expert = a.lists.expert[a.lists.slot[r]];
  const T* x = a.x.row(r);
  const W* row[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    // Of an output that does not exist the last is computed again and not stored.
    const int64_t output = n + i < outputs ? n + i : outputs - 1;
    row[i] = weight + (expert * outputs + output) * depth;
  }
  float sum[kOutputs] = {};
  add_products<kVec>(x, row, depth, sum);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const float total = warp_sum(sum[i]);
    if (lane == 0 && n + i < outputs) {
      const float bias = a.bias.defined() ? a.bias.data[expert * outputs + n + i] : 0.0F;
      store(a.y.row(r) + n + i, total + bias);
    }
  }
}

/// The same of experts_hidden: a warp has gate and up of an output.
template <class T, class W, int kVec>
__global__ void __launch_bounds__(kThreads)
    few_hidden_rows(ExpertsHidden<T> a, const W* gate, const W* up) {
  await_inputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t r = blockIdx.y;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t outputs = a.y.channels;
  const int64_t depth = a.x.channels;
  if (n >= outputs) {
    return;
  }
  const int64_t slot = a.lists.slot[r];
  const int64_t expert = a.lists.expert[slot];
  const T* x = a.x.row(slot / a.lists.top);
  const int64_t output = expert * outputs + n;
  const W* row[2] = {gate + output * depth, up + output * depth};
  float sum[2] = {};
  add_products<kVec>(x, row, depth, sum);
  float x_gate = warp_sum(sum[0]);
  float x_up = warp_sum(sum[1]);
  if (lane == 0) {
    if (a.gate_bias.defined()) {
      x_gate += a.gate_bias.data[output];
      x_up += a.up_bias.data[output];
    }
    store(a.y.row(r) + n, hidden_of(x_gate, x_up, a.limit));
  }
}

dim3 row_blocks(int64_t outputs, int64_t rows, int outputs_of_warp) {
  return {static_cast<unsigned>(ceil_div(outputs, int64_t{kWarps} * outputs_of_warp)),
          static_cast<unsigned>(rows), 1};
}

constexpr int kSharedOutputs = 4;  // of a warp that has all rows of an expert
constexpr int kRowsAtOnce = 8;

/// Blocks (outputs, experts): a warp has kSharedOutputs outputs of kRowsAtOnce rows at a time.
template <class T, class W, int kVec>
__global__ void __launch_bounds__(kThreads) rows_of_expert(ExpertsMatmul<T> a, const W* weight) {
  await_inputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t expert = blockIdx.y;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) *
                    int64_t{kSharedOutputs};
  const int64_t outputs = a.y.channels;
  const int64_t depth = a.x.channels;
  const int64_t end = a.lists.start[expert + 1];
  if (n >= outputs) {
    return;
  }
  const W* row[kSharedOutputs];
#pragma unroll
  for (int i = 0; i < kSharedOutputs; ++i) {
    // Of an output that does not exist the last is computed again and not stored.
    const int64_t output = n + i < outputs ? n + i : outputs - 1;
    row[i] = weight + (expert * outputs + output) * depth;
  }
  for (int64_t r = a.lists.start[expert]; r < end; r += kRowsAtOnce) {
    float sum[kRowsAtOnce][kSharedOutputs] = {};
#pragma unroll 2
    for (int64_t p = lane * kVec; p < depth; p += 32 * kVec) {
      float w[kSharedOutputs][kVec];
#pragma unroll
      for (int i = 0; i < kSharedOutputs; ++i) {
        load_all<kVec>(row[i] + p, w[i]);
      }
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (r + k < end) {
          float x[kVec];
          load_all<kVec>(a.x.row(r + k) + p, x);
#pragma unroll
          for (int i = 0; i < kSharedOutputs; ++i) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
              sum[k][i] = fmaf(x[j], w[i][j], sum[k][i]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
#pragma unroll
      for (int i = 0; i < kSharedOutputs; ++i) {
        const float total = warp_sum(sum[k][i]);
        if (lane == 0 && r + k < end && n + i < outputs) {
          const float bias = a.bias.defined() ? a.bias.data[expert * outputs + n + i] : 0.0F;
          store(a.y.row(r + k) + n + i, total + bias);
        }
      }
    }
  }
}

template <class T, class W>
void run(const ExpertsMatmul<T>& a, const W* weight, const Launch& on) {
  const bool chunks = in_chunks(a.x.data, a.x.rows.outer_stride) && in_chunks(weight, a.x.channels);
  if (hardly_shared(a.lists)) {
    launch_ahead(on, "experts_matmul", chunks ? few_rows<T, W, kChunk> : few_rows<T, W, 1>,
                 row_blocks(a.y.channels, a.lists.rows(), kOutputs), kThreads, 0, a, weight);
    return;
  }
  const dim3 blocks(static_cast<unsigned>(ceil_div(a.y.channels, kThreads / 32 * kSharedOutputs)),
                    static_cast<unsigned>(a.lists.experts), 1);
  launch_ahead(on, "experts_matmul",
               chunks ? rows_of_expert<T, W, kChunk> : rows_of_expert<T, W, 1>, blocks, kThreads, 0,
               a, weight);
}

}  // namespace

template <class T, class W>
void experts_of_few_rows(const ExpertsMatmul<T>& a, const W* weight, const Launch& on) {
  run(a, weight, on);
}
template <class T, class W>
void hidden_of_few_rows(const ExpertsHidden<T>& a, const W* gate, const W* up, const Launch& on) {
  const bool chunks = in_chunks(a.x.data, a.x.rows.outer_stride) && in_chunks(gate, a.x.channels) &&
                      in_chunks(up, a.x.channels);
  launch_ahead(on, "experts_hidden",
               chunks ? few_hidden_rows<T, W, kChunk> : few_hidden_rows<T, W, 1>,
               row_blocks(a.y.channels, a.lists.rows(), 1), kThreads, 0, a, gate, up);
}
template void hidden_of_few_rows(const ExpertsHidden<float>&, const float*, const float*,
                                 const Launch&);
template void hidden_of_few_rows(const ExpertsHidden<float>&, const bf16*, const bf16*,
                                 const Launch&);
template void hidden_of_few_rows(const ExpertsHidden<bf16>&, const float*, const float*,
                                 const Launch&);
template void hidden_of_few_rows(const ExpertsHidden<bf16>&, const bf16*, const bf16*,
                                 const Launch&);

template void experts_of_few_rows(const ExpertsMatmul<float>&, const float*, const Launch&);
template void experts_of_few_rows(const ExpertsMatmul<float>&, const bf16*, const Launch&);
template void experts_of_few_rows(const ExpertsMatmul<bf16>&, const float*, const Launch&);
template void experts_of_few_rows(const ExpertsMatmul<bf16>&, const bf16*, const Launch&);

}  // namespace cambium::cuda
