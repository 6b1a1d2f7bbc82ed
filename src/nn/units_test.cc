// Every unit that runs: the fast kernels against the definition in double precision, a sequence in
// pieces against the whole, parameters, sizes that must be refused.
#include <gtest/gtest.h>

#include "base/testing.h"
#include "nn/testing.h"
#include "nn/units/units.h"

namespace cambium {
namespace {

constexpr int64_t kWidth = 12;
constexpr int64_t kTokens = 21;

struct Case {
  const char* name;
  UnitSpec spec;
  std::map<std::string, std::vector<int64_t>> parameters;
};

Options with(Options options, std::initializer_list<std::pair<std::string, OptionValue>> more) {
  for (const auto& [key, value] : more) {
    options.set(key, value);
  }
  return options;
}

std::vector<Case> cases() {
  const Options attention = {
      {"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{6}}};
  const std::map<std::string, std::vector<int64_t>> plain = {{"q_proj.weight", {24, 12}},
                                                             {"k_proj.weight", {12, 12}},
                                                             {"v_proj.weight", {12, 12}},
                                                             {"o_proj.weight", {12, 24}}};
  const Options latent = {{"heads", int64_t{3}},
                          {"kv_rank", int64_t{8}},
                          {"nope_dim", int64_t{5}},
                          {"rope_dim", int64_t{6}},
                          {"value_dim", int64_t{4}}};
  auto normed = plain;
  normed.insert({{"q_norm.weight", {6}}, {"k_norm.weight", {6}}});
  auto normed_width = plain;
  normed_width.insert({{"q_norm.weight", {24}},
                       {"q_norm.bias", {24}},
                       {"k_norm.weight", {12}},
                       {"k_norm.bias", {12}}});
  auto gated = plain;
  gated["q_proj.weight"] = {48, 12};
  auto with_sinks = plain;
  with_sinks["sinks"] = {4};
  auto biased = plain;
  biased.insert(
      {{"q_proj.bias", {24}}, {"k_proj.bias", {12}}, {"v_proj.bias", {12}}, {"o_proj.bias", {12}}});
  return {
      {"attention", {"attention", attention}, plain},
      {"attention without rope", {"attention", with(attention, {{"rope", false}})}, plain},
      {"attention with scales",
       {"attention", with(attention, {{"scale", 0.2}, {"key_scale", 0.7}})},
       plain},
      {"attention with norms of q and k",
       {"attention", with(attention, {{"qk_norm_eps", 1e-6}})},
       normed},
      {"attention with zero-centred norms",
       {"attention", with(attention, {{"qk_norm_eps", 1e-6}, {"qk_norm", "zero_centred"}})},
       normed},
      {"attention with norms over the width",
       {"attention",
        with(attention, {{"qk_norm_eps", 1e-6}, {"qk_norm_over", "width"}, {"qk_norm", "layer"}})},
       normed_width},
      {"attention with biases",
       {"attention", with(attention, {{"qkv_bias", true}, {"out_bias", true}})},
       biased},
      {"attention with an output gate", {"attention", with(attention, {{"gate", true}})}, gated},
      {"attention with a soft cap", {"attention", with(attention, {{"softcap", 0.3}})}, plain},
      {"attention with sinks' scores",
       {"attention", with(attention, {{"sink_logits", true}})},
       with_sinks},
      {"sliding window with everything",
       {"sliding_window", with(attention, {{"window", int64_t{5}},
                                           {"sinks", int64_t{2}},
                                           {"softcap", 0.5},
                                           {"sink_logits", true}})},
       with_sinks},
      {"attention with an output gate, without rope",
       {"attention", with(attention, {{"gate", true}, {"rope", false}})},
       gated},
      {"sliding window", {"sliding_window", with(attention, {{"window", int64_t{5}}})}, plain},
      {"sliding window with sinks",
       {"sliding_window", with(attention, {{"window", int64_t{5}}, {"sinks", int64_t{2}}})},
       plain},
      {"latent attention",
       {"latent_attention", latent},
       {{"q_proj.weight", {33, 12}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"o_proj.weight", {12, 12}}}},
      {"latent attention with an index, a gate and a latent of queries",
       {"latent_attention", with(latent, {{"q_rank", int64_t{10}},
                                          {"gate", true},
                                          {"scale", 0.4},
                                          {"index_heads", int64_t{2}},
                                          {"index_dim", int64_t{7}},
                                          {"index_top", int64_t{6}}})},
       {{"q_a_proj.weight", {10, 12}},
        {"q_a_norm.weight", {10}},
        {"q_b_proj.weight", {33, 10}},
        {"kv_a_proj.weight", {14, 12}},
        {"kv_a_norm.weight", {8}},
        {"kv_b_proj.weight", {27, 8}},
        {"indexer.q_proj.weight", {14, 10}},
        {"indexer.k_proj.weight", {7, 12}},
        {"indexer.k_norm.weight", {7}},
        {"indexer.k_norm.bias", {7}},
        {"indexer.weights_proj.weight", {2, 12}},
        {"gate_proj.weight", {3, 12}},
        {"o_proj.weight", {12, 12}}}},
      {"mamba",
       {"mamba",
        {{"inner", int64_t{16}},
         {"xb", int64_t{8}},
         {"state", int64_t{4}},
         {"dt_rank", int64_t{3}}}},
       {{"in_proj.weight", {48, 12}},
        {"dt_in_proj.weight", {3, 12}},
        {"dt_proj.weight", {16, 3}},
        {"dt_proj.bias", {16}},
        {"conv1d.weight", {16, 1, 4}},
        {"conv1d.bias", {16}},
        {"A_log", {16, 4}},
        {"D", {16}},
        {"out_proj.weight", {12, 16}}}},
      {"mamba that convolves before it repeats, without bias",
       {"mamba",
        {{"inner", int64_t{16}},
         {"xb", int64_t{8}},
         {"state", int64_t{4}},
         {"dt_rank", int64_t{3}},
         {"repeat_before_conv", false},
         {"conv_bias", false}}},
       {{"in_proj.weight", {48, 12}},
        {"dt_in_proj.weight", {3, 12}},
        {"dt_proj.weight", {16, 3}},
        {"dt_proj.bias", {16}},
        {"conv1d.weight", {8, 1, 4}},
        {"A_log", {16, 4}},
        {"D", {16}},
        {"out_proj.weight", {12, 16}}}},
      {"mamba2",
       {"mamba2",
        {{"heads", int64_t{4}},
         {"head_dim", int64_t{6}},
         {"state", int64_t{5}},
         {"x_heads", int64_t{2}},
         {"b_heads", int64_t{2}},
         {"c_heads", int64_t{4}},
         {"norm_group", int64_t{6}}}},
       {{"in_proj.weight", {24 + 12 + 10 + 20 + 4, 12}},
        {"conv1d.weight", {42, 1, 4}},
        {"conv1d.bias", {42}},
        {"dt_bias", {4}},
        {"A_log", {4}},
        {"D", {4}},
        {"norm.weight", {24}},
        {"out_proj.weight", {12, 24}}}},
      {"mamba1",
       {"mamba1", {{"inner", int64_t{10}}, {"state", int64_t{4}}, {"dt_rank", int64_t{3}}}},
       {{"in_proj.weight", {20, 12}},
        {"conv1d.weight", {10, 1, 4}},
        {"conv1d.bias", {10}},
        {"x_proj.weight", {11, 10}},
        {"dt_proj.weight", {10, 3}},
        {"dt_proj.bias", {10}},
        {"A_log", {10, 4}},
        {"D", {10}},
        {"out_proj.weight", {12, 10}}}},
      {"mamba1 with norms, without a bias of its convolution",
       {"mamba1",
        {{"inner", int64_t{16}},
         {"state", int64_t{5}},
         {"dt_rank", int64_t{4}},
         {"conv", int64_t{3}},
         {"conv_bias", false},
         {"norm_eps", 1e-6}}},
       {{"in_proj.weight", {32, 12}},
        {"conv1d.weight", {16, 1, 3}},
        {"x_proj.weight", {14, 16}},
        {"dt_norm.weight", {4}},
        {"b_norm.weight", {5}},
        {"c_norm.weight", {5}},
        {"dt_proj.weight", {16, 4}},
        {"dt_proj.bias", {16}},
        {"A_log", {16, 5}},
        {"D", {16}},
        {"out_proj.weight", {12, 16}}}},
      {"short convolution",
       {"short_conv", {{"conv", int64_t{3}}}},
       {{"in_proj.weight", {36, 12}}, {"conv.weight", {12, 1, 3}}, {"out_proj.weight", {12, 12}}}},
      {"short convolution with biases",
       {"short_conv", {{"conv", int64_t{4}}, {"bias", true}}},
       {{"in_proj.weight", {36, 12}},
        {"in_proj.bias", {36}},
        {"conv.weight", {12, 1, 4}},
        {"conv.bias", {12}},
        {"out_proj.weight", {12, 12}},
        {"out_proj.bias", {12}}}},
      {"gated delta net that may turn its state",
       {"gated_delta_net",
        {{"heads", int64_t{4}},
         {"key_dim", int64_t{3}},
         {"value_dim", int64_t{6}},
         {"allow_neg_eigval", true}}},
       {{"in_proj.weight", {12 + 12 + 24 + 24, 12}},
        {"ba_proj.weight", {8, 12}},
        {"conv1d.weight", {48, 1, 4}},
        {"A_log", {4}},
        {"dt_bias", {4}},
        {"norm.weight", {6}},
        {"out_proj.weight", {12, 24}}}},
      {"kimi delta of a bounded decay",
       {"kimi_delta",
        {{"heads", int64_t{4}},
         {"head_dim", int64_t{6}},
         {"gate_rank", int64_t{0}},
         {"decay", "sigmoid"},
         {"lower_bound", -5.0},
         {"allow_neg_eigval", true}}},
       {{"in_proj.weight", {72, 12}},
        {"conv1d.weight", {72, 1, 4}},
        {"decay_proj.weight", {24, 12}},
        {"A_log", {4}},
        {"dt_bias", {24}},
        {"beta_proj.weight", {4, 12}},
        {"gate_proj.weight", {24, 12}},
        {"norm.weight", {6}},
        {"out_proj.weight", {12, 24}}}},
      {"mamba2 without a norm, its rows scaled",
       {"mamba2",
        {{"heads", int64_t{4}},
         {"head_dim", int64_t{6}},
         {"state", int64_t{5}},
         {"b_heads", int64_t{2}},
         {"norm", false},
         {"in_scale", 1.25},
         {"row_scales", std::vector<double>{0.35, 1.5, 0.5, 2.0, 0.3}}}},
       {{"in_proj.weight", {24 + 24 + 10 + 10 + 4, 12}},
        {"conv1d.weight", {44, 1, 4}},
        {"conv1d.bias", {44}},
        {"dt_bias", {4}},
        {"A_log", {4}},
        {"D", {4}},
        {"out_proj.weight", {12, 24}}}},
      {"gated delta net",
       {"gated_delta_net",
        {{"heads", int64_t{4}},
         {"q_heads", int64_t{2}},
         {"k_heads", int64_t{2}},
         {"key_dim", int64_t{6}},
         {"value_dim", int64_t{5}},
         {"rope", true}}},
       {{"in_proj.weight", {12 + 12 + 20 + 20, 12}},
        {"ba_proj.weight", {8, 12}},
        {"conv1d.weight", {44, 1, 4}},
        {"A_log", {4}},
        {"dt_bias", {4}},
        {"norm.weight", {5}},
        {"out_proj.weight", {12, 20}}}},
      {"kimi delta",
       {"kimi_delta", {{"heads", int64_t{4}}, {"head_dim", int64_t{6}}, {"conv", int64_t{3}}}},
       {{"in_proj.weight", {72, 12}},
        {"conv1d.weight", {72, 1, 3}},
        {"decay_a_proj.weight", {6, 12}},
        {"decay_b_proj.weight", {24, 6}},
        {"A_log", {4}},
        {"dt_bias", {24}},
        {"beta_proj.weight", {4, 12}},
        {"gate_a_proj.weight", {6, 12}},
        {"gate_b_proj.weight", {24, 6}},
        {"norm.weight", {6}},
        {"out_proj.weight", {12, 24}}}},
      {"kimi delta of grouped heads, with full gates and biases",
       {"kimi_delta",
        {{"heads", int64_t{4}},
         {"q_heads", int64_t{4}},
         {"k_heads", int64_t{2}},
         {"v_heads", int64_t{2}},
         {"head_dim", int64_t{6}},
         {"gate_rank", int64_t{0}},
         {"rope", true},
         {"conv_bias", true},
         {"out_bias", true}}},
       {{"in_proj.weight", {48, 12}},
        {"conv1d.weight", {48, 1, 4}},
        {"conv1d.bias", {48}},
        {"decay_proj.weight", {24, 12}},
        {"A_log", {4}},
        {"dt_bias", {24}},
        {"beta_proj.weight", {4, 12}},
        {"gate_proj.weight", {24, 12}},
        {"norm.weight", {6}},
        {"out_proj.weight", {12, 24}},
        {"out_proj.bias", {12}}}},
      {"lightning, as in MiniMax",
       {"lightning",
        {{"heads", int64_t{3}},
         {"head_dim", int64_t{4}},
         {"rows_by_head", true},
         {"layer_of_slopes", int64_t{2}},
         {"layers", int64_t{5}}}},
       {{"qkv_proj.weight", {36, 12}},
        {"gate_proj.weight", {12, 12}},
        {"norm.weight", {12}},
        {"out_proj.weight", {12, 12}}}},
      {"lightning in place of attention",
       {"lightning",
        {{"heads", int64_t{4}},
         {"kv_heads", int64_t{2}},
         {"head_dim", int64_t{6}},
         {"silu", false},
         {"rope", true},
         {"norm_group", int64_t{6}},
         {"qk_norm_eps", 1e-6},
         {"qkv_bias", true},
         {"out_bias", true}}},
       {{"qkv_proj.weight", {48, 12}},
        {"qkv_proj.bias", {48}},
        {"q_norm.weight", {6}},
        {"k_norm.weight", {6}},
        {"gate_proj.weight", {24, 12}},
        {"norm.weight", {24}},
        {"out_proj.weight", {12, 24}},
        {"out_proj.bias", {12}}}},
      {"lightning with SiLU and rows of q, k and v",
       {"lightning", {{"heads", int64_t{4}}, {"kv_heads", int64_t{1}}, {"head_dim", int64_t{6}}}},
       {{"qkv_proj.weight", {36, 12}},
        {"gate_proj.weight", {24, 12}},
        {"norm.weight", {24}},
        {"out_proj.weight", {12, 24}}}},
      {"a window beside mamba2",
       {"parallel", with(attention, {{"window", int64_t{5}},
                                     {"recurrent", "mamba2"},
                                     {"recurrent.heads", int64_t{4}},
                                     {"recurrent.head_dim", int64_t{6}},
                                     {"recurrent.state", int64_t{5}},
                                     {"recurrent.b_heads", int64_t{2}},
                                     {"recurrent.norm_group", int64_t{6}},
                                     {"out_bias", true}})},
       {{"q_proj.weight", {24, 12}},
        {"k_proj.weight", {12, 12}},
        {"v_proj.weight", {12, 12}},
        {"o_proj.weight", {12, 24}},
        {"o_proj.bias", {12}},
        {"gate_proj.weight", {4, 12}},
        {"gate_proj.bias", {4}},
        {"recurrent.in_proj.weight", {24 + 24 + 10 + 10 + 4, 12}},
        {"recurrent.conv1d.weight", {44, 1, 4}},
        {"recurrent.conv1d.bias", {44}},
        {"recurrent.dt_bias", {4}},
        {"recurrent.A_log", {4}},
        {"recurrent.D", {4}},
        {"recurrent.norm.weight", {24}}}},
      {"a window beside lightning",
       {"parallel", with(attention, {{"window", int64_t{5}},
                                     {"sinks", int64_t{2}},
                                     {"window_dropout", 0.5},
                                     {"recurrent", "lightning"},
                                     {"recurrent.heads", int64_t{4}},
                                     {"recurrent.head_dim", int64_t{6}},
                                     {"recurrent.rope", true}})},
       {{"q_proj.weight", {24, 12}},
        {"k_proj.weight", {12, 12}},
        {"v_proj.weight", {12, 12}},
        {"o_proj.weight", {12, 24}},
        {"gate_proj.weight", {4, 12}},
        {"gate_proj.bias", {4}},
        {"recurrent.qkv_proj.weight", {72, 12}},
        {"recurrent.gate_proj.weight", {24, 12}},
        {"recurrent.norm.weight", {24}}}},
      {"mamba with biases of its projections",
       {"mamba",
        {{"inner", int64_t{16}},
         {"xb", int64_t{8}},
         {"state", int64_t{4}},
         {"dt_rank", int64_t{3}},
         {"in_bias", true},
         {"out_bias", true}}},
       {{"in_proj.weight", {48, 12}},
        {"in_proj.bias", {48}},
        {"dt_in_proj.weight", {3, 12}},
        {"dt_proj.weight", {16, 3}},
        {"dt_proj.bias", {16}},
        {"conv1d.weight", {16, 1, 4}},
        {"conv1d.bias", {16}},
        {"A_log", {16, 4}},
        {"D", {16}},
        {"out_proj.weight", {12, 16}},
        {"out_proj.bias", {12}}}},
      {"mamba2 with a bias of its output",
       {"mamba2",
        {{"heads", int64_t{4}},
         {"head_dim", int64_t{6}},
         {"state", int64_t{5}},
         {"b_heads", int64_t{2}},
         {"norm_group", int64_t{6}},
         {"out_bias", true}}},
       {{"in_proj.weight", {24 + 24 + 10 + 10 + 4, 12}},
        {"conv1d.weight", {44, 1, 4}},
        {"conv1d.bias", {44}},
        {"dt_bias", {4}},
        {"A_log", {4}},
        {"D", {4}},
        {"norm.weight", {24}},
        {"out_proj.weight", {12, 24}},
        {"out_proj.bias", {12}}}},
      {"gated delta net with biases",
       {"gated_delta_net",
        {{"heads", int64_t{4}},
         {"q_heads", int64_t{2}},
         {"k_heads", int64_t{2}},
         {"key_dim", int64_t{6}},
         {"value_dim", int64_t{5}},
         {"rope", true},
         {"conv_bias", true},
         {"out_bias", true}}},
       {{"in_proj.weight", {12 + 12 + 20 + 20, 12}},
        {"ba_proj.weight", {8, 12}},
        {"conv1d.weight", {44, 1, 4}},
        {"conv1d.bias", {44}},
        {"A_log", {4}},
        {"dt_bias", {4}},
        {"norm.weight", {5}},
        {"out_proj.weight", {12, 20}},
        {"out_proj.bias", {12}}}},
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

TEST(Units, FastKernelsMeetTheDefinition) {
  for (const Case& c : cases()) {
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const Batch batch = testing::piece(kTokens);
    std::vector<double> results[3];
    for (const int form : {0, 1, 2}) {
      const Dtype dtype = form == 2 ? Dtype::kF64 : Dtype::kF32;
      const auto unit = make_unit(c.spec, kWidth);
      const testing::Memory memory(*unit, dtype);
      const OwnedTensor x = testing::random_rows(kTokens, kWidth, dtype);
      ctx.reference = form == 1;
      results[form] = testing::values_of(testing::run(ctx, *unit, x.view, batch, rope));
    }
    EXPECT_LT(testing::largest_difference(results[0], results[2]), 2e-5) << c.name;
    EXPECT_LT(testing::largest_difference(results[1], results[2]), 2e-5) << c.name;
    EXPECT_GT(testing::largest_difference(results[2], std::vector<double>(results[2].size())), 1e-3)
        << c.name;
  }
}

/// A window of 5 tokens beside Gated DeltaNet, of which each has its say.
UnitSpec window_and_delta(double dropout) {
  return {"parallel",
          {{"heads", int64_t{4}},
           {"kv_heads", int64_t{2}},
           {"head_dim", int64_t{6}},
           {"window", int64_t{5}},
           {"window_dropout", dropout},
           {"recurrent", "gated_delta_net"},
           {"recurrent.heads", int64_t{4}},
           {"recurrent.key_dim", int64_t{6}},
           {"recurrent.value_dim", int64_t{6}}}};
}

/// Fills the gate's bias; its weights become zero.
void set_gate(Unit& unit, float bias) {
  unit.visit([&](const std::string& name, Parameter& p) {
    if (name.starts_with("gate_proj.")) {
      std::fill_n(p.tensor.ptr<float>(), p.numel(), name == "gate_proj.bias" ? bias : 0.0F);
    }
  });
}

// With its gate open to one side, the pair gives what that side gives alone.
TEST(Units, AGateChoosesBetweenAWindowAndARecurrence) {
  RopeTable rope({.dim = 6});
  Arena arena;
  Context ctx{.arena = &arena};
  const auto pair = make_unit(window_and_delta(0.0), kWidth);
  const testing::Memory memory(*pair, Dtype::kF32);
  const OwnedTensor x = testing::random_rows(kTokens, kWidth, Dtype::kF32);
  const Batch batch = testing::piece(kTokens);
  for (const bool near : {false, true}) {
    UnitSpec spec{"sliding_window",
                  {{"heads", int64_t{4}},
                   {"kv_heads", int64_t{2}},
                   {"head_dim", int64_t{6}},
                   {"window", int64_t{5}}}};
    if (!near) {
      spec = recurrent_part(window_and_delta(0.0).options);
    }
    const auto alone = make_unit(spec, kWidth);
    const std::string prefix = near ? "" : "recurrent.";
    alone->visit([&](const std::string& name, Parameter& p) {
      p.tensor =
          memory.tensors().at(name == "out_proj.weight" ? "o_proj.weight" : prefix + name).view;
    });
    set_gate(*pair, near ? 40.0F : -100.0F);
    EXPECT_LT(testing::largest_difference(
                  testing::values_of(testing::run(ctx, *pair, x.view, batch, rope)),
                  testing::values_of(testing::run(ctx, *alone, x.view, batch, rope))),
              1e-6)
        << near;
  }
}

// While a unit is trained its documents go without their window by the noise alone.
TEST(Units, WindowsAreDroppedByDocumentAndByNoise) {
  constexpr int64_t kDocuments = 40;
  RopeTable rope({.dim = 6});
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  for (int64_t s = 0; s < kDocuments; ++s) {
    batch.add(std::vector<int32_t>(3, 0));
  }
  rope.ensure(batch.positions_end());
  const Turns turns = rope.turns(ctx, batch.segments(), batch.lengths());
  const auto unit = make_unit(window_and_delta(0.25), kWidth);
  const testing::Memory memory(*unit, Dtype::kF32);
  const OwnedTensor x = testing::random_rows(3 * kDocuments, kWidth, Dtype::kF32);
  set_gate(*unit, 1.0F);
  const auto with_noise = [&](uint64_t noise) {
    UnitInputs inputs{&batch, &turns, nullptr};
    inputs.noise = noise;
    return testing::values_of(unit->forward(ctx, x.view, inputs));
  };
  const std::vector<double> whole = with_noise(0);
  const std::vector<double> some = with_noise(7);
  EXPECT_EQ(some, with_noise(7));
  EXPECT_NE(some, with_noise(8));
  set_gate(*unit, -100.0F);
  const std::vector<double> without = with_noise(0);
  int dropped = 0;
  for (int64_t s = 0; s < kDocuments; ++s) {
    const auto first = static_cast<size_t>(s * 3 * kWidth);
    const auto same = [&](const std::vector<double>& other) {
      return std::equal(some.begin() + static_cast<int64_t>(first),
                        some.begin() + static_cast<int64_t>(first) + 3 * kWidth,
                        other.begin() + static_cast<int64_t>(first));
    };
    EXPECT_NE(same(whole), same(without)) << s;
    dropped += same(without) ? 1 : 0;
  }
  EXPECT_GT(dropped, 3);
  EXPECT_LT(dropped, 20);
}

TEST(Units, PairsThatCannotBeMixedAreNamed) {
  const auto message = [](std::initializer_list<std::pair<std::string, OptionValue>> more) {
    return testing::message_of([&] {
      make_unit({"parallel", with(window_and_delta(0.0).options, more)}, kWidth);
    });
  };
  const std::pair<std::string, const char*> cases[] = {
      {message({{"recurrent", "attention"}}), "attention"},
      {message({{"recurrent", "mamba"}}), "mamba"},
      {message({{"recurrent", "swiglu"}}), "swiglu"},
      {message({{"recurrent.heads", int64_t{2}}}), "heads of one number and size, got 4 in 24"},
      {message({{"recurrent.value_dim", int64_t{4}}}), "heads of one number and size"},
      {message({{"recurrent.valu_dim", int64_t{4}}}), "'valu_dim'"},
      {message({{"window_dropout", 1.5}}), "'window_dropout'"},
      {message({{"widow", int64_t{4}}}), "'widow'"}};
  for (const auto& [found, expected] : cases) {
    EXPECT_NE(found.find(expected), std::string::npos) << found;
  }
  EXPECT_EQ(message({}), "no error");
}

// A bias of the output is what the unit gives above what it gives without.
TEST(Units, TheBiasOfTheOutputIsAdded) {
  int biased = 0;
  for (const Case& c : cases()) {
    if (!c.spec.options.flag(c.name, "out_bias", false)) {
      continue;
    }
    ++biased;
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const Batch batch = testing::piece(kTokens);
    const auto unit = make_unit(c.spec, kWidth);
    const testing::Memory memory(*unit, Dtype::kF64);
    const OwnedTensor x = testing::random_rows(kTokens, kWidth, Dtype::kF64);
    const std::vector<double> with_bias =
        testing::values_of(testing::run(ctx, *unit, x.view, batch, rope));
    std::vector<double> bias;
    unit->visit([&](const std::string& name, Parameter& p) {
      if (name == "o_proj.bias" || name == "out_proj.bias") {
        bias = testing::values_of(p.tensor);
        std::fill_n(p.tensor.ptr<double>(), p.numel(), 0.0);
      }
    });
    const std::vector<double> without =
        testing::values_of(testing::run(ctx, *unit, x.view, batch, rope));
    ASSERT_EQ(bias.size(), static_cast<size_t>(kWidth)) << c.name;
    for (size_t i = 0; i < without.size(); ++i) {
      EXPECT_NEAR(with_bias[i], without[i] + bias[i % bias.size()], 1e-12) << c.name;
    }
  }
  EXPECT_EQ(biased, 7);
}

TEST(Units, PiecesOfASequenceGiveWhatTheWholeGives) {
  const std::vector<std::vector<int64_t>> splits = {
      {21}, {1, 20}, {13, 8}, {5, 1, 9, 1, 1, 4}, std::vector<int64_t>(21, 1)};
  for (const Case& c : cases()) {
    RopeTable rope({.dim = 6});
    Arena arena;
    Context ctx{.arena = &arena};
    const auto unit = make_unit(c.spec, kWidth);
    const testing::Memory memory(*unit, Dtype::kF32);
    const OwnedTensor x = testing::random_rows(kTokens, kWidth, Dtype::kF32);
    const std::vector<double> whole =
        testing::values_of(testing::run(ctx, *unit, x.view, testing::piece(kTokens), rope));
    for (const std::vector<int64_t>& split : splits) {
      const testing::State memory_of_state(unit->state_layout(), kTokens);
      const UnitState state = memory_of_state.view();
      std::vector<double> joined;
      int64_t position = 0;
      for (const int64_t tokens : split) {
        const Batch batch = testing::piece(tokens, position, 1);
        const std::vector<double> rows = testing::values_of(
            testing::run(ctx, *unit, x.view.slice(0, position, tokens), batch, rope, &state));
        joined.insert(joined.end(), rows.begin(), rows.end());
        position += tokens;
      }
      EXPECT_LT(testing::largest_difference(joined, whole), 2e-5) << c.name << ", " << split.size();
    }
  }
}

TEST(Units, ParametersHaveTheirNamesShapesAndBlocks) {
  for (const Case& c : cases()) {
    const auto unit = make_unit(c.spec, kWidth);
    std::map<std::string, std::vector<int64_t>> found;
    unit->visit([&](const std::string& name, Parameter& p) {
      EXPECT_TRUE(found.emplace(name, p.shape).second) << name;
      int64_t rows = 0;
      for (const RowBlock& block : p.blocks) {
        EXPECT_EQ(rows_of(p, block.name).begin, rows) << c.name << " " << name << " " << block.name;
        rows += block.rows;
      }
      EXPECT_TRUE(p.blocks.empty() || rows == p.shape[0]) << c.name << " " << name;
    });
    EXPECT_EQ(found, c.parameters) << c.name;
  }
}

TEST(Units, TheirLettersAndNamesDiffer) {
  std::map<char, int> letters;
  std::map<std::string, int> names;
  for (const UnitKind& kind : unit_kinds()) {
    EXPECT_EQ(letters[kind.letter]++, 0) << kind.letter;
    EXPECT_EQ(names[kind.name]++, 0) << kind.name;
    EXPECT_NE(kind.letter, '-');
  }
}

TEST(Units, LatentAttentionKeepsItsLatentAndSaysWhatItCannotBe) {
  const Options options = {{"heads", int64_t{2}},
                           {"kv_rank", int64_t{8}},
                           {"nope_dim", int64_t{4}},
                           {"rope_dim", int64_t{2}},
                           {"value_dim", int64_t{4}}};
  EXPECT_EQ(make_unit({"latent_attention", options}, kWidth)->state_layout().bytes_per_token(),
            (8 + 2) * 4);
  const auto error = [&](std::initializer_list<std::pair<std::string, OptionValue>> more) {
    return testing::error_of([&] { make_unit({"latent_attention", with(options, more)}, kWidth); });
  };
  EXPECT_EQ(error({{"rope_dim", int64_t{3}}}),
            "latent_attention: expected an even rope_dim, got 3");
  EXPECT_EQ(error({{"kv_rank", int64_t{1024}}}),
            "latent_attention: expected kv_rank and rope_dim of at most 1024 together, got 1024 "
            "and 2");
  EXPECT_EQ(
      error({{"index_heads", int64_t{2}}, {"index_dim", int64_t{4}}, {"index_top", int64_t{5}}}),
      "latent_attention: the index of keys reads the query's latent; give q_rank");
}

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

TEST(Units, MatricesStartAsLinearsDo) {
  const std::vector<UnitSpec> specs = {
      {"experts",
       {{"experts", int64_t{8}},
        {"top", int64_t{2}},
        {"inner", int64_t{16}},
        {"router", "sigmoid"},
        {"router_bias", true},
        {"shared", int64_t{4}}}},
      {"latent_attention",
       {{"heads", int64_t{2}},
        {"q_rank", int64_t{6}},
        {"kv_rank", int64_t{8}},
        {"nope_dim", int64_t{4}},
        {"rope_dim", int64_t{2}},
        {"value_dim", int64_t{4}},
        {"index_heads", int64_t{2}},
        {"index_dim", int64_t{4}},
        {"index_top", int64_t{5}}}},
      {"lightning", {{"heads", int64_t{2}}, {"head_dim", int64_t{4}}}}};
  for (const UnitSpec& spec : specs) {
    make_unit(spec, kWidth)->visit([&](const std::string& name, Parameter& p) {
      const std::string which = spec.kind + " " + name;
      if (name.ends_with("norm.weight")) {
        EXPECT_EQ(p.init.kind, InitKind::kOnes) << which;
      } else if (name.ends_with("bias")) {
        EXPECT_EQ(p.init.kind, InitKind::kZeros) << which;
      } else {
        EXPECT_EQ(p.init.kind, InitKind::kUniform) << which;
        EXPECT_EQ(p.init.scale, 1.0 / std::sqrt(static_cast<double>(p.shape.back()))) << which;
      }
    });
  }
}

std::string error_of(const UnitSpec& spec, int64_t width = kWidth) {
  return testing::message_of([&] { Layer({{{.units = {spec}}}}, width); });
}

// Counts that would wrap when they are multiplied are refused by the name of their key.
TEST(Units, HostileSizesAreNamed) {
  const int64_t wrap = (int64_t{1} << 62) + 4;
  for (const Case& c : cases()) {
    for (const auto& [key, value] : c.spec.options.values()) {
      if (!std::holds_alternative<int64_t>(value)) {
        continue;
      }
      for (const int64_t hostile : {wrap, int64_t{1} << 62, int64_t{-1}, INT64_MIN, INT64_MAX}) {
        UnitSpec spec = c.spec;
        spec.options.set(key, hostile);
        // A mixer inside another names its own option.
        const std::string own = key.substr(key.rfind('.') + 1);
        EXPECT_NE(error_of(spec).find("'" + own + "'"), std::string::npos)
            << c.name << " " << key << " " << hostile << ": " << error_of(spec);
      }
    }
  }
  const UnitSpec experts{"experts",
                         {{"experts", int64_t{1} << 16},
                          {"top", int64_t{2}},
                          {"inner", int64_t{1} << 24},
                          {"router", "softmax"}}};
  EXPECT_NE(error_of(experts, 4096).find("experts.gate.weight"), std::string::npos);
}

TEST(Units, UnknownKindsAndOptionsAreNamed) {
  EXPECT_NE(error_of({"swigul", {}}).find("unknown unit 'swigul'; did you mean 'swiglu'?"),
            std::string::npos);
  EXPECT_NE(error_of({"swiglu", {{"inner", int64_t{4}}, {"iner", int64_t{4}}}}).find("'iner'"),
            std::string::npos);
  // Sinks are the window's mixer's alone: no family's configuration could say them.
  const Options full{{"heads", int64_t{2}}, {"head_dim", int64_t{4}}, {"window", int64_t{5}}};
  const Options sinks = with(full, {{"sinks", int64_t{2}}});
  EXPECT_EQ(error_of({"sliding_window", sinks}), "no error");
  EXPECT_NE(error_of({"attention", sinks}).find("'sinks'"), std::string::npos);
  EXPECT_NE(error_of({"swiglu", {{"inner", "many"}}}).find("'inner' to be a whole number"),
            std::string::npos);
}

}  // namespace
}  // namespace cambium
