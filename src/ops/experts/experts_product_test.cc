// Products of experts on CUDA, by how many rows each expert has: the kernels go by the mean.
#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

#include "base/testing.h"
#include "ops/experts/experts.h"
#include "ops/experts/experts_kernels.h"
#include "ops/pointwise/pointwise.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::Input;

using In = std::vector<Tensor>;

struct Load {
  const char* name;
  std::vector<int> rows;  // of each expert
  int64_t width, outputs;
  bool bias = false;
  bool stored = false;  // a weight of the activations' type, which is not trained
};

std::ostream& operator<<(std::ostream& out, const Load& load) {
  return out << load.name;
}

std::vector<int> many_experts() {
  std::vector<int> rows(530);
  for (size_t e = 0; e < rows.size(); ++e) {
    rows[e] = e % 7 == 3 ? 5 : static_cast<int>(e % 3);
  }
  return rows;
}

std::vector<int> many_rows_of_many_experts() {
  std::vector<int> rows(420);
  for (size_t e = 0; e < rows.size(); ++e) {
    rows[e] = e % 7 == 3 ? 0 : static_cast<int>(30 + e % 11);
  }
  return rows;
}

/// Two products of the same rows and weight: the gradients of the second are added to the first's.
Tensor product_of(Context& ctx, const In& in, const Load& load) {
  const Routing routing = route(ctx, in[0], {}, {.renormalise = true});
  const Tensor rows = dispatch(ctx, in[1], routing);
  const Tensor bias = load.bias ? in[3] : Tensor{};
  const Tensor once = experts_matmul(ctx, rows, in[2], bias, routing);
  return combine(ctx, add(ctx, once, experts_matmul(ctx, rows, in[2], bias, routing)), routing);
}

std::vector<Input> inputs_of(const Load& load) {
  const int64_t tokens = std::accumulate(load.rows.begin(), load.rows.end(), int64_t{0});
  const auto experts = std::ssize(load.rows);
  std::vector<Input> inputs = {
      {{tokens, experts}, 0.0, 0.0, false},
      {{tokens, load.width}},
      {{experts, load.outputs, load.width}, -1.0, 1.0, !load.stored, !load.stored}};
  if (load.bias) {
    inputs.push_back({{experts, load.outputs}, -1.0, 1.0, true, true});
  }
  return inputs;
}

/// Random numbers, but logits that give every expert its rows, of tokens in no order.
std::vector<std::vector<double>> values_of(const Load& load) {
  auto values = testing::draw(inputs_of(load));
  std::vector<size_t> expert;
  for (size_t e = 0; e < load.rows.size(); ++e) {
    expert.insert(expert.end(), static_cast<size_t>(load.rows[e]), e);
  }
  std::shuffle(expert.begin(), expert.end(), std::mt19937_64(2));
  std::fill(values[0].begin(), values[0].end(), 0.0);
  for (size_t t = 0; t < expert.size(); ++t) {
    values[0][t * load.rows.size() + expert[t]] = 4.0;
  }
  return values;
}

class ExpertsOnCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!testing::on_cuda()) {
      GTEST_SKIP() << why_no_cuda();
    }
  }
};

/// Pairs of blocks for experts of at least so many rows, as long as it lives.
class PairsFrom {
 public:
  explicit PairsFrom(int64_t rows) : before_(std::exchange(experts_pair_rows, rows)) {}
  ~PairsFrom() { experts_pair_rows = before_; }
  PairsFrom(const PairsFrom&) = delete;
  PairsFrom& operator=(const PairsFrom&) = delete;

 private:
  int64_t before_;
};
constexpr int64_t kPairsFrom[] = {1, int64_t{1} << 40};  // all products by pairs; none
class LoadsOfExperts : public ExpertsOnCuda, public ::testing::WithParamInterface<Load> {};

TEST_P(LoadsOfExperts, ProductsMatchTheDefinition) {
  const Load& load = GetParam();
  const auto inputs = inputs_of(load);
  const auto operation = [&](Context& c, const In& in) { return product_of(c, in, load); };
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    SCOPED_TRACE(dtype_name(type));
    const bool narrow = type == Dtype::kBF16;
    auto values = values_of(load);
    for (size_t i = 0; i < inputs.size(); ++i) {
      values[i] = testing::as_stored(values[i], inputs[i].dtype(type));
    }
    const auto exact =
        testing::run_operation<double>(operation, inputs, values, true, true, narrow);
    const auto compare = [&](const std::vector<double>& own, const std::vector<double>& expected,
                             double norm, const char* what) {
      EXPECT_LE(testing::norm_error(own, expected), norm) << what;
      EXPECT_LE(testing::element_error(own, expected, 4 * norm, 2 * norm), 1.0) << what;
    };
    for (const int64_t least : kPairsFrom) {
      SCOPED_TRACE(fmt::format("pairs from {} rows", least));
      const PairsFrom pairs(least);
      const auto run = testing::run_on_cuda(operation, inputs, values, type, true);
      compare(run.output, exact.output, narrow ? testing::kNarrowForward : 1e-5, "y");
      const double backward = narrow ? testing::kNarrowBackward : 1e-4;
      compare(run.grads[1], exact.grads[1], backward, "gradient of x");
      for (size_t i = 2; i < inputs.size(); ++i) {
        if (inputs[i].differentiable) {
          compare(run.grads[i], exact.grads[i], backward, i == 2 ? "of the weight" : "of the bias");
        }
      }
      const auto again = testing::run_on_cuda(operation, inputs, values, type, true);
      EXPECT_EQ(again.output, run.output) << "two runs differ";
      EXPECT_EQ(again.grads, run.grads) << "two runs differ";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    OnCuda, LoadsOfExperts,
    ::testing::Values(
        Load{"hardly_any_row", {0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0}, 264, 40},
        Load{"few", {0, 1, 7, 8, 9, 0, 3, 16, 17, 2}, 264, 40, true, true},
        Load{"few_of_a_weight_of_f32", {0, 1, 7, 8, 9, 0, 3, 16, 17, 2}, 264, 40, true},
        Load{"few_of_many_experts", many_experts(), 72, 40, false, true},
        Load{"up_to_twenty", {0, 1, 33, 8, 40, 0, 31, 32, 2, 9}, 328, 72, true, true},
        Load{"up_to_48", {0, 1, 7, 8, 9, 0, 63, 64, 65, 130}, 72, 136, true},
        Load{"many", {1, 7, 8, 9, 63, 64, 65, 0, 130, 600}, 200, 328, true},
        Load{"many_and_deep", {5, 100, 64, 128}, 1032, 40, false, true},
        Load{"one_has_all", {0, 0, 4097, 0}, 72, 264},
        Load{"around_parts_of_tiles",
             {0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 0},
             136,
             264,
             true,
             true},
        Load{"around_tiles", {255, 256, 257, 0, 511, 512, 513, 1}, 72, 136, false, true},
        Load{"every_width_of_a_tile", {20, 40, 90, 120, 150, 170, 200, 240}, 328, 520, true},
        Load{"all_to_the_last", {0, 0, 0, 0, 0, 0, 0, 300}, 264, 200, true, true},
        Load{"many_of_many_experts", many_rows_of_many_experts(), 72, 40, false, true},
        Load{"odd_widths", {1, 7, 8, 9, 63, 64, 65, 0, 130, 300}, 71, 135, true},
        Load{"odd_widths_of_few", {0, 1, 7, 8, 9, 0, 3, 16, 17, 2}, 71, 35, false, true}),
    [](const auto& info) { return std::string(info.param.name); });

/// experts_hidden of tokens that go to `top` experts each, or to those that the load says; up lies
/// before the gate in memory where it is said.
void expect_hidden_matches_the_definition(const Load& load, int64_t tokens, int64_t top,
                                          float limit, bool up_first = false) {
  const auto experts = std::ssize(load.rows);
  const auto operation = [&](Context& c, const In& in) {
    const Routing routing = route(c, in[0], {}, {.top = top, .renormalise = true});
    const Tensor gate_bias = load.bias ? in[4] : Tensor{};
    const Tensor up_bias = load.bias ? in[5] : Tensor{};
    const Tensor& gate = in[up_first ? 3 : 2];
    const Tensor& up = in[up_first ? 2 : 3];
    return combine(c, experts_hidden(c, in[1], gate, gate_bias, up, up_bias, limit, routing),
                   routing);
  };
  const std::vector<int64_t> matrices = {experts, load.outputs, load.width};
  std::vector<Input> inputs = {{{tokens, experts}, -2.0, 2.0, false},
                               {{tokens, load.width}, -1.0, 1.0, false},
                               {matrices, -0.3, 0.3, false, !load.stored},
                               {matrices, -0.3, 0.3, false, !load.stored}};
  for (int i = 0; load.bias && i < 2; ++i) {
    inputs.push_back({{experts, load.outputs}, -1.0, 1.0, false, true});
  }
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    SCOPED_TRACE(dtype_name(type));
    auto values = testing::draw(inputs);
    if (top == 1) {
      values[0] = values_of(load)[0];
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      values[i] = testing::as_stored(values[i], inputs[i].dtype(type));
    }
    const auto exact =
        testing::run_operation<double>(operation, inputs, values, true, false).output;
    for (const int64_t least : kPairsFrom) {
      SCOPED_TRACE(fmt::format("pairs from {} rows", least));
      const PairsFrom pairs(least);
      const auto own = testing::run_on_cuda(operation, inputs, values, type, false).output;
      const double norm = type == Dtype::kBF16 ? testing::kNarrowForward : 1e-5;
      EXPECT_LE(testing::norm_error(own, exact), norm);
      EXPECT_LE(testing::element_error(own, exact, 4 * norm, 2 * norm), 1.0);
      EXPECT_EQ(testing::run_on_cuda(operation, inputs, values, type, false).output, own)
          << "two runs differ";
    }
  }
}

TEST_P(LoadsOfExperts, HiddenMatchesTheDefinition) {
  const Load& load = GetParam();
  const int64_t tokens = std::accumulate(load.rows.begin(), load.rows.end(), int64_t{0});
  expect_hidden_matches_the_definition(load, tokens, 1, load.bias ? 2.0F : 0.0F);
}

TEST_F(ExpertsOnCuda, HiddenOfTokensThatGoToSeveralExperts) {
  for (const int64_t tokens : {1, 12, 40, 120, 700}) {
    for (const bool up_first : {false, true}) {
      SCOPED_TRACE(fmt::format("{} tokens{}", tokens, up_first ? ", up first" : ""));
      expect_hidden_matches_the_definition({"", std::vector<int>(6), 136, 200, up_first, true},
                                           tokens, 3, 0.0F, up_first);
    }
  }
}

TEST_F(ExpertsOnCuda, RowsAreTheSlotsByExpertHoweverManyThereAre) {
  struct Size {
    int64_t tokens, experts, top;
  };
  for (const auto& [tokens, experts, top] :
       {Size{1, 512, 10}, {2, 40, 3}, {60, 130, 4}, {3000, 130, 4}, {1100, 1024, 8}}) {
    SCOPED_TRACE(fmt::format("{} tokens, {} of {}", tokens, top, experts));
    testing::CudaContext cuda;
    const OwnedTensor logits = testing::cuda_tensor(
        Dtype::kF32, {tokens, experts}, testing::draw({{{tokens, experts}, -3.0, 3.0}})[0]);
    const ExpertLists lists = route(cuda.ctx, logits.view, {}, {.top = top}).lists;
    cuda.ctx.synchronize();
    const auto numbers = [](const int32_t* from, int64_t count) {
      const OwnedTensor here(Dtype::kI32, {count});
      copy(here.view,
           Tensor::of(Dtype::kI32, Device{Device::kCuda}, {&count, 1}, const_cast<int32_t*>(from)));
      return std::vector<int32_t>(here.view.ptr<int32_t>(), here.view.ptr<int32_t>() + count);
    };
    const auto expert = numbers(lists.expert, lists.rows());
    std::vector<int32_t> slots(expert.size());
    std::iota(slots.begin(), slots.end(), 0);
    std::stable_sort(slots.begin(), slots.end(), [&](int32_t a, int32_t b) {
      return expert[static_cast<size_t>(a)] < expert[static_cast<size_t>(b)];
    });
    EXPECT_EQ(numbers(lists.slot, lists.rows()), slots);
    std::vector<int32_t> rows(slots.size());
    std::vector<int32_t> starts(static_cast<size_t>(experts) + 1);
    for (size_t r = 0; r < slots.size(); ++r) {
      rows[static_cast<size_t>(slots[r])] = static_cast<int32_t>(r);
      ++starts[static_cast<size_t>(expert[static_cast<size_t>(slots[r])]) + 1];
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    EXPECT_EQ(numbers(lists.row, lists.rows()), rows);
    EXPECT_EQ(numbers(lists.start, experts + 1), starts);
  }
}

TEST_F(ExpertsOnCuda, OfABatchInvariantCallARowIsTheSameAmongAnyNumber) {
  const Load all{"", {1, 7, 130, 65, 40}, 136, 328, true, true};
  const auto values = values_of(all);
  const auto experts = std::ssize(all.rows);
  const auto run = [&](int64_t begin, int64_t tokens) {
    testing::CudaContext cuda(Dtype::kBF16);
    cuda.ctx.batch_invariant = true;
    const auto rows = [&](size_t i, int64_t width) {
      return testing::cuda_tensor(
          Dtype::kBF16, {tokens, width},
          {values[i].begin() + begin * width, values[i].begin() + (begin + tokens) * width});
    };
    const OwnedTensor logits = rows(0, experts);
    const OwnedTensor x = rows(1, all.width);
    const OwnedTensor weight =
        testing::cuda_tensor(Dtype::kBF16, {experts, all.outputs, all.width}, values[2]);
    const OwnedTensor bias = testing::cuda_tensor(Dtype::kF32, {experts, all.outputs}, values[3]);
    return testing::take(product_of(cuda.ctx, {logits.view, x.view, weight.view, bias.view}, all));
  };
  const auto together = run(0, 243);
  for (const auto& [begin, tokens] : {std::pair<int64_t, int64_t>{0, 1}, {17, 5}, {100, 143}}) {
    EXPECT_EQ(run(begin, tokens),
              std::vector<double>(together.begin() + begin * all.outputs,
                                  together.begin() + (begin + tokens) * all.outputs))
        << tokens << " from " << begin;
  }
}

}  // namespace
}  // namespace cambium
