#include "ops/norm/norm.h"

#include <tuple>

#include "base/testing.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;
using testing::Input;

struct Shape {
  int64_t rows, channels;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << s.rows << "x" << s.channels;
}

class RmsNorm : public ::testing::TestWithParam<Shape> {};

TEST_P(RmsNorm, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const auto [rows, channels] = GetParam();
  const std::vector<Input> inputs = {{{rows, channels}}, {{channels}}};
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return rms_norm(ctx, in[0], in[1], 1e-5F);
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

INSTANTIATE_TEST_SUITE_P(Shapes, RmsNorm,
                         ::testing::Values(Shape{1, 2}, Shape{3, 7}, Shape{5, 64}, Shape{130, 80},
                                           Shape{2, 577}),
                         ::testing::PrintToStringParamName());

TEST_P(RmsNorm, ZeroCentred) {
  const auto [rows, channels] = GetParam();
  const std::vector<Input> inputs = {{{rows, channels}}, {{channels}}};
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return rms_norm(ctx, in[0], in[1], 1e-5F, true);
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

TEST(RmsNormViews, HeadsOfAColumnSlice) {
  // x is the middle third of a wider tensor, split into heads, as after a fused projection.
  const std::vector<Input> inputs = {{{6, 96}}, {{16}}};
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return rms_norm(ctx, in[0].slice(1, 32, 32).split_last(2, 16), in[1], 1e-6F);
  };
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

class LayerNormShapes : public ::testing::TestWithParam<Shape> {};

TEST_P(LayerNormShapes, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const auto [rows, channels] = GetParam();
  // x lies far from zero: a variance from mean squares would lose half of its digits.
  std::vector<Input> inputs = {{{rows, channels}, 1, 3}, {{channels}}, {{channels}}};
  const auto with_bias = [](Context& ctx, const std::vector<Tensor>& in) {
    return layer_norm(ctx, in[0], in[1], in[2], 1e-5F);
  };
  expect_gradients_match_differences(with_bias, inputs);
  expect_kernels_match_reference(with_bias, inputs);
  inputs.pop_back();
  const auto without = [](Context& ctx, const std::vector<Tensor>& in) {
    return layer_norm(ctx, in[0], in[1], {}, 1e-5F);
  };
  expect_gradients_match_differences(without, inputs);
  expect_kernels_match_reference(without, inputs);
}

// Two channels would normalise to plus and minus one whatever x is, and leave it no gradient.
INSTANTIATE_TEST_SUITE_P(Shapes, LayerNormShapes,
                         ::testing::Values(Shape{1, 3}, Shape{3, 7}, Shape{5, 64}, Shape{130, 80},
                                           Shape{2, 577}),
                         ::testing::PrintToStringParamName());

// Widths on both sides of every boundary between the kernels' ways to divide a row among threads,
// of f32 and of bf16; the last goes number by number.
constexpr int64_t kWidths[] = {64,   72,   128,  136,  256,  264,  512,  520,  1024, 1032, 2048,
                               2056, 3072, 3080, 4096, 4104, 6144, 6152, 8192, 8200, 8201};

TEST(Norms, OfEveryWidth) {
  for (const int64_t width : kWidths) {
    SCOPED_TRACE(width);
    const std::vector<Input> inputs = {{{9, width}}, {{width}}, {{width}}};
    const auto rms = [](Context& ctx, const std::vector<Tensor>& in) {
      return rms_norm(ctx, in[0], in[1], 1e-5F);
    };
    expect_kernels_match_reference(rms, {inputs[0], inputs[1]});
    const auto layer = [](Context& ctx, const std::vector<Tensor>& in) {
      return layer_norm(ctx, in[0], in[1], in[2], 1e-5F);
    };
    expect_kernels_match_reference(layer, inputs);
    const auto l2 = [](Context& ctx, const std::vector<Tensor>& in) {
      return l2_norm(ctx, in[0], 1e-6F, 0.5F);
    };
    expect_kernels_match_reference(l2, {inputs[0]});
  }
}

struct GatedCase {
  int64_t tokens, channels, group;
  bool shared_weight;
};

using GatedParam = std::tuple<GatedCase, GateOrder, GateActivation>;

void PrintTo(const GatedParam& param, std::ostream* out) {
  const auto& [c, order, activation] = param;
  *out << c.tokens << "x" << c.channels << "_by_" << c.group << (c.shared_weight ? "_shared" : "")
       << (order == GateOrder::kGateFirst ? "_gate_first" : "_norm_first")
       << (activation == GateActivation::kSilu ? "_silu" : "_sigmoid");
}

class GatedRmsNorm : public ::testing::TestWithParam<GatedParam> {};

TEST_P(GatedRmsNorm, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const GatedCase shape = std::get<GatedCase>(GetParam());
  const auto order = std::get<GateOrder>(GetParam());
  const auto activation = std::get<GateActivation>(GetParam());
  const GatedNormConfig config{
      .eps = 1e-5F, .group = shape.group, .order = order, .activation = activation};
  const int64_t weight = shape.shared_weight ? shape.group : shape.channels;
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return gated_rms_norm(ctx, in[0], in[1], in[2], config);
  };
  const std::vector<Input> inputs = {
      {{shape.tokens, shape.channels}}, {{shape.tokens, shape.channels}, -4, 4}, {{weight}}};
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
  // x and the gate are parts of wider rows.
  const auto slices = [&](Context& ctx, const std::vector<Tensor>& in) {
    return gated_rms_norm(ctx, in[0].slice(1, 3, shape.channels),
                          in[0].slice(1, shape.channels + 3, shape.channels), in[1], config);
  };
  const std::vector<Input> wide = {{{shape.tokens, 2 * shape.channels + 5}, -2, 2}, {{weight}}};
  expect_gradients_match_differences(slices, wide);
  expect_kernels_match_reference(slices, wide);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, GatedRmsNorm,
    ::testing::Combine(::testing::Values(GatedCase{3, 40, 40, false}, GatedCase{5, 42, 14, false},
                                         GatedCase{4, 42, 14, true}, GatedCase{2, 200, 100, true},
                                         GatedCase{3, 152, 152, false}),
                       ::testing::Values(GateOrder::kGateFirst, GateOrder::kNormFirst),
                       ::testing::Values(GateActivation::kSilu, GateActivation::kSigmoid)),
    ::testing::PrintToStringParamName());

// Groups of every width between the kernels' ways to divide a row among threads, parts of wider
// rows that begin at multiples of 16 bytes, and at none.
TEST(GatedRmsNorm, OfEveryWidth) {
  for (const int64_t group :
       {64, 72, 128, 136, 256, 264, 512, 520, 1000, 1024, 1032, 1280, 1281, 1288, 2048}) {
    for (const int64_t before : {8, 3}) {
      for (const auto order : {GateOrder::kGateFirst, GateOrder::kNormFirst}) {
        SCOPED_TRACE(fmt::format("groups of {}, {} before them", group, before));
        const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
          return gated_rms_norm(ctx, in[0], in[1].slice(1, before, 2 * group), in[2],
                                {.eps = 1e-5F, .group = group, .order = order});
        };
        expect_kernels_match_reference(
            operation, {{{9, 2 * group}}, {{9, 2 * group + 16}, -4, 4}, {{2 * group}}});
      }
    }
  }
}

TEST(L2Norm, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return l2_norm(ctx, in[0], 1e-6F, 0.25F);
  };
  for (const Input& x : {Input{{3, 5}}, Input{{4, 2, 32}}, Input{{70, 3, 130}}}) {
    expect_gradients_match_differences(operation, {x});
    expect_kernels_match_reference(operation, {x});
  }
  const auto heads = [](Context& ctx, const std::vector<Tensor>& in) {
    return l2_norm(ctx, in[0].slice(1, 10, 36).split_last(2, 18), 1e-6F, 1.0F);
  };
  expect_gradients_match_differences(heads, {{{5, 50}}});
  expect_kernels_match_reference(heads, {{{5, 50}}});
}

TEST(L2Norm, RowsHaveLengthScaleAndZeroStaysZero) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> x{3, 0, 4, 0, 0, 0};
  const Tensor y = l2_norm(ctx, Tensor::of(x.data(), {2, 3}), 1e-12F, 2.0F);
  const float expected[] = {1.2F, 0, 1.6F, 0, 0, 0};
  for (int64_t i = 0; i < 6; ++i) {
    EXPECT_NEAR(y.ptr<float>()[i], expected[i], 1e-6F);
  }
}

TEST(LayerNorm, OfARowByHand) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> x{1, 3};
  std::vector<float> weight{2, 4};
  std::vector<float> bias{0.5F, -1};
  const Tensor w = Tensor::of(weight.data(), {2});
  const Tensor y =
      layer_norm(ctx, Tensor::of(x.data(), {1, 2}), w, Tensor::of(bias.data(), {2}), 0.0F);
  EXPECT_NEAR(y.ptr<float>()[0], -1.5F, 1e-6F);
  EXPECT_NEAR(y.ptr<float>()[1], 3.0F, 1e-6F);
}

TEST(RmsNorm, ZeroCentredCountsTheWeightFromOne) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> x{1, -2, 3};
  std::vector<float> weight{0.5F, 0, -0.5F};
  std::vector<float> plus_one{1.5F, 1, 0.5F};
  const Tensor row = Tensor::of(x.data(), {1, 3});
  const Tensor a = rms_norm(ctx, row, Tensor::of(weight.data(), {3}), 1e-5F, true);
  const Tensor b = rms_norm(ctx, row, Tensor::of(plus_one.data(), {3}), 1e-5F);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(a.ptr<float>()[i], b.ptr<float>()[i]);
  }
}

/// The stream after the addition and its norm, in every form; the stream is of the type of sums.
class AddRmsNorm : public ::testing::TestWithParam<Shape> {};

TEST_P(AddRmsNorm, AddsAndNorms) {
  const int64_t rows = GetParam().rows;
  const int64_t channels = GetParam().channels;
  const auto drawn = testing::draw({{{rows, channels}}, {{rows, channels}}, {{channels}}});
  const std::vector<double>& stream = drawn[0];
  const std::vector<double>& y = drawn[1];
  const std::vector<double>& weight = drawn[2];
  for (const float keep : {0.0F, 1.0F, 0.5F}) {
    for (const bool weighted : {true, false}) {
      const auto run = [&](Context& ctx, Dtype type) {
        const Device device = ctx.device();
        const Dtype sums = sum_dtype(type);
        const OwnedTensor h(sums, {rows, channels}, false, device);
        const OwnedTensor added(type, {rows, channels}, false, device);
        const OwnedTensor w(sums, {channels}, false, device);
        testing::put(h.view, keep == 0.0F ? std::vector<double>(stream.size(), NAN) : stream);
        testing::put(added.view, y);
        testing::put(w.view, weight);
        const Tensor x = add_rms_norm(ctx, h.view, keep, added.view, 0.7F,
                                      weighted ? w.view : Tensor{}, 1e-5F, true);
        ctx.synchronize();
        std::vector<double> out = testing::take(x);
        const std::vector<double> after = testing::take(h.view);
        out.insert(out.end(), after.begin(), after.end());
        return out;
      };
      Arena arena;
      Context plain{.arena = &arena};
      const std::vector<double> exact = run(plain, Dtype::kF64);
      EXPECT_LE(testing::relative_error(run(plain, Dtype::kF32), exact), 1e-5);
      plain.reference = true;
      EXPECT_LE(testing::relative_error(run(plain, Dtype::kF32), exact), 1e-5);
      if (testing::on_cuda()) {
        testing::CudaContext cuda;
        EXPECT_LE(testing::relative_error(run(cuda.ctx, Dtype::kF32), exact), 1e-5);
        EXPECT_LE(testing::relative_error(run(cuda.ctx, Dtype::kBF16), exact), 1e-2);
      }
    }
  }
}

TEST_P(AddRmsNorm, TheStreamsLayerNormIsLayerNormOfTheSum) {
  const int64_t rows = GetParam().rows;
  const int64_t channels = GetParam().channels;
  const auto drawn =
      testing::draw({{{rows, channels}}, {{rows, channels}}, {{channels}}, {{channels}}});
  const auto run = [&](Context& ctx, Dtype type, bool fused) {
    const Device device = ctx.device();
    const Dtype sums = sum_dtype(type);
    const OwnedTensor h(sums, {rows, channels}, false, device);
    const OwnedTensor y(type, {rows, channels}, false, device);
    const OwnedTensor x(type, {rows, channels}, false, device);
    const OwnedTensor w(sums, {channels}, false, device);
    const OwnedTensor b(sums, {channels}, false, device);
    testing::put(h.view, drawn[0]);
    testing::put(y.view, drawn[1]);
    testing::put(w.view, drawn[2]);
    testing::put(b.view, drawn[3]);
    add_layer_norm_into(ctx, x.view, h.view, 0.5F, y.view, 0.7F, w.view, b.view, 1e-3F);
    ctx.synchronize();
    return testing::take(fused ? x.view : layer_norm(ctx, h.view, w.view, b.view, 1e-3F));
  };
  Arena arena;
  Context plain{.arena = &arena};
  const std::vector<double> exact = run(plain, Dtype::kF64, false);
  EXPECT_LE(testing::relative_error(run(plain, Dtype::kF64, true), exact), 1e-12);
  EXPECT_LE(testing::relative_error(run(plain, Dtype::kF32, true), exact), 1e-5);
  if (testing::on_cuda()) {
    testing::CudaContext cuda;
    EXPECT_LE(testing::relative_error(run(cuda.ctx, Dtype::kF32, true), exact), 1e-5);
    EXPECT_LE(testing::relative_error(run(cuda.ctx, Dtype::kBF16, true), exact), 1e-2);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, AddRmsNorm,
                         ::testing::Values(Shape{1, 2}, Shape{3, 7}, Shape{5, 64}, Shape{3, 5120},
                                           Shape{1601, 1040}, Shape{9001, 264}, Shape{2, 20000}),
                         ::testing::PrintToStringParamName());

INSTANTIATE_TEST_SUITE_P(Widths, AddRmsNorm, ::testing::ValuesIn([] {
                           std::vector<Shape> shapes;
                           for (const int64_t width : kWidths) {
                             shapes.push_back({3, width});
                           }
                           return shapes;
                         }()),
                         ::testing::PrintToStringParamName());

TEST(NormErrors, NameTheShapes) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor x = arena.empty(Dtype::kF32, {4, 8});
  const Tensor w = arena.empty(Dtype::kF32, {7});
  EXPECT_EQ(testing::message_of([&] { rms_norm(ctx, x, w, 1e-5F); }),
            "[rms_norm] expected weight f32 (8), got f32 (7)");
  EXPECT_EQ(testing::message_of([&] { gated_rms_norm(ctx, x, x, w, {.group = 4}); }),
            "[gated_rms_norm] expected weight f32 (8) or (4), got f32 (7)");
  EXPECT_EQ(testing::message_of([&] { gated_rms_norm(ctx, x, x, w, {.group = 3}); }),
            "[gated_rms_norm] expected groups that divide 8 channels, got groups of 3");
  EXPECT_EQ(testing::message_of([&] { gated_rms_norm(ctx, x, w, w, {.group = 4}); }),
            "[gated_rms_norm] expected x and gate (T, C) of one dtype, got f32 (4, 8) and f32 (7)");
  EXPECT_EQ(testing::message_of([&] {
              l2_norm(ctx, arena.empty(Dtype::kI32, {4, 8}), 1e-6F, 1.0F);
            }),
            "[l2_norm] expected x f32 or f64, got i32 (4, 8)");
}

}  // namespace
}  // namespace cambium
