#include "ops/embedding/embedding.h"

#include "base/float16.h"
#include "base/parallel.h"
#include "base/testing.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;

TEST(Embedding, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  // Token 3 occurs three times, token 0 never.
  const std::vector<int32_t> tokens{3, 1, 4, 3, 5, 2, 3};
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return embedding(ctx, in[0], tokens);
  };
  for (const int64_t channels : {1, 7, 80}) {
    expect_gradients_match_differences(operation, {{{6, channels}, -1.0, 1.0, true, true}});
    expect_kernels_match_reference(operation, {{{6, channels}, -1.0, 1.0, true, true}});
  }
}

TEST(Embedding, WidensBf16) {
  const std::vector<int32_t> tokens{1, 0};
  std::vector<bf16> table(2 * 37);
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = round_to_bf16(static_cast<float>(i) * 0.5F);
  }
  const CpuIsa best = cpu_isa();
  for (const bool reference : {false, true}) {
    for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
      set_cpu_isa(static_cast<CpuIsa>(isa));
      Arena arena;
      Context ctx{.arena = &arena, .reference = reference};
      const Tensor y = embedding(ctx, Tensor::of(table.data(), {2, 37}), tokens);
      ASSERT_EQ(y.dtype, Dtype::kF32);
      for (int64_t i = 0; i < 37; ++i) {
        EXPECT_EQ(y.ptr<float>()[i], static_cast<float>(37 + i) * 0.5F);
        EXPECT_EQ(y.ptr<float>()[37 + i], static_cast<float>(i) * 0.5F);
      }
    }
  }
  set_cpu_isa(best);
}

// A frozen table in bf16 gives its numbers, as they are, in either type of activations.
TEST(Embedding, GathersBf16OnCuda) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 5000; ++i) {
    tokens.push_back(i * i % 11);
  }
  for (const int64_t channels : {1, 8, 37, 264}) {
    const auto table = testing::as_stored(testing::draw({{{11, channels}}})[0], Dtype::kBF16);
    std::vector<double> expected;
    for (const int32_t token : tokens) {
      const auto row = table.begin() + token * channels;
      expected.insert(expected.end(), row, row + channels);
    }
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
      testing::CudaContext cuda(type);
      const OwnedTensor there = testing::cuda_tensor(Dtype::kBF16, {11, channels}, table);
      const Tensor y = embedding(cuda.ctx, there.view, tokens);
      ASSERT_EQ(y.dtype, type);
      EXPECT_EQ(testing::take(y), expected) << channels << " channels";
      const Tensor few = embedding(cuda.ctx, there.view, std::span(tokens).first(3));
      EXPECT_EQ(testing::take(few),
                std::vector<double>(expected.begin(), expected.begin() + 3 * channels));
    }
  }
}

// A token that fills most of a text, some that come often, and many that come once or never.
TEST(Embedding, GradientOfManyTokens) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 5000; ++i) {
    tokens.push_back(i % 3 != 0 ? 7 : i % 2 == 0 ? i % 40 : i % 900);
  }
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return embedding(ctx, in[0], tokens);
  };
  for (const int64_t channels : {3, 64}) {
    expect_kernels_match_reference(operation, {{{900, channels}, -1.0, 1.0, true, true}});
  }
}

TEST(Embedding, NoTokens) {
  Arena arena;
  Context ctx{.arena = &arena};
  EXPECT_EQ(embedding(ctx, arena.empty(Dtype::kF32, {2, 3}), {}).dim(0), 0);
  if (testing::on_cuda()) {
    testing::CudaContext cuda;
    const OwnedTensor table = testing::cuda_tensor(Dtype::kF32, {2, 3}, std::vector<double>(6));
    EXPECT_EQ(embedding(cuda.ctx, table.view, {}).dim(0), 0);
  }
}

TEST(Embedding, GradientDoesNotDependOnThreads) {
  std::vector<int32_t> tokens(500);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<int32_t>(i * i % 7);
  }
  const auto values = testing::draw({{{7, 200}}});
  const auto gradient = [&](int threads) {
    set_num_threads(threads);
    const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
      return embedding(ctx, in[0], tokens);
    };
    return testing::run_operation<float>(operation, {{{7, 200}}}, values, false, true).grads[0];
  };
  const int threads = num_threads();
  const auto one = gradient(1);
  const auto three = gradient(3);
  set_num_threads(threads);
  EXPECT_EQ(one, three);
}

TEST(EmbeddingErrors, NameTheToken) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor table = arena.empty(Dtype::kF32, {5, 3});
  for (const int32_t wrong : {-1, 5}) {
    const std::vector<int32_t> tokens{0, wrong};
    const std::string message = testing::error_of([&] { embedding(ctx, table, tokens); });
    EXPECT_EQ(message, fmt::format("[embedding] expected tokens in [0, 5), got {} "
                                   "at position 1; the text was made with another "
                                   "tokenizer",
                                   wrong));
  }
  EXPECT_THROW(embedding(ctx, arena.empty(Dtype::kI32, {5, 3}), {}), Error);
}

}  // namespace
}  // namespace cambium
