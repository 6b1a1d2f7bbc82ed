// Layer::forward against loops written out by hand, for every wiring a branch can say.
#include <gtest/gtest.h>

#include "base/testing.h"
#include "nn/testing.h"

namespace cambium {
namespace {

constexpr int64_t kWidth = 6;
constexpr int64_t kTokens = 5;

UnitSpec swiglu(const char* name, float out = 1.0F) {
  return {"swiglu", {{"inner", int64_t{8}}}, out, name};
}

using Rows = std::vector<double>;

/// The parameters of a layer by name, as doubles.
class ByHand {
 public:
  explicit ByHand(const testing::Memory& memory) : memory_(memory) {}

  Rows norm(const std::string& name, const Rows& h, double eps, double offset = 0.0) const {
    const Tensor weight = memory_.tensors().at(name + ".weight").view;
    Rows x(h.size());
    for (size_t row = 0; row < h.size(); row += kWidth) {
      double square = 0.0;
      for (size_t c = 0; c < kWidth; ++c) {
        square += h[row + c] * h[row + c];
      }
      const double scale = 1.0 / std::sqrt(square / kWidth + eps);
      for (size_t c = 0; c < kWidth; ++c) {
        x[row + c] = h[row + c] * scale * (offset + weight.ptr<double>()[c]);
      }
    }
    return x;
  }

  Rows swiglu(const std::string& name, const Rows& x) const {
    const Rows gate = times(name + ".gate.weight", x);
    Rows inner = times(name + ".up.weight", x);
    for (size_t i = 0; i < inner.size(); ++i) {
      inner[i] *= gate[i] / (1.0 + std::exp(-gate[i]));
    }
    return times(name + ".down.weight", inner);
  }

 private:
  Rows times(const std::string& name, const Rows& x) const {
    const Tensor w = memory_.tensors().at(name).view;
    const auto out = static_cast<size_t>(w.dim(0));
    const auto in = static_cast<size_t>(w.dim(1));
    Rows y(x.size() / in * out);
    for (size_t t = 0; t < x.size() / in; ++t) {
      for (size_t o = 0; o < out; ++o) {
        for (size_t i = 0; i < in; ++i) {
          y[t * out + o] += w.ptr<double>()[o * in + i] * x[t * in + i];
        }
      }
    }
    return y;
  }

  const testing::Memory& memory_;
};

Rows plus(double a, const Rows& x, double b, const Rows& y) {
  Rows sum(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    sum[i] = a * x[i] + b * y[i];
  }
  return sum;
}

struct Wiring {
  const char* name;
  LayerSpec spec;
  Rows (*by_hand)(const ByHand& layer, Rows h);
};

std::vector<Wiring> wirings() {
  const NormSpec loose{.eps = 0.5F};
  const NormSpec centred{.kind = NormKind::kZeroCentred, .eps = 1e-6F};
  return {
      {"two branches",
       {{{.units = {swiglu("a")}}, {.norm = loose, .units = {swiglu("b")}}}},
       [](const ByHand& layer, Rows h) {
         h = plus(1, h, 1, layer.swiglu("a", layer.norm("input_norm", h, 1e-5F)));
         return plus(1, h, 1, layer.swiglu("b", layer.norm("post_norm", h, 0.5)));
       }},
      {"units side by side with factors",
       {{{.units = {swiglu("a", 0.25F), swiglu("b", -2.0F)}}}},
       [](const ByHand& layer, Rows h) {
         const Rows x = layer.norm("input_norm", h, 1e-5F);
         return plus(1, plus(1, h, 0.25, layer.swiglu("a", x)), -2.0, layer.swiglu("b", x));
       }},
      {"one unit of three is active",
       {{{.units = {swiglu("a"), swiglu("b"), swiglu("c")}, .active = 1}}},
       [](const ByHand& layer, Rows h) {
         return plus(1, h, 1, layer.swiglu("b", layer.norm("input_norm", h, 1e-5F)));
       }},
      {"the residual is the normed input, scaled",
       {{{.units = {swiglu("a", 0.5F), swiglu("b")}, .keep = 3.5F, .residual_normed = true}}},
       [](const ByHand& layer, Rows h) {
         const Rows x = layer.norm("input_norm", h, 1e-5F);
         return plus(1, plus(3.5, x, 0.5, layer.swiglu("a", x)), 1, layer.swiglu("b", x));
       }},
      {"three branches, a zero-centred norm, a scaled residual",
       {{{.units = {swiglu("a")}},
         {.norm = centred, .units = {swiglu("b")}, .keep = 0.75F},
         {.norm = {NormKind::kNone}, .units = {swiglu("c")}}}},
       [](const ByHand& layer, Rows h) {
         h = plus(1, h, 1, layer.swiglu("a", layer.norm("input_norm", h, 1e-5F)));
         h = plus(0.75, h, 1, layer.swiglu("b", layer.norm("post_norm", h, 1e-6F, 1.0)));
         return plus(1, h, 1, layer.swiglu("c", h));
       }},
      {"norms of outputs, with and without one of inputs",
       {{{.norm = {NormKind::kNone}, .units = {swiglu("a", 0.5F)}, .out_norm = loose},
         {.units = {swiglu("b")}, .out_norm = centred}}},
       [](const ByHand& layer, Rows h) {
         h = plus(1, h, 0.5, layer.norm("out_norm_1", layer.swiglu("a", h), 0.5));
         const Rows y = layer.swiglu("b", layer.norm("post_norm", h, 1e-5F));
         return plus(1, h, 1, layer.norm("out_norm_2", y, 1e-6F, 1.0));
       }},
      {"a branch without units passes on",
       {{{.units = {}}, {.units = {swiglu("a")}}}},
       [](const ByHand& layer, Rows h) {
         return plus(1, h, 1, layer.swiglu("a", layer.norm("post_norm", h, 1e-5F)));
       }},
      {"what a branch without units makes of the residual",
       {{{.units = {}, .keep = 3.5F, .residual_normed = true},
         {.units = {swiglu("a")}},
         {.units = {}, .keep = 0.5F}}},
       [](const ByHand& layer, Rows h) {
         const Rows x = layer.norm("input_norm", h, 1e-5F);
         h = plus(3.5, x, 0, x);
         h = plus(1, h, 1, layer.swiglu("a", layer.norm("post_norm", h, 1e-5F)));
         return plus(0.5, h, 0, h);
       }},
      {"no branches", {}, [](const ByHand&, Rows h) { return h; }},
  };
}

TEST(Layer, EveryWiringIsWhatItsFormulaSays) {
  for (const Wiring& wiring : wirings()) {
    Layer layer(wiring.spec, kWidth);
    const testing::Memory memory(layer, Dtype::kF64);
    const OwnedTensor h = testing::random_rows(kTokens, kWidth, Dtype::kF64);
    Arena arena;
    Context ctx{.arena = &arena};
    const Batch batch = testing::piece(kTokens);
    const Rows got = testing::values_of(layer.forward(ctx, h.view, {&batch, nullptr, {}}, nullptr));
    const Rows expected = wiring.by_hand(ByHand(memory), testing::values_of(h.view));
    EXPECT_LT(testing::largest_difference(got, expected), 1e-12) << wiring.name;
    // The same to a stream, twice over: what waits after the first time is added with the norm that
    // begins the second, from memory that outlives the first.
    Residual stream = Residual::stream(ctx, h.view);
    for (const Norm* next : {layer.first_norm(), static_cast<const Norm*>(nullptr)}) {
      const ArenaScope scope(arena);
      layer.forward(ctx, stream, {&batch, nullptr, {}}, nullptr);
      stream.settle(ctx, next);
    }
    const Rows twice = wiring.by_hand(ByHand(memory), expected);
    EXPECT_LT(testing::largest_difference(testing::values_of(stream.value(ctx)), twice), 1e-12)
        << wiring.name;
  }
}

TEST(Layer, FactorsThatAreSetAreThoseOfTheUnitsOfTheirNames) {
  const auto result = [](const LayerSpec& spec, float a, float b, bool set) {
    Layer layer(spec, kWidth);
    const testing::Memory memory(layer, Dtype::kF64);
    if (set) {
      layer.set_out("a", a);
      layer.set_out("b", b);
    }
    const OwnedTensor h = testing::random_rows(kTokens, kWidth, Dtype::kF64);
    Arena arena;
    Context ctx{.arena = &arena};
    const Batch batch = testing::piece(kTokens);
    return testing::values_of(layer.forward(ctx, h.view, {&batch, nullptr, {}}, nullptr));
  };
  const LayerSpec plain{{{.units = {swiglu("a")}}, {.units = {swiglu("b", 0.5F)}}}};
  const LayerSpec scaled{{{.units = {swiglu("a", 0.25F)}}, {.units = {swiglu("b", -2.0F)}}}};
  EXPECT_EQ(result(plain, 0.25F, -2.0F, true), result(scaled, 0, 0, false));
  EXPECT_NE(result(plain, 0, 0, false), result(scaled, 0, 0, false));
}

TEST(Layer, MixersSideBySideKeepStateEach) {
  const UnitSpec attention{
      "attention", {{"heads", int64_t{2}}, {"head_dim", int64_t{4}}, {"rope", false}}, 0.5F, "one"};
  const UnitSpec mamba{"mamba2",
                       {{"heads", int64_t{2}},
                        {"head_dim", int64_t{4}},
                        {"state", int64_t{4}},
                        {"b_heads", int64_t{1}}},
                       1.0F,
                       "two"};
  Layer layer({{{.units = {mamba, attention}}, {.units = {swiglu("")}}}}, kWidth);
  const testing::Memory memory(layer, Dtype::kF32);
  ASSERT_EQ(layer.state_layouts().size(), 2U);
  EXPECT_EQ(layer.state_layouts()[0].slots.size(), 2U);
  EXPECT_EQ(layer.state_layouts()[1].pages.size(), 2U);
  const OwnedTensor h = testing::random_rows(kTokens, kWidth, Dtype::kF32);
  Arena arena;
  Context ctx{.arena = &arena};
  const Batch all = testing::piece(kTokens);
  const Rows whole = testing::values_of(layer.forward(ctx, h.view, {&all, nullptr, {}}, nullptr));
  const testing::State a(layer.state_layouts()[0], kTokens);
  const testing::State b(layer.state_layouts()[1], kTokens);
  const std::vector<UnitState> states = {a.view(), b.view()};
  Rows joined;
  for (int64_t t = 0; t < kTokens; ++t) {
    const Batch one = testing::piece(1, t, 1);
    const Rows row = testing::values_of(
        layer.forward(ctx, h.view.slice(0, t, 1), {&one, nullptr, states}, nullptr));
    joined.insert(joined.end(), row.begin(), row.end());
  }
  EXPECT_LT(testing::largest_difference(joined, whole), 1e-5);
}

TEST(Layer, ImpossibleOnesAreNamed) {
  const auto error_of = [](const LayerSpec& spec) -> std::string {
    return testing::message_of([&] { Layer(spec, kWidth); });
  };
  EXPECT_NE(error_of({{{.units = {swiglu("a"), swiglu("a")}}}}).find("are named 'a'"),
            std::string::npos);
  EXPECT_NE(error_of({{{.units = {swiglu("a")}, .active = 1}}}).find("expected active from 0 to 0"),
            std::string::npos);
  EXPECT_NE(error_of({{{.units = {swiglu("a"), swiglu("b")}, .out_norm = NormSpec{}}}})
                .find("where the output has a norm"),
            std::string::npos);
}

}  // namespace
}  // namespace cambium
