#include "ops/embedding/embedding.h"

#include "ops/embedding/embedding_kernels.h"
#include "ops/embedding/embedding_ref.h"
#include "ops/run.h"

namespace cambium {

Tensor embedding(Context& ctx, const Tensor& table, std::span<const int32_t> tokens,
                 const Tensor& newest) {
  expect(
      table.rank == 2 && table.contiguous() &&
          (table.dtype == Dtype::kF32 || table.dtype == Dtype::kF64 || table.dtype == Dtype::kBF16),
      "[embedding] expected a contiguous table (V, C) of f32, f64 or bf16, got {}", table);
  expect(table.dtype != Dtype::kBF16 || !table.has_grad(),
         "[embedding] a bf16 table has no gradient; train the f32 table, got {}", table);
  expect(!newest.defined() || (newest.dtype == Dtype::kI32 && newest.rank == 1 &&
                               newest.device == table.device && !table.has_grad()),
         "[embedding] expected newest tokens (N) i32 beside a table without gradient, got {} and "
         "{}",
         newest, table);
  const int64_t least = newest.defined() ? -newest.dim(0) : 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    expect(tokens[i] >= least && tokens[i] < table.dim(0),
           "[embedding] expected tokens in [0, {}), got {} at position {}; the text was made with "
           "another tokenizer",
           table.dim(0), tokens[i], i);
  }
  const bool differentiate = ctx.differentiate(table);
  const Tensor y = ctx.result(table.dtype == Dtype::kF64 ? Dtype::kF64 : ctx.activations,
                              {static_cast<int64_t>(tokens.size()), table.dim(1)}, differentiate);
  const int32_t* at = ctx.to_device(tokens);
  const auto args = [=]<class T>() {
    const bool narrow = table.dtype == Dtype::kBF16;
    return Embedding<T>{static_cast<int64_t>(tokens.size()),
                        at,
                        view<Sum<T>>(narrow ? Tensor{} : table),
                        view<bf16, float>(narrow ? table : Tensor{}),
                        view<T>(y),
                        newest.defined() ? newest.ptr<int32_t>() : nullptr};
  };
  run<embedding_forward>(ctx, y, args);
  if (differentiate) {
    ctx.record({table, y}, [=](const Context& c) { run<embedding_backward>(c, y, args); });
  }
  return y;
}

}  // namespace cambium
