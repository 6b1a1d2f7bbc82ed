#include "ops/embedding/embedding.h"

#include "ops/embedding/embedding_kernels.h"
#include "ops/embedding/embedding_ref.h"

namespace cambium {
namespace {

void forward(const Context& ctx, const Tensor& table, std::span<const int32_t> tokens,
             const Tensor& y) {
  const int64_t channels = table.dim(1);
  if (table.dtype == Dtype::kF64) {
    reference::embedding_forward(tokens, channels, table.ptr<double>(), y.ptr<double>());
  } else if (!ctx.reference) {
    embedding_forward({static_cast<int64_t>(tokens.size()), channels, tokens.data(), table.data,
                       table.dtype == Dtype::kBF16, y.ptr<float>()});
  } else if (table.dtype == Dtype::kBF16) {
    reference::embedding_forward(tokens, channels, table.ptr<bf16_t>(), y.ptr<float>());
  } else {
    reference::embedding_forward(tokens, channels, table.ptr<float>(), y.ptr<float>());
  }
}

void backward(bool naive, const Tensor& table, std::span<const int32_t> tokens, const Tensor& y) {
  const int64_t channels = table.dim(1);
  if (table.dtype == Dtype::kF64) {
    reference::embedding_backward(tokens, channels, y.grad_ptr<double>(), table.grad_ptr<double>());
  } else if (naive) {
    reference::embedding_backward(tokens, channels, y.grad_ptr<float>(), table.grad_ptr<float>());
  } else {
    embedding_backward({static_cast<int64_t>(tokens.size()), channels, tokens.data(),
                        y.grad_ptr<float>(), table.grad_ptr<float>()});
  }
}

}  // namespace

Tensor embedding(Context& ctx, const Tensor& table, std::span<const int32_t> tokens) {
  require_cpu("embedding", table);
  expect(
      table.rank == 2 && table.contiguous() &&
          (table.dtype == Dtype::kF32 || table.dtype == Dtype::kF64 || table.dtype == Dtype::kBF16),
      "[embedding] expected a contiguous table (V, C) of f32, f64 or bf16, got {}",
      table.describe());
  expect(table.dtype != Dtype::kBF16 || !table.has_grad(),
         "[embedding] a bf16 table has no gradient; train the f32 table, got {}", table.describe());
  for (size_t i = 0; i < tokens.size(); ++i) {
    expect(tokens[i] >= 0 && tokens[i] < table.dim(0),
           "[embedding] expected tokens in [0, {}), got {} at position {}; the text was made with "
           "another tokenizer",
           table.dim(0), tokens[i], i);
  }
  const bool differentiate = ctx.differentiate(table);
  const Tensor y = ctx.result(table.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32,
                              {static_cast<int64_t>(tokens.size()), table.dim(1)}, differentiate);
  forward(ctx, table, tokens, y);
  if (differentiate) {
    ctx.tape->record(
        [naive = ctx.reference, table, tokens, y] { backward(naive, table, tokens, y); });
  }
  return y;
}

}  // namespace cambium
