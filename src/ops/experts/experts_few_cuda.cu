// Products of experts with few rows by plain multiply-adds: a warp takes outputs of one row where
// most experts have none, and else of the rows of an expert, for which it reads the weight once.
// Either way an element is summed in the same order.
#include "ops/experts/experts_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kOutputsOfWarp = 2;
constexpr int kOutputsOfBlock = kThreads / 32 * kOutputsOfWarp;

/// Blocks (outputs, rows): a warp has kOutputsOfWarp outputs of a row, kVec elements a lane.
template <class T, class W, int kVec>
__global__ void __launch_bounds__(kThreads) few_rows(ExpertsMatmul<T> a, const W* weight) {
  await_inputs();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t r = blockIdx.y;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kOutputsOfBlock +
                    static_cast<int64_t>(threadIdx.x / 32) * kOutputsOfWarp;
  const int64_t outputs = a.y.channels;
  const int64_t depth = a.x.channels;
  if (n >= outputs) {
    return;
  }
  const int64_t expert = a.lists.expert[a.lists.slot[r]];
  const T* x = a.x.row(r);
  const W* row[kOutputsOfWarp];
#pragma unroll
  for (int i = 0; i < kOutputsOfWarp; ++i) {
    // Of an output that does not exist the last is computed again and not stored.
    const int64_t output = n + i < outputs ? n + i : outputs - 1;
    row[i] = weight + (expert * outputs + output) * depth;
  }
  float sum[kOutputsOfWarp] = {};
#pragma unroll 4
  for (int64_t p = lane * kVec; p < depth; p += 32 * kVec) {
    float values[kVec];
    load_all<kVec>(x + p, values);
#pragma unroll
    for (int i = 0; i < kOutputsOfWarp; ++i) {
      float w[kVec];
      load_all<kVec>(row[i] + p, w);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sum[i] = fmaf(values[j], w[j], sum[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOutputsOfWarp; ++i) {
    const float total = warp_sum(sum[i]);
    if (lane == 0 && n + i < outputs) {
      const float bias = a.bias.defined() ? a.bias.data[expert * outputs + n + i] : 0.0F;
      store(a.y.row(r) + n + i, total + bias);
    }
  }
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
    const dim3 blocks(static_cast<unsigned>(ceil_div(a.y.channels, kOutputsOfBlock)),
                      static_cast<unsigned>(a.lists.rows()), 1);
    launch_ahead(on, "experts_matmul", chunks ? few_rows<T, W, kChunk> : few_rows<T, W, 1>, blocks,
                 kThreads, 0, a, weight);
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
template void experts_of_few_rows(const ExpertsMatmul<float>&, const float*, const Launch&);
template void experts_of_few_rows(const ExpertsMatmul<float>&, const bf16*, const Launch&);
template void experts_of_few_rows(const ExpertsMatmul<bf16>&, const float*, const Launch&);
template void experts_of_few_rows(const ExpertsMatmul<bf16>&, const bf16*, const Launch&);

}  // namespace cambium::cuda
