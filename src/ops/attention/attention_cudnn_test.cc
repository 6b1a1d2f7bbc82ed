// Attention in bf16 at the sizes that cuDNN serves where there is one, our backward pass by
// products of warpgroups where the device has them, and our other kernels elsewhere: all against
// the definition, and each after the other.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/testing.h"

#if CAMBIUM_CUDA
#include "ops/attention/attention_cudnn_testing.h"

namespace cambium {
namespace {

using cuda::attention::allow_cudnn;
using cuda::attention::allow_warpgroups;
using cuda::attention::cudnn_calls;
using cuda::attention::cudnn_status;
using cuda::attention::warpgroup_calls;
using cuda::attention::warpgroups_serve;
using testing::Input;
using testing::kNarrowBackward;
using testing::kNarrowFloor;
using testing::kNarrowForward;
using testing::norm_error;
using testing::Operation;
using testing::Run;

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, kv_heads, dim, value_dim, window, sinks = 0;

  int64_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
  std::vector<Input> inputs() const {
    return {
        {{tokens(), heads, dim}}, {{tokens(), kv_heads, dim}}, {{tokens(), kv_heads, value_dim}}};
  }
  /// Backward calls that products of warpgroups serve.
  int64_t by_warpgroups() const {
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    const bool served = warpgroups_serve(dim) && value_dim == dim;
    return served && (sinks == 0 || window >= longest) ? 1 : 0;
  }
};

/// Who computes: the backward pass by products of warpgroups, the rest by cuDNN; cuDNN; our other
/// kernels.
enum class Way { kWarpgroups, kCudnn, kOwn };
constexpr Way kWays[] = {Way::kWarpgroups, Way::kCudnn, Way::kOwn};
const char* name_of(Way way) {
  return way == Way::kWarpgroups ? "warpgroups" : way == Way::kCudnn ? "cuDNN" : "own";
}

std::ostream& operator<<(std::ostream& out, const Case& c) {
  for (const int32_t length : c.lengths) {
    out << length << "_";
  }
  return out << "tokens_" << c.heads << "_on_" << c.kv_heads << "_heads_of_" << c.dim << "_and_"
             << c.value_dim << "_window_" << c.window << "_sinks_" << c.sinks;
}

/// Segments that own their numbers.
struct Packing {
  explicit Packing(const std::vector<int32_t>& lengths) : position(lengths.size()) {
    for (const int32_t n : lengths) {
      start.push_back(start.back() + n);
    }
  }
  Segments segments() const { return {.start = start, .position = position, .slot = {}}; }
  std::vector<int32_t> start = {0};
  std::vector<int32_t> position;
};

AttentionConfig config_of(const Case& c) {
  return {
      .scale = 1.0F / std::sqrt(static_cast<float>(c.dim)), .window = c.window, .sinks = c.sinks};
}

Operation operation_of(const Case& c, const Packing& packing) {
  return [&c, &packing](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[1], in[2], packing.segments(), config_of(c));
  };
}

std::vector<std::vector<double>> draw_bf16(const std::vector<Input>& inputs) {
  auto values = testing::draw(inputs);
  for (auto& v : values) {
    v = testing::as_stored(v, Dtype::kBF16);
  }
  return values;
}

Run on_device(const Operation& operation, const std::vector<Input>& inputs,
              const std::vector<std::vector<double>>& values) {
  return testing::run_on_cuda(operation, inputs, values, Dtype::kBF16, true);
}

void expect_close(const Run& run, const Run& exact, double forward, double backward) {
  EXPECT_LE(norm_error(run.output, exact.output), forward);
  ASSERT_EQ(run.grads.size(), exact.grads.size());
  for (size_t i = 0; i < run.grads.size(); ++i) {
    if (!exact.grads[i].empty()) {
      EXPECT_LE(norm_error(run.grads[i], exact.grads[i], kNarrowFloor), backward)
          << "gradient of input " << i;
    }
  }
}

class AttentionCudnn : public testing::WithCudnn {
 protected:
  /// All ways against the definition in fp64; two runs give the same bits. by_cudnn: calls that it
  /// serves, those among them that products of warpgroups take too.
  void expect_definition(const Operation& operation, const std::vector<Input>& inputs,
                         int64_t by_cudnn, int64_t by_warpgroups) {
    const auto values = draw_bf16(inputs);
    const auto exact = testing::run_operation<double>(operation, inputs, values, true, true, true);
    for (const Way way : kWays) {
      SCOPED_TRACE(std::string(name_of(way)) + ", " + cudnn_status());
      allow(way);
      const int64_t cudnn_before = cudnn_calls();
      const int64_t before = warpgroup_calls();
      const auto run = on_device(operation, inputs, values);
      const int64_t taken = way == Way::kWarpgroups && warpgroups_serve(64) ? by_warpgroups : 0;
      EXPECT_EQ(warpgroup_calls() - before, taken);
      EXPECT_EQ(cudnn_calls() - cudnn_before,
                served_ && way != Way::kOwn && by_cudnn > 0 ? by_cudnn - taken : 0);
      expect_close(run, exact, kNarrowForward, kNarrowBackward);
      const auto again = on_device(operation, inputs, values);
      EXPECT_EQ(again.output, run.output) << "two runs differ";
      EXPECT_EQ(again.grads, run.grads) << "two runs differ";
    }
  }
  static void allow(Way way) {
    allow_warpgroups(way == Way::kWarpgroups);
    allow_cudnn(way != Way::kOwn);
  }
};

class AttentionCudnnShapes : public AttentionCudnn, public ::testing::WithParamInterface<Case> {};

TEST_P(AttentionCudnnShapes, MatchTheDefinition) {
  const Packing packing(GetParam().lengths);
  expect_definition(operation_of(GetParam(), packing), GetParam().inputs(), 2,
                    GetParam().by_warpgroups());
}

// Lengths that are taken as they are and lengths that are rounded up; segments of no, one and few
// tokens between longer ones.
INSTANTIATE_TEST_SUITE_P(
    Tried, AttentionCudnnShapes,
    ::testing::Values(Case{{256}, 2, 2, 64, 64, 0}, Case{{384}, 4, 2, 128, 128, 0},
                      Case{{384, 384, 384}, 4, 1, 128, 128, 0}, Case{{300}, 6, 2, 64, 64, 0},
                      Case{{257, 1, 0, 500, 64}, 4, 2, 128, 128, 0},
                      Case{{0, 700, 3, 0}, 2, 1, 96, 96, 0}, Case{{512}, 4, 2, 128, 64, 0},
                      Case{{512}, 4, 2, 128, 128, 100}, Case{{300, 450}, 2, 1, 64, 64, 33},
                      Case{{256, 256}, 2, 1, 256, 256, 0}, Case{{400}, 2, 1, 192, 128, 0},
                      Case{{300, 400}, 2, 1, 64, 64, 400, 10}),
    ::testing::PrintToStringParamName());

// Past the tiles of products of warpgroups, alone and packed, with groups of heads that do not
// divide them and windows within one and over several.
INSTANTIATE_TEST_SUITE_P(Tiles, AttentionCudnnShapes,
                         ::testing::Values(Case{{1, 63, 64, 65, 300}, 32, 8, 64, 64, 0},
                                           Case{{1, 63, 64, 65, 300}, 32, 8, 128, 128, 0},
                                           Case{{127, 0, 128, 129, 513}, 3, 1, 64, 64, 0},
                                           Case{{127, 0, 128, 129, 513}, 7, 1, 128, 128, 0},
                                           Case{{577, 65}, 2, 2, 64, 64, 5},
                                           Case{{577, 65}, 5, 1, 128, 128, 64},
                                           Case{{700, 30}, 4, 2, 64, 64, 129}),
                         ::testing::PrintToStringParamName());

TEST_F(AttentionCudnn, WhatItDoesNotServeIsOurs) {
  for (const Case& c :
       {Case{{255}, 2, 1, 64, 64, 0}, Case{{300}, 2, 1, 32, 32, 0}, Case{{300}, 2, 1, 72, 72, 0},
        Case{{300, 400}, 2, 1, 64, 64, 399, 10}, Case{{500, 90}, 4, 2, 128, 128, 40, 70}}) {
    const Packing packing(c.lengths);
    expect_definition(operation_of(c, packing), c.inputs(), 0, c.by_warpgroups());
  }
}

TEST_F(AttentionCudnn, HeadsOfAFusedProjection) {
  // Column slices of one tensor, and so are their gradients; then ones that begin where 16 bytes do
  // not.
  const Packing packing({256, 256});
  for (const int64_t first : {0, 4}) {
    const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
      const Tensor q = in[0].slice(1, first, 256).split_last(4, 64);
      const Tensor k = in[0].slice(1, first + 256, 128).split_last(2, 64);
      const Tensor v = in[0].slice(1, first + 384, 128).split_last(2, 64);
      return attention(ctx, q, k, v, packing.segments(), {.scale = 0.125F});
    };
    expect_definition(operation, {{{512, 520}}}, first == 0 ? 2 : 0, first == 0 ? 1 : 0);
  }
}

TEST_F(AttentionCudnn, OneTensorForAll) {
  const Packing packing({300});
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return attention(ctx, in[0], in[0], in[0], packing.segments(), {.scale = 0.125F});
  };
  expect_definition(operation, {{{300, 2, 64}}}, 2, 1);
}

TEST_F(AttentionCudnn, FrozenInputsAreLeftOut) {
  const Case c = {{256}, 2, 1, 64, 64, 0};
  const Packing packing(c.lengths);
  for (size_t wanted = 0; wanted < 3; ++wanted) {
    std::vector<Input> inputs = c.inputs();
    for (size_t i = 0; i < 3; ++i) {
      inputs[i].differentiable = i == wanted;
    }
    expect_definition(operation_of(c, packing), inputs, 2, 1);
  }
}

TEST_F(AttentionCudnn, GradientsAreAddedToWhatIsThere) {
  // Each input is used twice: the second backward step adds.
  const Case c = {{300, 256}, 2, 1, 64, 64, 0};
  const Packing packing(c.lengths);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    const Tensor y = attention(ctx, in[0], in[1], in[2], packing.segments(), config_of(c));
    return attention(ctx, y, in[1], in[2], packing.segments(), config_of(c));
  };
  expect_definition(operation, c.inputs(), 4, 2);
}

TEST_F(AttentionCudnn, EitherPassMayBeOurs) {
  const Case c = {{300, 256, 0, 17}, 4, 2, 64, 64, 0};
  const Packing packing(c.lengths);
  const auto values = draw_bf16(c.inputs());
  const auto exact = testing::run_operation<double>(operation_of(c, packing), c.inputs(), values,
                                                    true, true, true);
  for (const bool forward : {true, false}) {
    for (const Way way : kWays) {
      SCOPED_TRACE(std::string(forward ? "cuDNN" : "own") + " forward, backward " + name_of(way));
      const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
        allow_cudnn(forward);
        const Tensor y = attention(ctx, in[0], in[1], in[2], packing.segments(), config_of(c));
        allow_warpgroups(way == Way::kWarpgroups);
        allow_cudnn(way == Way::kCudnn);
        return y;
      };
      const int64_t before = cudnn_calls();
      const auto run = on_device(operation, c.inputs(), values);
      const int64_t expected = (forward ? 1 : 0) + (way == Way::kCudnn ? 1 : 0);
      EXPECT_EQ(cudnn_calls() - before, served_ ? expected : 0) << cudnn_status();
      expect_close(run, exact, kNarrowForward, kNarrowBackward);
    }
  }
}

// In a process of its own, which has not asked for the library yet.
TEST(AttentionCudnnDeathTest, SaysOnceThatOurKernelsServe) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto notes = [](const std::string& said) {
    const std::string note = "attention is computed by this program's own kernels";
    int count = 0;
    for (size_t at = said.find(note); at != std::string::npos; at = said.find(note, at + 1)) {
      ++count;
    }
    return count;
  };
  EXPECT_EXIT(
      {
        setenv("CAMBIUM_CUDNN_LIBRARY", "/nonexistent/libcudnn.so", 1);
        const bool served = cuda::attention::sdpa_plan({}) != nullptr ||
                            cuda::attention::sdpa_plan({}) != nullptr ||
                            cudnn_status().rfind("no cuDNN: ", 0) != 0;
        std::exit(served ? 1 : 0);
      },
      ::testing::ExitedWithCode(0), ::testing::ResultOf(notes, 1));
}

/// Sizes beyond the definition on a CPU: one way against the other.
TEST_F(AttentionCudnn, LongSequencesGoInRuns) {
  // Two runs of heads; runs of single segments; ragged runs of one segment and of several.
  for (const Case& c :
       {Case{{8192}, 16, 4, 64, 64, 0}, Case{{4096, 4096, 4096, 4096, 4096}, 8, 2, 64, 64, 0},
        Case{{4097, 1, 2000}, 8, 2, 128, 128, 0}, Case{{9000}, 8, 2, 64, 64, 3000},
        Case{{6000, 100, 5000, 300, 300, 40}, 16, 4, 64, 64, 0}}) {
    SCOPED_TRACE(::testing::PrintToString(c));
    const Packing packing(c.lengths);
    const auto values = draw_bf16(c.inputs());
    std::vector<testing::Run> runs;
    for (const Way way : kWays) {
      SCOPED_TRACE(name_of(way));
      allow(way);
      const int64_t before = cudnn_calls();
      runs.push_back(on_device(operation_of(c, packing), c.inputs(), values));
      if (served_ && way == Way::kCudnn) {
        EXPECT_GE(cudnn_calls() - before, 3) << cudnn_status();
      }
      EXPECT_EQ(on_device(operation_of(c, packing), c.inputs(), values).grads, runs.back().grads);
      expect_close(runs.back(), runs.front(), 2 * kNarrowForward, 2 * kNarrowBackward);
    }
  }
}

}  // namespace
}  // namespace cambium
#endif
