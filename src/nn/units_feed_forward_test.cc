// Feed-forwards and routed experts.
#include <gtest/gtest.h>

#include "base/testing.h"
#include "nn/testing_units.h"
#include "nn/units/units.h"

namespace cambium {

std::vector<testing::UnitCase> testing::feed_forward_cases() {
  return {
      {"experts",
       {"experts",
        {{"experts", int64_t{6}},
         {"top", int64_t{2}},
         {"inner", int64_t{7}},
         {"router", "topk_softmax"}}},
       {{"router.weight", {6, 12}},
        {"experts.gate.weight", {6, 7, 12}},
        {"experts.up.weight", {6, 7, 12}},
        {"experts.down.weight", {6, 12, 7}}}},
      {"experts beside a shared one with a gate",
       {"experts",
        {{"experts", int64_t{6}},
         {"top", int64_t{3}},
         {"inner", int64_t{7}},
         {"router", "softmax"},
         {"renormalise", true},
         {"shared", int64_t{9}},
         {"shared_gate", true}}},
       {{"router.weight", {6, 12}},
        {"experts.gate.weight", {6, 7, 12}},
        {"experts.up.weight", {6, 7, 12}},
        {"experts.down.weight", {6, 12, 7}},
        {"shared.gate.weight", {9, 12}},
        {"shared.up.weight", {9, 12}},
        {"shared.down.weight", {12, 9}},
        {"shared_gate.weight", {1, 12}}}},
      {"experts of two matrices in a latent width, by groups",
       {"experts",
        {{"experts", int64_t{8}},
         {"top", int64_t{2}},
         {"inner", int64_t{7}},
         {"router", "sigmoid"},
         {"router_bias", true},
         {"groups", int64_t{4}},
         {"group_top", int64_t{2}},
         {"renormalise", true},
         {"scale", 2.5},
         {"shared", int64_t{10}},
         {"activation", "relu2"},
         {"latent", int64_t{5}}}},
       {{"router.weight", {8, 12}},
        {"router.bias", {8}},
        {"latent_in.weight", {5, 12}},
        {"experts.up.weight", {8, 7, 5}},
        {"experts.down.weight", {8, 5, 7}},
        {"latent_out.weight", {12, 5}},
        {"shared.up.weight", {10, 12}},
        {"shared.down.weight", {12, 10}}}},
      {"experts with biases and a clamped SwiGLU",
       {"experts",
        {{"experts", int64_t{4}},
         {"top", int64_t{2}},
         {"inner", int64_t{7}},
         {"router", "topk_softmax"},
         {"bias", true},
         {"activation", "clamped_swiglu"},
         {"limit", 0.5}}},
       {{"router.weight", {4, 12}},
        {"router.bias", {4}},
        {"experts.gate.weight", {4, 7, 12}},
        {"experts.gate.bias", {4, 7}},
        {"experts.up.weight", {4, 7, 12}},
        {"experts.up.bias", {4, 7}},
        {"experts.down.weight", {4, 12, 7}},
        {"experts.down.bias", {4, 12}}}},
      {"swiglu",
       {"swiglu", {{"inner", int64_t{20}}, {"gate_scale", 0.6}, {"bias", true}}},
       {{"gate.weight", {20, 12}},
        {"up.weight", {20, 12}},
        {"down.weight", {12, 20}},
        {"gate.bias", {20}},
        {"up.bias", {20}},
        {"down.bias", {12}}}},
      {"clamped swiglu",
       {"swiglu", {{"inner", int64_t{20}}, {"activation", "clamped_swiglu"}, {"limit", 0.5}}},
       {{"gate.weight", {20, 12}}, {"up.weight", {20, 12}}, {"down.weight", {12, 20}}}},
      {"swiglu with gelu",
       {"swiglu", {{"inner", int64_t{20}}, {"activation", "gelu_tanh"}}},
       {{"gate.weight", {20, 12}}, {"up.weight", {20, 12}}, {"down.weight", {12, 20}}}},
      {"feed forward",
       {"feed_forward", {{"inner", int64_t{20}}, {"activation", "relu2"}, {"bias", true}}},
       {{"up.weight", {20, 12}},
        {"up.bias", {20}},
        {"down.weight", {12, 20}},
        {"down.bias", {12}}}},
      {"feed forward with xIELU",
       {"feed_forward", {{"inner", int64_t{20}}, {"activation", "xielu"}}},
       {{"up.weight", {20, 12}}, {"down.weight", {12, 20}}, {"alpha_p", {1}}, {"alpha_n", {1}}}},
  };
}

namespace {

using testing::kWidth;
using testing::with;

TEST(Units, ExpertsSayWhatTheyCannotBe) {
  const Options options = {
      {"experts", int64_t{8}}, {"top", int64_t{3}}, {"inner", int64_t{5}}, {"router", "sigmoid"}};
  const auto error = [&](std::initializer_list<std::pair<std::string, OptionValue>> more) {
    return testing::error_of([&] { make_unit({"experts", with(options, more)}, kWidth); });
  };
  EXPECT_EQ(error({{"router", "hash"}}),
            "experts: expected router softmax, topk_softmax or sigmoid, got 'hash'");
  EXPECT_EQ(error({{"top", int64_t{9}}}), "experts: expected top of at most 8 experts, got 9");
  EXPECT_EQ(
      error({{"groups", int64_t{4}}, {"group_top", int64_t{1}}}),
      "experts: expected groups that divide 8 experts, of which group_top hold the top 3, got "
      "4 groups and group_top 1");
  EXPECT_EQ(error({{"bias", true}, {"router_bias", true}}),
            "experts: expected one bias of the router, of its logits (bias) or of its choice "
            "(router_bias)");
  EXPECT_EQ(error({{"shared_gate", true}}),
            "experts: expected a shared expert, whose gate shared_gate is");
  EXPECT_NE(error({{"activation", "tanh"}}).find(", got 'tanh'"), std::string::npos);
}

}  // namespace
}  // namespace cambium
