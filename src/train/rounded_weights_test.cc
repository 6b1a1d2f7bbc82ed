#include "train/rounded_weights.h"

#include <gtest/gtest.h>

#include "model/weights.h"
#include "train/testing.h"

namespace cambium {
namespace {

TEST(RoundedWeights, AreThoseOfTrainedMatricesAsTheyAreAndOnlyWhileUsed) {
  LoadedModel model = fresh_model(testing::every_mixer(), 1);
  model.weights.set_trainable(*model.model, [](const std::string& name, const Parameter&) {
    return !name.starts_with("layers.0.");
  });
  const RoundedWeights weights(*model.model);
  int64_t kept = 0;
  for (const float factor : {1.0F, -3.0F}) {
    model.model->visit([&](const std::string&, Parameter& p) {
      EXPECT_EQ(p.tensor.rounded, nullptr);
      if (p.tensor.has_grad()) {
        p.tensor.ptr<float>()[0] = 1.001F * factor;
      }
    });
    const RoundedWeights::Use use(weights);
    model.model->visit([&](const std::string& name, Parameter& p) {
      const Tensor rounded = p.tensor.rounded_tensor();
      ASSERT_EQ(rounded.defined(), p.is_matrix() && !name.starts_with("layers.0.")) << name;
      if (rounded.defined()) {
        ++kept;
        EXPECT_EQ(rounded.ptr<bf16>()[0], round_to_bf16(1.001F * factor)) << name;
        EXPECT_EQ(rounded.ptr<bf16>()[1], round_to_bf16(p.tensor.ptr<float>()[1])) << name;
      }
    });
  }
  EXPECT_GT(kept, 10);
}

TEST(RoundedWeights, OfNothingChangeNothing) {
  const RoundedWeights none;
  const RoundedWeights::Use use(none);
}

}  // namespace
}  // namespace cambium
