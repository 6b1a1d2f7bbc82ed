// Streamed products of which blocks draw rows as they finish (matmul_stream_cuda.cu): who sums a
// row must not be seen.
#include <cstring>

#include "ops/matmul/matmul.h"
#include "ops/testing.h"
#include "tensor/work_recorder.h"

namespace cambium {
namespace {

using testing::as_stored;
using testing::cuda_tensor;
using testing::CudaContext;
using testing::draw;

struct Products {
  std::vector<int64_t> outputs;  // of each weight
  int64_t inputs;
};

/// A weight (rows, columns) of 61 rows that come again: large ones would take long to draw.
OwnedTensor large_weight(int64_t rows, int64_t columns) {
  constexpr int64_t kDifferent = 61;
  const OwnedTensor some = cuda_tensor(
      Dtype::kBF16, {kDifferent, columns},
      draw({{{kDifferent, columns}, -0.1, 0.1}}, static_cast<uint64_t>(rows + columns))[0]);
  OwnedTensor all(Dtype::kBF16, {rows, columns}, false, Device{Device::kCuda});
  for (int64_t row = 0; row < rows; row += kDifferent) {
    const int64_t count = std::min(kDifferent, rows - row);
    copy(all.view.slice(0, row, count), some.view.slice(0, 0, count));
  }
  return all;
}

/// The outputs (tokens, N) of a weight, by products of so few of its rows that all are dealt.
std::vector<double> by_few_rows(Context& ctx, const Tensor& x, const Affine& of) {
  constexpr int64_t kFew = 400;
  const int64_t tokens = x.dim(0);
  const int64_t outputs = of.weight.dim(0);
  std::vector<double> all(static_cast<size_t>(tokens * outputs));
  for (int64_t row = 0; row < outputs;) {
    const int64_t count = outputs - row < 2 * kFew ? outputs - row : kFew;
    const std::vector<double> part =
        testing::take(matmul(ctx, x, of.weight.slice(0, row, count), of.bias.slice(0, row, count)));
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(part.begin() + t * count, count, all.begin() + t * outputs + row);
    }
    row += count;
  }
  return all;
}

TEST(MatmulCudaStream, ADrawnRowHasTheBitsOfADealtOne) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  // Beside each other in a step: many rows to be drawn and none, of one weight and of three whose
  // ends are within a draw.
  const std::vector<Products> all = {
      {{4099, 1021, 1024}, 5120}, {{5120}, 4096}, {{1536}, 1536}, {{1536}, 8960},
      {{3000, 9}, 16384},         {{30000}, 1536}};
  std::vector<OwnedTensor> weights, biases, inputs;
  for (const Products& p : all) {
    inputs.push_back(cuda_tensor(
        Dtype::kBF16, {2, p.inputs},
        as_stored(draw({{{2, p.inputs}}}, static_cast<uint64_t>(p.inputs))[0], Dtype::kBF16)));
    for (const int64_t n : p.outputs) {
      weights.push_back(large_weight(n, p.inputs));
      biases.push_back(cuda_tensor(Dtype::kF32, {n}, draw({{{n}}}, static_cast<uint64_t>(n))[0]));
    }
  }
  for (const int64_t tokens : {1, 2}) {
    SCOPED_TRACE(fmt::format("{} tokens", tokens));
    CudaContext cuda(Dtype::kBF16);
    std::vector<Affine> of;
    std::vector<std::vector<double>> exact;
    for (size_t i = 0; const Products& p : all) {
      const Tensor x = inputs[i++].view.slice(0, 0, tokens);
      for (size_t j = 0; j < p.outputs.size(); ++j) {
        of.push_back({weights[of.size()].view, biases[of.size()].view});
        const ArenaScope scope(*cuda.ctx.arena);
        exact.push_back(by_few_rows(cuda.ctx, x, of.back()));
      }
    }
    const auto recorder = WorkRecorder::on(cuda.ctx.device(), 1 << 20);
    ASSERT_NE(recorder, nullptr);
    cuda.ctx.recorder = recorder.get();
    std::vector<Tensor> got(of.size());
    const auto step = [&] {
      const ArenaScope scope(*cuda.ctx.arena);
      for (size_t i = 0, first = 0; i < all.size(); ++i) {
        const size_t count = all[i].outputs.size();
        const auto to = std::span(got).subspan(first, count);
        std::fill(to.begin(), to.end(), Tensor{});
        matmul_each(cuda.ctx, inputs[i].view.slice(0, 0, tokens),
                    std::span(of).subspan(first, count), to);
        first += count;
      }
    };
    constexpr int kSteps = 30;
    for (int i = 0; i < kSteps; ++i) {
      recorder->step(true, step, nullptr, nullptr, 0);
      for (size_t j = 0; j < got.size(); ++j) {
        ASSERT_EQ(testing::take(got[j]), exact[j]) << "step " << i << ", weight " << j;
        // What a step leaves out would be found from the step before.
        fill_memory(got[j].data, cuda.ctx.device(), 0xff, got[j].bytes());
      }
    }
    // Some steps one after the other, without a look at any but the last.
    for (int i = 0; i < kSteps; ++i) {
      recorder->step(true, step, nullptr, nullptr, 0);
    }
    for (size_t j = 0; j < got.size(); ++j) {
      EXPECT_EQ(testing::take(got[j]), exact[j]) << "weight " << j;
    }
    EXPECT_EQ(recorder->counts().made, 1);
    EXPECT_GT(recorder->counts().launched, kSteps);
    cuda.ctx.recorder = nullptr;
  }
}

}  // namespace
}  // namespace cambium
