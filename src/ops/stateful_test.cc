#include "ops/stateful_testing.h"

namespace cambium::testing {

TEST_P(Stateful, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const StatefulCase& test = GetParam().test;
  const OwnedSegments segments = packed_segments(GetParam().lengths);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return test.operation(ctx, in, segments.view(), {});
  };
  if (GetParam().differences) {
    expect_gradients_match_differences(operation, test.inputs, 1e-6, 12);
  }
  expect_kernels_match_reference(operation, test.inputs);
}

TEST_P(Stateful, PackedEqualsSeparate) {
  for_each_isa(
      [&] { expect_packed_equals_separate<float>(GetParam().test, GetParam().lengths, 1e-5); });
}

TEST_P(Stateful, AnySplitAgrees) {
  const StatefulCase& test = GetParam().test;
  std::vector<std::vector<int64_t>> cuts;
  for (const int64_t t : GetParam().cuts) {
    if (t < test.tokens) {
      cuts.push_back({t});
    }
  }
  if (test.tokens > 70) {
    cuts.push_back({3, 20, 64, 70});
  }
  for_each_isa([&] { expect_splits_agree<float>(test, cuts, 1e-5); });
  expect_splits_agree<double>(test, cuts, 1e-12);
}

TEST_P(Stateful, AnyNumberOfThreadsAgrees) {
  expect_threads_agree(GetParam().test, GetParam().lengths);
}

}  // namespace cambium::testing
