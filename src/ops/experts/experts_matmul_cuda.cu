// Which kernels take the products of experts: in bf16 and widths of whole chunks tensor cores with
// copies in the background (experts_tensor_cuda.cu); few rows in fp32, or hardly any, multiply-adds
// (experts_few_cuda.cu); the others tiles of any type (experts_any_cuda.cu).
#include "ops/experts/experts_cuda.cuh"
#include "ops/matmul/matmul_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 128;

/// Most rows of an expert, on average, that multiply-adds take.
constexpr int64_t kFewRows = 8;

/// Whether tensor cores with copies of whole chunks take a product of these operands and have done
/// it.
bool by_tensor_cores(const ExpertsMatmul<bf16>& a, const Launch& on) {
  const int64_t outputs = a.y.channels;
  const int64_t depth = a.x.channels;
  if (!in_chunks(a.x.data, a.x.rows.outer_stride) || !in_chunks(a.y.data, a.y.rows.outer_stride) ||
      depth % kChunk != 0 || outputs % kChunk != 0 || !aligned(a.bias.data, sizeof(float2))) {
    return false;
  }
  const bf16* weight = weight_as<bf16>(a.weight, on);
  return aligned(weight) &&
         experts_by_tensor_cores(ExpertsUse::kForward,
                                 {.a = a.x.data,
                                  .a_stride = a.x.rows.outer_stride,
                                  .b = weight,
                                  .b_stride = depth,
                                  .b_expert = outputs * depth,
                                  .bias = a.bias.data,
                                  .c = a.y.data,
                                  .c_stride = a.y.rows.outer_stride,
                                  .n = static_cast<int32_t>(outputs),
                                  .k = static_cast<int32_t>(depth),
                                  .experts = static_cast<int32_t>(a.lists.experts),
                                  .start = a.lists.start},
                                 a.lists, on);
}
bool by_tensor_cores(const ExpertsGradInput<bf16>& a, const Launch& on) {
  const int64_t outputs = a.dy.channels;
  const int64_t depth = a.out.channels;
  if (!in_chunks(a.dy.data, a.dy.rows.outer_stride) ||
      !in_chunks(a.out.data, a.out.rows.outer_stride) || depth % kChunk != 0 ||
      outputs % kChunk != 0) {
    return false;
  }
  const bf16* weight = weight_as<bf16>(a.weight, on);
  return aligned(weight) &&
         experts_by_tensor_cores(ExpertsUse::kGradInput,
                                 {.a = a.dy.data,
                                  .a_stride = a.dy.rows.outer_stride,
                                  .b = weight,
                                  .b_stride = depth,
                                  .b_expert = outputs * depth,
                                  .c = a.out.data,
                                  .c_stride = a.out.rows.outer_stride,
                                  .n = static_cast<int32_t>(depth),
                                  .k = static_cast<int32_t>(outputs),
                                  .experts = static_cast<int32_t>(a.lists.experts),
                                  .accumulate = a.accumulate,
                                  .start = a.lists.start},
                                 a.lists, on);
}
bool by_tensor_cores(const ExpertsGradWeight<bf16>& a, const Launch& on) {
  const int64_t outputs = a.dy.channels;
  const int64_t depth = a.x.channels;
  return in_chunks(a.dy.data, a.dy.rows.outer_stride) &&
         in_chunks(a.x.data, a.x.rows.outer_stride) && aligned(a.out.data) && depth % kChunk == 0 &&
         outputs % kChunk == 0 &&
         experts_by_tensor_cores({.a = a.dy.data,
                                  .a_stride = a.dy.rows.outer_stride,
                                  .b = a.x.data,
                                  .b_stride = a.x.rows.outer_stride,
                                  .c = a.out.data,
                                  .c_stride = depth,
                                  .c_expert = outputs * depth,
                                  .m = static_cast<int32_t>(outputs),
                                  .n = static_cast<int32_t>(depth),
                                  .experts = static_cast<int32_t>(a.lists.experts),
                                  .accumulate = a.accumulate,
                                  .start = a.lists.start},
                                 a.lists, on);
}

bool by_tensor_cores(const ExpertsHidden<bf16>& a, const Launch& on) {
  const int64_t outputs = a.y.channels;
  const int64_t depth = a.x.channels;
  const bf16* gate = a.gate.narrow.data;
  const bf16* up = a.up.narrow.data;
  return gate != nullptr && aligned(gate) && aligned(up) &&
         in_chunks(a.x.data, a.x.rows.outer_stride) && in_chunks(a.y.data, a.y.rows.outer_stride) &&
         depth % kChunk == 0 && outputs % kChunk == 0 &&
         aligned(a.gate_bias.data, sizeof(float2)) && aligned(a.up_bias.data, sizeof(float2)) &&
         experts_by_tensor_cores(ExpertsUse::kHidden,
                                 {.a = a.x.data,
                                  .a_stride = a.x.rows.outer_stride,
                                  .b = gate,
                                  .b_stride = depth,
                                  .b_expert = outputs * depth,
                                  .bias = a.gate_bias.data,
                                  .c = a.y.data,
                                  .c_stride = a.y.rows.outer_stride,
                                  .n = static_cast<int32_t>(outputs),
                                  .k = static_cast<int32_t>(depth),
                                  .experts = static_cast<int32_t>(a.lists.experts),
                                  .start = a.lists.start,
                                  .b2 = up,
                                  .bias2 = a.up_bias.data,
                                  .slot = a.lists.slot,
                                  .top = static_cast<int32_t>(a.lists.top),
                                  .limit = a.limit},
                                 a.lists, on);
}

template <class T>
void run_hidden(const ExpertsHidden<T>& a, const Launch& on) {
  if constexpr (sizeof(T) == 2) {
    const bool instead = !on.batch_invariant && hardly_shared(a.lists);
    if (!instead && by_tensor_cores(a, on)) {
      return;
    }
  }
  if (a.gate.narrow.defined()) {
    hidden_of_few_rows(a, static_cast<const bf16*>(a.gate.narrow.data),
                       static_cast<const bf16*>(a.up.narrow.data), on);
  } else {
    hidden_of_few_rows(a, static_cast<const float*>(a.gate.wide.data),
                       static_cast<const float*>(a.up.wide.data), on);
  }
}

template <class T>
void run_forward(const ExpertsMatmul<T>& a, const Launch& on) {
  const bool few = !on.batch_invariant && a.lists.rows() <= kFewRows * a.lists.experts;
  if constexpr (sizeof(T) == 2) {
    // A weight of fp32 is not made narrow for a few rows.
    const bool instead = few && (hardly_shared(a.lists) || !a.weight.narrow.defined());
    if (!instead && by_tensor_cores(a, on)) {
      return;
    }
  }
  if (few) {
    with_weight(a.weight, [&](const auto* weight) { experts_of_few_rows(a, weight, on); });
  } else {
    experts_by_tiles(a, on);
  }
}

template <class T>
void run_grad_input(const ExpertsGradInput<T>& a, const Launch& on) {
  if constexpr (sizeof(T) == 2) {
    if (by_tensor_cores(a, on)) {
      return;
    }
  }
  experts_by_tiles(a, on);
}

template <class T>
void run_grad_weight(const ExpertsGradWeight<T>& a, const Launch& on) {
  if constexpr (sizeof(T) == 2) {
    if (by_tensor_cores(a, on)) {
      return;
    }
  }
  experts_by_tiles(a, on);
}

/// Blocks (columns, experts): a thread sums a column of an expert's rows.
template <class T>
__global__ void __launch_bounds__(kThreads) bias_grad(ExpertsGradBias<T> a) {
  await_inputs();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t expert = blockIdx.y;
  if (n >= a.dy.channels) {
    return;
  }
  float sum = 0.0F;
  for (int64_t r = a.lists.start[expert]; r < a.lists.start[expert + 1]; ++r) {
    sum += load(a.dy.row(r) + n);
  }
  a.out[expert * a.dy.channels + n] += sum;
}

template <class T>
void run_grad_bias(const ExpertsGradBias<T>& a, const Launch& on) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(a.dy.channels, kThreads)),
                    static_cast<unsigned>(a.lists.experts), 1);
  launch_ahead(on, "experts_matmul's gradient", bias_grad<T>, blocks, kThreads, 0, a);
}

}  // namespace

void experts_matmul_forward(const ExpertsMatmul<float>& a, const Launch& on) {
  run_forward(a, on);
}
void experts_matmul_forward(const ExpertsMatmul<bf16>& a, const Launch& on) {
  run_forward(a, on);
}
void experts_hidden_forward(const ExpertsHidden<float>& a, const Launch& on) {
  run_hidden(a, on);
}
void experts_hidden_forward(const ExpertsHidden<bf16>& a, const Launch& on) {
  run_hidden(a, on);
}
void experts_grad_input(const ExpertsGradInput<float>& a, const Launch& on) {
  run_grad_input(a, on);
}
void experts_grad_input(const ExpertsGradInput<bf16>& a, const Launch& on) {
  run_grad_input(a, on);
}
void experts_grad_weight(const ExpertsGradWeight<float>& a, const Launch& on) {
  run_grad_weight(a, on);
}
void experts_grad_weight(const ExpertsGradWeight<bf16>& a, const Launch& on) {
  run_grad_weight(a, on);
}
void experts_grad_bias(const ExpertsGradBias<float>& a, const Launch& on) {
  run_grad_bias(a, on);
}
void experts_grad_bias(const ExpertsGradBias<bf16>& a, const Launch& on) {
  run_grad_bias(a, on);
}

}  // namespace cambium::cuda
