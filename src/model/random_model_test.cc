#include "model/random_model.h"

#include <gtest/gtest.h>

#include <cmath>

namespace cambium {
namespace {

TEST(RandomModel, HasTheSizesAndStorageAskedForAndFiniteLogits) {
  ModelSpec spec = read_spec(std::string(CAMBIUM_SOURCE_DIR) + "/tests/fixtures/llama");
  // The embedding is longer than what is drawn for one parameter, and not a multiple of it.
  spec.vocab = (int64_t{1} << 21) / spec.width + 3;
  for (const MatrixStorage storage : {MatrixStorage::kF32, MatrixStorage::kBF16}) {
    LoadedModel made = random_model(spec, storage, 1);
    const Dtype matrices = storage == MatrixStorage::kBF16 ? Dtype::kBF16 : Dtype::kF32;
    int64_t bytes = 0;
    made.model->visit([&](const std::string& name, Parameter& p) {
      EXPECT_EQ(p.tensor.dtype, p.shape.size() == 2 ? matrices : Dtype::kF32) << name;
      bytes += p.tensor.bytes();
    });
    EXPECT_EQ(made.weights.bytes(), bytes);
    Arena arena;
    Context ctx{.arena = &arena};
    Batch batch;
    batch.add(std::vector<int32_t>{1, static_cast<int32_t>(spec.vocab - 1), 3});
    const Tensor logits = made.model->logits(ctx, made.model->forward(ctx, batch));
    double square = 0.0;
    for (int64_t i = 0; i < logits.numel(); ++i) {
      square += std::pow(logits.ptr<float>()[i], 2);
    }
    EXPECT_TRUE(std::isfinite(square));
    EXPECT_GT(square, 0.0);
  }
}

}  // namespace
}  // namespace cambium
