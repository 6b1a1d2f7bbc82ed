#include "ops/pointwise/pointwise.h"

#include <limits>

#include "base/testing.h"
#include "ops/testing_table.h"

namespace cambium {
namespace {

using testing::Operation;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Row = testing::OperationRow;

class Activation : public testing::OperationTable {};

TEST_P(Activation, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  expect_kernels_and_gradients();
}

using In = std::vector<Tensor>;

INSTANTIATE_TEST_SUITE_P(
    Table, Activation,
    ::testing::Values(
        Row{"add",
            [](Context& c, const In& in) { return add(c, in[0], in[1]); },
            {{{3, 21}}, {{3, 21}}}},
        Row{"add_to_itself",
            [](Context& c, const In& in) { return add(c, in[0], in[0]); },
            {{{3, 21}}}},
        Row{"add_heads_of_a_slice",
            [](Context& c, const In& in) {
              return add(c, in[0].slice(1, 8, 24).split_last(4, 6), in[1]);
            },
            {{{5, 40}}, {{5, 4, 6}}}},
        Row{"add_many_pieces",
            [](Context& c, const In& in) { return add(c, in[0], in[1]); },
            {{{300, 70}}, {{300, 70}}}},
        Row{"add_scaled",
            [](Context& c, const In& in) {
              return add_scaled(c, 0.25F, in[0].slice(1, 8, 24).split_last(4, 6), -3.0F, in[1]);
            },
            {{{5, 40}}, {{5, 4, 6}}}},
        Row{"add_scaled_where_gradients_meet",
            [](Context& c, const In& in) {
              const Tensor sum = add_scaled(c, 0.25F, in[0], -3.0F, in[1]);
              return add_scaled(c, 2.0F, add_scaled(c, 0.5F, in[0], 1.5F, sum), 4.0F, in[1]);
            },
            {{{300, 72}}, {{300, 72}}}},
        Row{"multiply_where_gradients_meet",
            [](Context& c, const In& in) {
              return multiply(c, multiply(c, in[0], in[1]), in[1]);
            },
            {{{5, 40}}, {{5, 40}}}},
        Row{"multiply",
            [](Context& c, const In& in) { return multiply(c, in[0], in[1]); },
            {{{4, 35}}, {{4, 35}}}},
        Row{"multiply_of_slices_of_one_product",
            [](Context& c, const In& in) {
              return multiply(c, in[0].slice(1, 0, 17), in[0].slice(1, 17, 17));
            },
            {{{6, 34}, -4, 4}}},
        Row{"square",
            [](Context& c, const In& in) { return multiply(c, in[0], in[0]); },
            {{{5, 16}}}},
        Row{"scale_blocks",
            [](Context& c, const In& in) {
              const ColumnBlock blocks[] = {{9, 0.5}, {21, -2.0}, {7, 3.0}};
              return scale_blocks(c, in[0], blocks);
            },
            {{{5, 37}}}},
        Row{"scale_blocks_of_a_slice",
            [](Context& c, const In& in) {
              const ColumnBlock blocks[] = {{1, 0.25}, {0, 7.0}, {23, 1.5}};
              return scale_blocks(c, in[0].slice(1, 8, 24), blocks);
            },
            {{{300, 40}}}},
        Row{"swiglu",
            [](Context& c, const In& in) { return swiglu(c, in[0], in[1]); },
            {{{4, 35}, -12, 12}, {{4, 35}}}},
        Row{"swiglu_halves_of_one_product",
            [](Context& c, const In& in) {
              return swiglu(c, in[0].slice(1, 0, 17), in[0].slice(1, 17, 17));
            },
            {{{6, 34}, -4, 4}}},
        Row{"sigmoid_gate",
            [](Context& c, const In& in) { return sigmoid_gate(c, in[0], in[1]); },
            {{{4, 35}, -12, 12}, {{4, 35}}}},
        Row{"sigmoid_gate_of_heads_beside_it",
            [](Context& c, const In& in) {
              const Tensor heads = in[0].split_last(3, 16);
              return sigmoid_gate(c, heads.slice(2, 8, 8), in[1]);
            },
            {{{5, 48}, -4, 4}, {{5, 3, 8}}}},
        Row{"sigmoid_gate_of_itself",
            [](Context& c, const In& in) { return sigmoid_gate(c, in[0], in[0]); },
            {{{3, 21}, -4, 4}}},
        Row{"silu", [](Context& c, const In& in) { return silu(c, in[0]); }, {{{4, 19}, -12, 12}}},
        Row{"silu_of_heads_that_lie_apart",
            [](Context& c, const In& in) {
              return silu(c, in[0].split_last(3, 24).slice(2, 8, 8));
            },
            {{{5, 72}, -4, 4}}},
        Row{"sigmoid",
            [](Context& c, const In& in) { return sigmoid(c, in[0]); },
            {{{4, 19}, -9, 9}}},
        Row{"sigmoid_up_to_two",
            [](Context& c, const In& in) { return sigmoid(c, in[0], 2.0F); },
            {{{4, 19}, -9, 9}}},
        Row{"step_size",
            [](Context& c, const In& in) { return step_size(c, in[0], in[1], 0, kInfinity); },
            {{{9, 20}, -15, 25}, {{20}}}},
        Row{"step_size_clamped_slice",
            [](Context& c, const In& in) {
              return step_size(c, in[0].slice(1, 3, 5), in[1], 0.3F, 1.7F);
            },
            {{{40, 9}, -3, 3}, {{5}}}},
        Row{"log_decay",
            [](Context& c, const In& in) { return log_decay(c, in[0], in[1]); },
            {{{7, 18}, 0, 2}, {{18}, -3, 3}}},
        Row{"bounded_decay",
            [](Context& c, const In& in) {
              return bounded_decay(c, in[0], in[1], in[2], -5.0F);
            },
            {{{7, 18}, -3, 3}, {{18}}, {{18}, -1, 1}}},
        Row{"bounded_decay_of_a_slice",
            [](Context& c, const In& in) {
              return bounded_decay(c, in[0].slice(1, 2, 35), in[1], in[2], -0.5F);
            },
            {{{70, 40}, -3, 3}, {{35}}, {{35}, -1, 1}}},
        Row{"mix_heads",
            [](Context& c, const In& in) { return mix_heads(c, in[0], in[1], in[2]); },
            {{{5, 40}}, {{5, 40}}, {{5, 2}, -4, 4}}},
        Row{"mix_heads_of_slices",
            [](Context& c, const In& in) {
              return mix_heads(c, in[0].slice(1, 3, 9), in[0].slice(1, 12, 9),
                               in[1].slice(1, 1, 3));
            },
            {{{7, 21}}, {{7, 5}, -4, 4}}},
        Row{"mix_heads_some_of_them_closed",
            [](Context& c, const In& in) {
              auto* closed = c.shared_scratch<uint8_t>(5);
              for (int64_t t = 0; t < 5; ++t) {
                closed[t] = static_cast<uint8_t>(t % 2);
              }
              return mix_heads(c, in[0], in[1], in[2], closed);
            },
            {{{5, 32}}, {{5, 32}}, {{5, 4}, -4, 4}}},
        Row{"repeat_heads",
            [](Context& c, const In& in) { return repeat_heads(c, in[0], 3); },
            {{{4, 2, 19}}}},
        Row{"repeat_heads_of_a_slice",
            [](Context& c,
               const In& in) { return repeat_heads(c, in[0].slice(1, 4, 12).split_last(2, 6), 2); },
            {{{5, 20}}}}),
    ::testing::PrintToStringParamName());

TEST(AddScaled, WithoutScalesIsTheSum) {
  Arena arena;
  Context ctx{.arena = &arena};
  auto values = testing::draw({{{37}, -3, 3}, {{37}, -1e-3, 1e-3}});
  std::vector<float> a(values[0].begin(), values[0].end());
  std::vector<float> b(values[1].begin(), values[1].end());
  const Tensor sum =
      add_scaled(ctx, 1.0F, Tensor::of(a.data(), {37}), 1.0F, Tensor::of(b.data(), {37}));
  for (size_t i = 0; i < 37; ++i) {
    EXPECT_EQ(sum.ptr<float>()[i], a[i] + b[i]);
  }
}

TEST(RepeatHeads, CopiesStandTogether) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> x{1, 2};
  const Tensor y = repeat_heads(ctx, Tensor::of(x.data(), {1, 2, 1}), 3);
  EXPECT_EQ(y.dim(1), 6);
  EXPECT_EQ(testing::to_doubles(y, y.data), (std::vector<double>{1, 1, 1, 2, 2, 2}));
}

TEST(MixHeads, AClosedGateLeavesTheSecond) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> a{1, 2, 3, 4, 5, 6};
  std::vector<float> b{10, 20, 30, 40, 50, 60};
  std::vector<float> gate{0, 0, 0};
  const uint8_t closed[] = {0, 1, 0};
  const Tensor y = mix_heads(ctx, Tensor::of(a.data(), {3, 2}), Tensor::of(b.data(), {3, 2}),
                             Tensor::of(gate.data(), {3, 1}), closed);
  EXPECT_EQ(testing::to_doubles(y, y.data), (std::vector<double>{5.5, 11, 30, 40, 27.5, 33}));
}

TEST(ActivationErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  const auto tensor = [&](std::initializer_list<int64_t> shape, Dtype dtype = Dtype::kF32) {
    return arena.empty(dtype, shape);
  };
  struct Case {
    std::function<void()> call;
    const char* message;
  };
  const std::vector<Case> cases = {
      {[&] {
         add(ctx, tensor({2, 3}), tensor({2, 4}));
       },
       "[add] expected b like the first input, f32 (2, 3) with contiguous rows, got f32 (2, 4)"},
      {[&] {
         swiglu(ctx, tensor({2, 3}), tensor({2, 3}, Dtype::kF64));
       },
       "[swiglu] expected up like the first input, f32 (2, 3) with contiguous rows, got f64 (2, "
       "3)"},
      {[&] {
         sigmoid_gate(ctx, tensor({2, 3}), tensor({2, 4}));
       },
       "[sigmoid_gate] expected x like the first input, f32 (2, 3) with contiguous rows, got f32 "
       "(2, 4)"},
      {[&] {
         sigmoid(ctx, tensor({2, 3}, Dtype::kI32));
       },
       "[sigmoid] expected x f32 or f64 with contiguous rows, got i32 (2, 3)"},
      {[&] {
         step_size(ctx, tensor({2, 3}), tensor({2}), 0, 1);
       },
       "[step_size] expected bias f32 (3), got f32 (2)"},
      {[&] {
         step_size(ctx, tensor({2, 3}), tensor({3}), 2, 1);
       },
       "[step_size] expected lo <= hi, got 2 and 1"},
      {[&] {
         log_decay(ctx, tensor({2, 3, 1}), tensor({3}));
       },
       "[log_decay] expected x (T, H) f32 or f64 with contiguous rows, got f32 (2, 3, 1)"},
      {[&] {
         mix_heads(ctx, tensor({2, 6}), tensor({2, 6}), tensor({2, 4}));
       },
       "[mix_heads] expected gate f32 (2, H), H a divisor of 6 channels, got f32 (2, 4)"},
      {[&] {
         multiply(ctx, tensor({2, 3}), tensor({3}));
       },
       "[multiply] expected b like the first input, f32 (2, 3) with contiguous rows, got f32 (3)"},
      {[&] {
         const ColumnBlock blocks[] = {{1, 2.0}, {1, 3.0}};
         scale_blocks(ctx, tensor({2, 3}), blocks);
       },
       "[scale_blocks] expected blocks of 3 columns, got 2"},
      {[&] {
         bounded_decay(ctx, tensor({2, 3}), tensor({3}), tensor({3}), 0.0F);
       },
       "[bounded_decay] expected a bound below 0, got 0"},
      {[&] {
         bounded_decay(ctx, tensor({2, 3}), tensor({3}), tensor({2}), -1.0F);
       },
       "[bounded_decay] expected a_log f32 (3), got f32 (2)"},
      {[&] {
         repeat_heads(ctx, tensor({2, 3, 1}), 0);
       },
       "[repeat_heads] expected x (T, G, N) and times >= 1, got f32 (2, 3, 1) and 0"},
  };
  for (const Case& c : cases) {
    const std::string message = testing::error_of([&] { c.call(); });
    EXPECT_EQ(message, c.message);
  }
}

}  // namespace
}  // namespace cambium
