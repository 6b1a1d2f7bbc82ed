// What the tests of operations share. An operation is given as a function of its input tensors; the
// same function then runs in double precision (the naive definition), in float by every instruction
// set of this machine, and under finite differences.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/testing.h"
#include "tensor/context.h"
#include "tensor/copy.h"

namespace cambium::testing {

/// An input of the operation under test: its shape and the range its values are drawn from.
struct Input {
  std::vector<int64_t> shape;
  double lo = -1.0;
  double hi = 1.0;
  bool differentiable = true;
  /// Of the type of sums where activations are bf16: weights and gates. Vectors always are.
  bool sums = false;

  Dtype dtype(Dtype activations) const {
    return sums || shape.size() == 1 ? sum_dtype(activations) : activations;
  }
};

/// The memory of one run after another: blocks are zeroed when they are made, which costs more than
/// the runs of a test. Take it with an ArenaScope.
inline Arena& shared_arena() {
  static Arena arena;
  return arena;
}

/// Fills the memory the arena gives next with NaN: what is read before it is written shows.
inline void poison(Arena& arena) {
  constexpr int64_t kBytes = 4 << 20;
  const ArenaScope scope(arena);
  std::memset(arena.allocate(kBytes), 0xff, kBytes);
}

/// Makes its gradient, if it has one, fresh with NaN in it.
inline void poison_grad(const OwnedTensor& t) {
  if (t.view.has_grad()) {
    std::memset(t.grad.data(), 0xff, static_cast<size_t>(t.grad.bytes()));
    t.view.forget_grad();
  }
}

/// Whether kernels are tried on a CUDA device too.
inline bool on_cuda() {
  return cuda_devices() > 0;
}
inline Arena& cuda_arena() {
  static Arena arena{Device{Device::kCuda}};
  return arena;
}
inline Arena& cuda_host_arena() {
  static Arena arena = Arena::for_host(Device{Device::kCuda});
  return arena;
}
inline void poison_cuda() {
  constexpr int64_t kBytes = 16 << 20;
  const ArenaScope scope(cuda_arena());
  fill_memory(cuda_arena().allocate(kBytes), Device{Device::kCuda}, 0xff, kBytes);
}

/// A context on the CUDA device over poisoned memory, which goes with it.
class CudaContext {
 public:
  explicit CudaContext(Dtype activations = Dtype::kF32) {
    poison_cuda();
    ctx.activations = activations;
  }
  ~CudaContext() {
    try {
      ctx.synchronize();
    } catch (const std::exception&) {  // whoever asks the device next is told
    }
  }
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  Context ctx{.arena = &cuda_arena(), .host = &cuda_host_arena()};

 private:
  ArenaScope arena_{cuda_arena()};
  ArenaScope host_{cuda_host_arena()};
};

using Operation = std::function<Tensor(Context&, const std::vector<Tensor>&)>;

struct Run {
  std::vector<double> output;
  std::vector<std::vector<double>> grads;  // per input; empty where not differentiable
};

inline std::vector<std::vector<double>> draw(const std::vector<Input>& inputs, uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<double>> values;
  for (const Input& input : inputs) {
    int64_t n = 1;
    for (const int64_t size : input.shape) {
      n *= size;
    }
    std::uniform_real_distribution<double> uniform(input.lo, input.hi);
    auto& v = values.emplace_back(static_cast<size_t>(n));
    // Rounded to float, so that both precisions see the same numbers.
    for (double& x : v) {
      x = static_cast<float>(uniform(random));
    }
  }
  return values;
}

/// The weights of the scalar loss sum_i w_i y_i under which gradients are taken.
inline double loss_weight(size_t i) {
  return std::sin(0.7 * static_cast<double>(i) + 0.3);
}

inline float as_bf16(double x) {
  return widen(round_to_bf16(static_cast<float>(x)));
}

inline std::vector<double> to_doubles(const Tensor& t, const void* base) {
  std::vector<double> out;
  std::array<int64_t, kMaxRank> index{};
  const int64_t n = t.numel();
  out.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    int64_t offset = 0;
    for (size_t a = 0; a < static_cast<size_t>(t.rank); ++a) {
      offset += index[a] * t.stride[a];
    }
    out.push_back(t.dtype == Dtype::kF64 ? static_cast<const double*>(base)[offset]
                  : t.dtype == Dtype::kBF16
                      ? static_cast<double>(widen(static_cast<const bf16*>(base)[offset]))
                      : static_cast<double>(static_cast<const float*>(base)[offset]));
    for (int a = t.rank; a-- > 0;) {
      const auto axis = static_cast<size_t>(a);
      if (++index[axis] < t.shape[axis]) {
        break;
      }
      index[axis] = 0;
    }
  }
  return out;
}

/// With `round_loss` the loss's weights are rounded to bf16, as a bf16 result takes them.
template <class Real>
Run run_operation(const Operation& operation, const std::vector<Input>& inputs,
                  const std::vector<std::vector<double>>& values, bool reference, bool with_grad,
                  bool round_loss = false) {
  Arena& arena = shared_arena();
  const ArenaScope scope(arena);
  poison(arena);
  Tape tape(arena);
  Context ctx{.arena = &arena, .tape = with_grad ? &tape : nullptr, .reference = reference};
  std::vector<OwnedTensor> owned;
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < inputs.size(); ++i) {
    owned.emplace_back(DtypeOf<Real>::value, std::span<const int64_t>(inputs[i].shape),
                       with_grad && inputs[i].differentiable);
    std::copy(values[i].begin(), values[i].end(), owned.back().view.template ptr<Real>());
    tensors.push_back(owned.back().view);
    poison_grad(owned.back());
  }
  const Tensor y = operation(ctx, tensors);
  Run run;
  run.output = to_doubles(y, y.data);
  if (with_grad) {
    EXPECT_TRUE(y.contiguous()) << "the test sets the gradient of a contiguous result";
    for (size_t i = 0; i < run.output.size(); ++i) {
      y.grad_ptr<Real>()[i] =
          static_cast<Real>(round_loss ? as_bf16(loss_weight(i)) : loss_weight(i));
    }
    tape.backward(ctx);
    for (const Tensor& t : tensors) {
      run.grads.push_back(t.has_grad() ? to_doubles(t, t.grad_tensor().data)
                                       : std::vector<double>{});
    }
  }
  return run;
}

/// Copies elements that the CPU has to a tensor of any device and type.
inline void put(const Tensor& to, const std::vector<double>& values) {
  const OwnedTensor here(Dtype::kF64, std::span(to.shape.data(), static_cast<size_t>(to.rank)));
  std::copy(values.begin(), values.end(), here.view.ptr<double>());
  copy(to, here.view);
}
/// The elements of a contiguous tensor of any device.
inline std::vector<double> take(const Tensor& from) {
  const OwnedTensor here(from.dtype, std::span(from.shape.data(), static_cast<size_t>(from.rank)));
  copy(here.view, from);
  return to_doubles(here.view, here.view.data);
}

/// Numbers as elements of this type hold them.
inline std::vector<double> as_stored(std::vector<double> values, Dtype dtype) {
  if (dtype == Dtype::kBF16) {
    std::transform(values.begin(), values.end(), values.begin(), as_bf16);
  }
  return values;
}
/// Rows of `dim` numbers as pages of this type hold them: in f8 each with its scale.
inline std::vector<double> as_paged(std::vector<double> values, int64_t dim, Dtype dtype) {
  if (dtype != Dtype::kF8E4M3) {
    return as_stored(std::move(values), dtype);
  }
  for (auto row = values.begin(); row != values.end(); row += dim) {
    uint32_t largest = 0;
    for (auto x = row; x != row + dim; ++x) {
      largest = std::max(largest, magnitude_bits(static_cast<float>(*x)));
    }
    const bf16 scale = e4m3_scale(largest);
    std::transform(row, row + dim, row, [&](double x) {
      return widen(from_scaled(to_scaled(static_cast<float>(x), 1.0F / widen(scale)), scale));
    });
  }
  return values;
}
/// A tensor of the CUDA device with these elements; with a gradient of its own type, fresh and full
/// of NaN, if wanted.
inline OwnedTensor cuda_tensor(Dtype dtype, std::span<const int64_t> shape,
                               const std::vector<double>& values, bool with_grad = false) {
  const Device device{Device::kCuda};
  OwnedTensor t(dtype, shape, false, device);
  put(t.view, values);
  if (with_grad) {
    t.grad = Buffer::uninitialised(t.view.bytes(), device);
    fill_memory(t.grad.data(), device, 0xff, t.grad.bytes());
    t.grad_memory = std::make_unique<GradientMemory>(
        GradientMemory{device, t.grad.data(), t.grad.bytes(), true});
    t.view.grad_dtype = dtype;
    t.view.grad = t.grad.data();
    t.view.grad_memory = t.grad_memory.get();
  }
  return t;
}
inline OwnedTensor cuda_tensor(Dtype dtype, std::initializer_list<int64_t> shape,
                               const std::vector<double>& values, bool with_grad = false) {
  return cuda_tensor(dtype, std::span(shape.begin(), shape.size()), values, with_grad);
}

/// The operation on a CUDA device, with activations of f32 or bf16.
inline Run run_on_cuda(const Operation& operation, const std::vector<Input>& inputs,
                       const std::vector<std::vector<double>>& values, Dtype activations,
                       bool with_grad) {
  const Device device{Device::kCuda};
  const ArenaScope scope(cuda_arena());
  const ArenaScope host_scope(cuda_host_arena());
  poison_cuda();
  Tape tape(cuda_host_arena());
  Context ctx{.arena = &cuda_arena(),
              .tape = with_grad ? &tape : nullptr,
              .host = &cuda_host_arena(),
              .activations = activations};
  std::vector<OwnedTensor> owned;
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < inputs.size(); ++i) {
    owned.emplace_back(inputs[i].dtype(activations), std::span<const int64_t>(inputs[i].shape),
                       false, device);
    Tensor& t = owned.back().view;
    t.grad_dtype = t.dtype;
    put(t, values[i]);
    if (with_grad && inputs[i].differentiable) {
      const int64_t bytes = t.bytes();
      tape.set_fresh_grad(t, cuda_arena().allocate(bytes));
      fill_memory(t.grad, device, 0xff, bytes);
    }
    tensors.push_back(t);
  }
  const Tensor y = operation(ctx, tensors);
  Run run;
  run.output = take(y);
  if (with_grad) {
    std::vector<double> dy(run.output.size());
    for (size_t i = 0; i < dy.size(); ++i) {
      dy[i] = loss_weight(i);
    }
    put(y.grad_tensor(), dy);
    tape.backward(ctx);
    for (const Tensor& t : tensors) {
      run.grads.push_back(t.has_grad() ? take(t.grad_tensor()) : std::vector<double>{});
    }
  }
  ctx.synchronize();
  return run;
}

/// max |a - b| / max(|b|, floor)
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b,
                             double floor = 1e-6) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0.0;
  double scale = floor;
  for (const double x : b) {
    scale = std::max(scale, std::abs(x));
  }
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double error = std::abs(a[i] - b[i]);
    worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
  }
  return worst / scale;
}

/// The largest |a - b| / (relative |b| + floor max |b|): at most 1 where every element is right on
/// its own scale. A small element beside large ones may be the difference of large sums, hence the
/// floor; relative_error() alone would let it be wrong altogether.
inline double element_error(const std::vector<double>& a, const std::vector<double>& b,
                            double relative, double floor) {
  EXPECT_EQ(a.size(), b.size());
  double scale = 1e-6;
  for (const double x : b) {
    scale = std::max(scale, std::abs(x));
  }
  double worst = 0.0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double error = std::abs(a[i] - b[i]) / (relative * std::abs(b[i]) + floor * scale);
    worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
  }
  return worst;
}

/// ||a - b|| / ||b||; elements of b below `floor` in their root mean square count as that.
inline double norm_error(const std::vector<double>& a, const std::vector<double>& b,
                         double floor = 0.0) {
  EXPECT_EQ(a.size(), b.size());
  double error = 0.0;
  double norm = 1e-12 + floor * floor * static_cast<double>(b.size());
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::isfinite(error) ? std::sqrt(error / norm) : INFINITY;
}

/// What float kernels may miss of an element, as element_error() takes it.
inline constexpr double kElementTolerance = 1e-4;
inline constexpr double kElementFloor = 2e-6;

/// Gradients of the double-precision definition against central differences: relative error <=
/// 1e-6.
inline void expect_gradients_match_differences(const Operation& operation,
                                               const std::vector<Input>& inputs,
                                               double tolerance = 1e-6, size_t max_per_input = 40) {
  auto values = draw(inputs);
  const Run exact = run_operation<double>(operation, inputs, values, true, true);
  const auto loss = [&] {
    const Run run = run_operation<double>(operation, inputs, values, true, false);
    double sum = 0.0;
    for (size_t i = 0; i < run.output.size(); ++i) {
      sum += loss_weight(i) * run.output[i];
    }
    return sum;
  };
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].differentiable) {
      continue;
    }
    std::vector<double> analytic;
    std::vector<double> numeric;
    const size_t n = values[i].size();
    const size_t step = std::max<size_t>(1, n / max_per_input);
    for (size_t j = 0; j < n; j += step) {
      const double saved = values[i][j];
      const double h = 1e-5 * std::max(1.0, std::abs(saved));
      values[i][j] = saved + h;
      const double up = loss();
      values[i][j] = saved - h;
      const double down = loss();
      values[i][j] = saved;
      numeric.push_back((up - down) / (2 * h));
      analytic.push_back(exact.grads[i][j]);
    }
    EXPECT_LE(relative_error(analytic, numeric), tolerance) << "gradient of input " << i;
  }
}

/// Runs `body` with every instruction set of this machine.
template <class Body>
void for_each_isa(const Body& body) {
  const CpuIsa best = cpu_isa();
  for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
    set_cpu_isa(static_cast<CpuIsa>(isa));
    SCOPED_TRACE(cpu_isa_name(cpu_isa()));
    body();
  }
  set_cpu_isa(best);
}

/// What kernels of bf16 may miss, as norm_error() takes it: a rounding of the result is 2^-9 at
/// most, some kernels round factors of products too.
inline constexpr double kNarrowForward = 6e-3;
inline constexpr double kNarrowBackward = 1.5e-2;
/// Gradients smaller than this are differences of larger numbers that were rounded.
inline constexpr double kNarrowFloor = 0.05;

/// CUDA's kernels, of f32 and of bf16 (on inputs rounded to it), against the definition.
inline void expect_cuda_matches_reference(const Operation& operation,
                                          const std::vector<Input>& inputs,
                                          double forward_tolerance, double backward_tolerance) {
  const bool any = std::any_of(inputs.begin(), inputs.end(),
                               [](const Input& input) { return input.differentiable; });
  auto values = draw(inputs);
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    const bool narrow = type == Dtype::kBF16;
    for (size_t i = 0; narrow && i < inputs.size(); ++i) {
      if (inputs[i].dtype(type) == Dtype::kBF16) {
        std::transform(values[i].begin(), values[i].end(), values[i].begin(), as_bf16);
      }
    }
    for (const bool with_grad : {false, true}) {
      if (with_grad && !any) {
        continue;
      }
      const Run run = run_on_cuda(operation, inputs, values, type, with_grad);
      const Run exact = run_operation<double>(operation, inputs, values, true, with_grad, narrow);
      if (narrow) {
        EXPECT_LE(norm_error(run.output, exact.output), kNarrowForward);
      } else {
        EXPECT_LE(relative_error(run.output, exact.output), forward_tolerance);
        EXPECT_LE(element_error(run.output, exact.output, kElementTolerance, kElementFloor), 1.0);
      }
      for (size_t i = 0; with_grad && i < inputs.size(); ++i) {
        if (narrow) {
          EXPECT_LE(norm_error(run.grads[i], exact.grads[i], kNarrowFloor), kNarrowBackward)
              << "gradient of input " << i;
        } else {
          EXPECT_LE(relative_error(run.grads[i], exact.grads[i]), backward_tolerance)
              << "gradient of input " << i;
        }
      }
      const Run again = run_on_cuda(operation, inputs, values, type, with_grad);
      EXPECT_EQ(again.output, run.output) << "two runs differ";
      EXPECT_EQ(again.grads, run.grads) << "two runs differ";
    }
  }
}

/// The float kernels of every instruction set (and the float definition) against the
/// double-precision definition, forward and backward.
inline void expect_kernels_match_reference(const Operation& operation,
                                           const std::vector<Input>& inputs,
                                           double forward_tolerance = 1e-5,
                                           double backward_tolerance = 1e-3) {
  const auto values = draw(inputs);
  const bool any = std::any_of(inputs.begin(), inputs.end(),
                               [](const Input& input) { return input.differentiable; });
  const Run exact = run_operation<double>(operation, inputs, values, true, any);
  const auto compare = [&](const std::string& name, bool reference) {
    for (const bool with_grad : {false, true}) {
      if (with_grad && !any) {
        continue;
      }
      const Run run = run_operation<float>(operation, inputs, values, reference, with_grad);
      EXPECT_LE(relative_error(run.output, exact.output), forward_tolerance) << name;
      EXPECT_LE(element_error(run.output, exact.output, kElementTolerance, kElementFloor), 1.0)
          << name;
      for (size_t i = 0; with_grad && i < inputs.size(); ++i) {
        EXPECT_LE(relative_error(run.grads[i], exact.grads[i]), backward_tolerance)
            << name << ", gradient of input " << i;
        EXPECT_LE(
            element_error(run.grads[i], exact.grads[i], 10 * kElementTolerance, 5 * kElementFloor),
            1.0)
            << name << ", gradient of input " << i;
      }
    }
  };
  compare("float definition", true);
  for_each_isa([&] { compare(cpu_isa_name(cpu_isa()), false); });
  if (on_cuda()) {
    expect_cuda_matches_reference(operation, inputs, forward_tolerance, backward_tolerance);
  }
}

}  // namespace cambium::testing
