#include "model/random_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "base/test_paths.h"

namespace cambium {
namespace {

TEST(RandomModel, HasTheSizesAndStorageAskedForAndFiniteLogits) {
  ModelSpec spec = read_spec(std::string(kSourceDir) + "/tests/fixtures/llama");
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

// A student of random weights costs the mixers that its teacher does not have.
TEST(RandomModel, SharesWhatAnotherModelHas) {
  const ModelSpec attention = read_spec(std::string(kSourceDir) + "/tests/fixtures/llama");
  ModelSpec spec = attention;
  spec.layers[1].mixer()->options.set("heads", int64_t{2});
  spec.layers[1].mixer()->options.set("kv_heads", int64_t{2});
  LoadedModel teacher = random_model(attention, MatrixStorage::kF32, 1);
  LoadedModel student = random_model(spec, MatrixStorage::kF32, 2, {}, teacher.model.get());
  std::map<std::string, Tensor> theirs;
  teacher.model->visit([&](const std::string& name, Parameter& p) { theirs[name] = p.tensor; });
  int64_t own = 0;
  student.model->visit([&](const std::string& name, Parameter& p) {
    const bool same = p.tensor.same_shape(theirs.at(name));
    EXPECT_EQ(p.tensor.data == theirs.at(name).data, same) << name;
    own += same ? 0 : p.tensor.bytes();
  });
  EXPECT_GT(own, 0);
  EXPECT_EQ(student.weights.bytes(), own);
}

}  // namespace
}  // namespace cambium
