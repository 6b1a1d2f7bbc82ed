#include "eval/cached_losses.h"

#include <gtest/gtest.h>

#include <cmath>

#include "train/testing.h"

namespace cambium {
namespace {

/// Documents of 60 to 129 random tokens, in several groups.
std::unique_ptr<DocumentSource> long_documents() {
  return generated_source(
      [](uint64_t index) {
        Rng rng(5, index);
        Document document;
        for (uint64_t t = 0; t < 60 + index; ++t) {
          document.append({static_cast<int32_t>(rng.between(2, 23))}, t > 0);
        }
        return document;
      },
      "long", 70);
}

ModelSpec mixed() {
  UnitSpec window = testing::attention_mixer();
  window.kind = "sliding_window";
  window.options.set("window", int64_t{20});
  return testing::tiny_spec({testing::attention_mixer(),
                             {"mamba",
                              {{"inner", int64_t{16}},
                               {"xb", int64_t{8}},
                               {"state", int64_t{4}},
                               {"dt_rank", int64_t{2}}}},
                             window});
}

// A cache in fp32 holds what the model computes; others move the losses, more the coarser they are,
// and by little.
TEST(CachedLosses, AreThoseWithoutACacheUpToItsRounding) {
  const LoadedModel loaded = fresh_model(mixed(), 4, 0.3);
  const HeldOut documents(*long_documents(), 70, 100);
  EXPECT_GT(documents.groups().size(), 1U);
  Model& model = *loaded.model;
  const auto exact = documents.measure(model, &model);
  double last = 1e-8;
  for (const auto& [values, most] : {std::pair{Dtype::kF32, 1e-8}, std::pair{Dtype::kBF16, 1e-4},
                                     std::pair{Dtype::kF8E4M3, 1e-2}}) {
    const auto cached = measure_cached(documents, model, &model, values);
    ASSERT_EQ(cached.size(), exact.size());
    const LossSums sums = total(cached);
    EXPECT_EQ(sums.tokens, total(exact).tokens);
    const double kl = sums.forward_kl / static_cast<double>(sums.tokens);
    EXPECT_LE(kl, most) << dtype_name(values);
    if (values == Dtype::kF32) {
      for (size_t i = 0; i < exact.size(); ++i) {
        EXPECT_NEAR(cached[i].cross_entropy, exact[i].cross_entropy, 1e-5 * exact[i].cross_entropy);
      }
    } else {
      EXPECT_GT(kl, last) << dtype_name(values);
      last = 10 * kl;
    }
  }
}

}  // namespace
}  // namespace cambium
