// What the tests of operations with a state share: the same tokens give the same results however
// they are packed into segments and cut into calls, and nothing but a sequence's own past is read.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "base/parallel.h"
#include "ops/segments.h"
#include "ops/testing.h"

namespace cambium::testing {

/// `inputs` as the test gives them, cut to the tokens of the call.
using StatefulOperation = std::function<Tensor(Context&, const std::vector<Tensor>& inputs,
                                               const Segments&, const Tensor& state)>;

struct StatefulCase {
  StatefulOperation operation;
  std::vector<Input> inputs;       // those of tokens have T as their first axis
  std::vector<bool> of_tokens;     // per input
  std::vector<int64_t> state_row;  // shape of a slot
  int64_t tokens = 0;
};

/// Segments that own their numbers.
struct OwnedSegments {
  std::vector<int32_t> start, position, slot;
  Segments view() const { return {start, position, slot}; }
};

/// Sequences of these lengths from position 0, packed, without state.
inline OwnedSegments packed_segments(const std::vector<int64_t>& lengths) {
  OwnedSegments segments{{0}, {}, {}};
  for (const int64_t length : lengths) {
    segments.start.push_back(segments.start.back() + static_cast<int32_t>(length));
    segments.position.push_back(0);
  }
  return segments;
}

struct StatefulRun {
  std::vector<double> output;
  std::vector<double> state;               // of the sequence's slot
  std::vector<std::vector<double>> grads;  // per input; over tokens for those of tokens
};

/// Runs the case on one sequence in calls that end at `cuts` and at the end, in slot 1 of 3.
template <class Real>
StatefulRun run_in_calls(const StatefulCase& test, const std::vector<std::vector<double>>& values,
                         const std::vector<int64_t>& cuts) {
  constexpr Dtype kDtype = DtypeOf<Real>::value;
  Arena& arena = shared_arena();
  const ArenaScope scope(arena);
  Context ctx{.arena = &arena};
  std::vector<OwnedTensor> owned;
  for (size_t i = 0; i < values.size(); ++i) {
    owned.emplace_back(kDtype, std::span<const int64_t>(test.inputs[i].shape));
    std::copy(values[i].begin(), values[i].end(), owned.back().view.template ptr<Real>());
  }
  std::vector<int64_t> shape{3};
  shape.insert(shape.end(), test.state_row.begin(), test.state_row.end());
  const OwnedTensor state(kDtype, std::span<const int64_t>(shape));
  std::fill_n(state.view.ptr<Real>(), state.view.numel(), std::numeric_limits<Real>::quiet_NaN());
  StatefulRun run;
  int64_t begin = 0;
  std::vector<int64_t> ends = cuts;
  ends.push_back(test.tokens);
  for (const int64_t end : ends) {
    const OwnedSegments segments{
        {0, static_cast<int32_t>(end - begin)}, {static_cast<int32_t>(begin)}, {1}};
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < owned.size(); ++i) {
      tensors.push_back(test.of_tokens[i] ? owned[i].view.slice(0, begin, end - begin)
                                          : owned[i].view);
    }
    const Tensor y = test.operation(ctx, tensors, segments.view(), state.view);
    const std::vector<double> piece = to_doubles(y, y.data);
    run.output.insert(run.output.end(), piece.begin(), piece.end());
    begin = end;
  }
  for (const int64_t other : {0, 2}) {
    for (const double x :
         to_doubles(state.view.slice(0, other, 1), state.view.slice(0, other, 1).data)) {
      EXPECT_TRUE(std::isnan(x)) << "the slot of another sequence was written";
    }
  }
  run.state = to_doubles(state.view.slice(0, 1, 1), state.view.slice(0, 1, 1).data);
  return run;
}

/// The same on a CUDA device with activations of f32 or bf16.
inline StatefulRun run_in_calls_on_cuda(const StatefulCase& test,
                                        const std::vector<std::vector<double>>& values,
                                        const std::vector<int64_t>& cuts, Dtype activations) {
  const Device device{Device::kCuda};
  const ArenaScope scope(cuda_arena());
  const ArenaScope host_scope(cuda_host_arena());
  poison_cuda();
  Context ctx{.arena = &cuda_arena(), .host = &cuda_host_arena(), .activations = activations};
  std::vector<OwnedTensor> owned;
  for (size_t i = 0; i < values.size(); ++i) {
    owned.emplace_back(test.inputs[i].dtype(activations),
                       std::span<const int64_t>(test.inputs[i].shape), false, device);
    put(owned.back().view, values[i]);
  }
  std::vector<int64_t> shape{3};
  shape.insert(shape.end(), test.state_row.begin(), test.state_row.end());
  const OwnedTensor state(Dtype::kF32, std::span<const int64_t>(shape), false, device);
  fill_memory(state.view.data, device, 0xff, state.view.bytes());
  StatefulRun run;
  int64_t begin = 0;
  std::vector<int64_t> ends = cuts;
  ends.push_back(test.tokens);
  for (const int64_t end : ends) {
    const OwnedSegments segments{
        {0, static_cast<int32_t>(end - begin)}, {static_cast<int32_t>(begin)}, {1}};
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < owned.size(); ++i) {
      tensors.push_back(test.of_tokens[i] ? owned[i].view.slice(0, begin, end - begin)
                                          : owned[i].view);
    }
    const std::vector<double> piece =
        take(test.operation(ctx, tensors, segments.view(), state.view));
    run.output.insert(run.output.end(), piece.begin(), piece.end());
    begin = end;
  }
  for (const int64_t other : {0, 2}) {
    for (const double x : take(state.view.slice(0, other, 1))) {
      EXPECT_TRUE(std::isnan(x)) << "the slot of another sequence was written";
    }
  }
  run.state = take(state.view.slice(0, 1, 1));
  return run;
}

/// On a CUDA device: calls cut anywhere == the definition of the whole.
inline void expect_splits_agree_on_cuda(const StatefulCase& test,
                                        const std::vector<std::vector<int64_t>>& cuts) {
  auto values = draw(test.inputs);
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    const bool narrow = type == Dtype::kBF16;
    for (size_t i = 0; narrow && i < values.size(); ++i) {
      if (test.inputs[i].dtype(type) == Dtype::kBF16) {
        std::transform(values[i].begin(), values[i].end(), values[i].begin(), as_bf16);
      }
    }
    const StatefulRun exact = run_in_calls<double>(test, values, {});
    for (const auto& at : cuts) {
      const StatefulRun run = run_in_calls_on_cuda(test, values, at, type);
      const double tolerance = narrow ? kNarrowForward : 2e-5;
      EXPECT_LE(norm_error(run.output, exact.output), tolerance) << at.size() << " cuts";
      EXPECT_LE(norm_error(run.state, exact.state), tolerance) << at.size() << " cuts, state";
    }
  }
}

/// One call == a call per token == calls cut anywhere in `cuts`, from slots full of NaN; and the
/// one call with state == the call without.
template <class Real>
void expect_splits_agree(const StatefulCase& test, const std::vector<std::vector<int64_t>>& cuts,
                         double tolerance) {
  const auto values = draw(test.inputs);
  const StatefulRun whole = run_in_calls<Real>(test, values, {});
  const auto compare = [&](const std::vector<int64_t>& at, const std::string& name) {
    const StatefulRun run = run_in_calls<Real>(test, values, at);
    EXPECT_LE(relative_error(run.output, whole.output), tolerance) << name;
    EXPECT_LE(relative_error(run.state, whole.state), tolerance) << name << ", state";
  };
  std::vector<int64_t> steps;
  for (int64_t t = 1; t < test.tokens; ++t) {
    steps.push_back(t);
  }
  compare(steps, "token by token");
  for (const auto& at : cuts) {
    std::string name = "cut at";
    for (const int64_t t : at) {
      name += " " + std::to_string(t);
    }
    compare(at, name);
  }
  if (on_cuda() && std::is_same_v<Real, float>) {
    std::vector<std::vector<int64_t>> all = cuts;
    all.emplace_back();
    all.push_back(steps);
    expect_splits_agree_on_cuda(test, all);
  }
  const OwnedSegments one = packed_segments({test.tokens});
  const Run stateless = run_operation<Real>(
      [&](Context& ctx, const std::vector<Tensor>& in) {
        return test.operation(ctx, in, one.view(), {});
      },
      test.inputs, values, false, false);
  EXPECT_LE(relative_error(stateless.output, whole.output), tolerance) << "without state";
}

/// Packed sequences of `lengths` (which sum to test.tokens) give the results and gradients of the
/// sequences run one by one.
template <class Real>
void expect_packed_equals_separate(const StatefulCase& test, const std::vector<int64_t>& lengths,
                                   double tolerance) {
  const auto values = draw(test.inputs);
  const OwnedSegments all = packed_segments(lengths);
  const auto run = [&](const OwnedSegments& segments, int64_t begin, int64_t length,
                       std::vector<std::vector<double>>& grads) {
    Arena& arena = shared_arena();
    const ArenaScope scope(arena);
    poison(arena);
    Tape tape(arena);
    Context ctx{.arena = &arena, .tape = &tape};
    std::vector<OwnedTensor> owned;
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < values.size(); ++i) {
      owned.emplace_back(DtypeOf<Real>::value, std::span<const int64_t>(test.inputs[i].shape),
                         true);
      std::copy(values[i].begin(), values[i].end(), owned.back().view.template ptr<Real>());
      poison_grad(owned.back());
      tensors.push_back(test.of_tokens[i] ? owned.back().view.slice(0, begin, length)
                                          : owned.back().view);
    }
    const Tensor y = test.operation(ctx, tensors, segments.view(), {});
    const int64_t per_token = y.numel() / std::max<int64_t>(y.dim(0), 1);
    for (int64_t i = 0; i < y.numel(); ++i) {
      y.grad_ptr<Real>()[i] =
          static_cast<Real>(loss_weight(static_cast<size_t>(begin * per_token + i)));
    }
    tape.backward(ctx);
    grads.resize(owned.size());
    for (size_t i = 0; i < owned.size(); ++i) {
      const std::vector<double> grad = to_doubles(owned[i].view, owned[i].view.grad_tensor().data);
      grads[i].resize(grad.size());
      for (size_t j = 0; j < grad.size(); ++j) {
        grads[i][j] += grad[j];
      }
    }
    return to_doubles(y, y.data);
  };
  std::vector<std::vector<double>> packed_grads;
  std::vector<std::vector<double>> separate_grads;
  const std::vector<double> packed = run(all, 0, test.tokens, packed_grads);
  std::vector<double> separate;
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    const auto piece = run(packed_segments({length}), begin, length, separate_grads);
    separate.insert(separate.end(), piece.begin(), piece.end());
    begin += length;
  }
  EXPECT_LE(relative_error(packed, separate), tolerance);
  for (size_t i = 0; i < packed_grads.size(); ++i) {
    EXPECT_LE(relative_error(packed_grads[i], separate_grads[i]), tolerance)
        << "gradient of input " << i;
  }
}

/// Results and gradients of the float kernels are the same bits on one thread and on three.
inline void expect_threads_agree(const StatefulCase& test, const std::vector<int64_t>& lengths) {
  const auto values = draw(test.inputs);
  const OwnedSegments segments = packed_segments(lengths);
  const auto run = [&](int threads) {
    set_num_threads(threads);
    return run_operation<float>(
        [&](Context& ctx, const std::vector<Tensor>& in) {
          return test.operation(ctx, in, segments.view(), {});
        },
        test.inputs, values, false, true);
  };
  const int before = num_threads();
  const Run one = run(1);
  const Run three = run(3);
  set_num_threads(before);
  EXPECT_EQ(one.output, three.output);
  EXPECT_EQ(one.grads, three.grads);
}

/// A case of an operation with a state and how it is cut. Its test file instantiates the suite,
/// whose tests stand in stateful_test.cc:
///   INSTANTIATE_TEST_SUITE_P(Recurrence, Stateful, ::testing::Values(row...), stateful_row_name);
struct StatefulRow {
  const char* name;
  StatefulCase test;
  std::vector<int64_t> lengths;  // of the packed sequences
  std::vector<int64_t> cuts;  // where the sequence is cut in two; those past its end are left out
  bool differences = true;    // small enough for finite differences
};

inline std::ostream& operator<<(std::ostream& out, const StatefulRow& row) {
  return out << row.name;
}

class Stateful : public ::testing::TestWithParam<StatefulRow> {};

}  // namespace cambium::testing
