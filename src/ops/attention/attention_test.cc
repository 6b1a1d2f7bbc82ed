#include "ops/attention/attention.h"

#include <numeric>

#include "ops/testing.h"

namespace cambium {
namespace {

using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;
using testing::Input;
using testing::relative_error;

/// Segments of the given lengths, all from position 0 or from the given ones.
struct Packing {
  explicit Packing(const std::vector<int32_t>& lengths, std::vector<int32_t> positions = {})
      : position(std::move(positions)) {
    for (const int32_t n : lengths) {
      start.push_back(start.back() + n);
    }
    position.resize(lengths.size());
  }
  Segments segments() const { return {.start = start, .position = position, .slot = {}}; }
  std::vector<int32_t> start = {0};
  std::vector<int32_t> position;
};

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, kv_heads, dim, value_dim, window;
  double range = 1.0;
};

int64_t tokens(const std::vector<int32_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

std::vector<Input> inputs_of(const Case& c) {
  const int64_t t = tokens(c.lengths);
  return {{{t, c.heads, c.dim}, -c.range, c.range},
          {{t, c.kv_heads, c.dim}, -c.range, c.range},
          {{t, c.kv_heads, c.value_dim}}};
}

class AttentionCases : public ::testing::TestWithParam<Case> {};

TEST_P(AttentionCases, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const Case& c = GetParam();
  const Packing packing(c.lengths);
  const AttentionConfig config = {.scale = 1.0F / std::sqrt(static_cast<float>(c.dim)),
                                  .window = c.window};
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[1], in[2], packing.segments(), config);
  };
  if (tokens(c.lengths) <= 50) {
    expect_gradients_match_differences(operation, inputs_of(c), 1e-6, 12);
  }
  expect_kernels_match_reference(operation, inputs_of(c));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionCases,
    ::testing::Values(Case{{1}, 1, 1, 4, 4, 0}, Case{{5}, 4, 2, 8, 8, 0},
                      Case{{9, 1, 0, 7}, 3, 1, 5, 3, 0}, Case{{12, 20}, 4, 2, 16, 16, 6},
                      Case{{33}, 6, 2, 7, 11, 1}, Case{{70, 131, 40}, 4, 2, 16, 16, 0},
                      Case{{150, 90}, 9, 3, 64, 64, 0}, Case{{129, 65}, 2, 2, 24, 40, 50},
                      Case{{40}, 16, 1, 128, 128, 0}));

}  // namespace
}  // namespace cambium
