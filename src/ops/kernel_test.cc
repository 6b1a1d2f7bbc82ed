#include "ops/kernel.h"

#include <gtest/gtest.h>

#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"
#include "ops/run.h"
#include "ops/testing.h"

namespace cambium {
namespace {

template <class T>
struct Twice {
  T* x;
};

// Answers with what was asked of it.
struct Probe {
  static constexpr const char* kName = "probe";
  static std::string& called() {
    static std::string name;
    return name;
  }
  template <class T>
  static void reference(const Twice<T>&) {
    called() = std::string("reference ") + dtype_name(DtypeOf<T>::value);
  }
  template <class T>
  static void cuda(const Twice<T>&, const Launch&) {
    called() = std::string("cuda ") + dtype_name(DtypeOf<T>::value);
  }
  static void cpu(const Twice<float>&, Arena& arena) {
    arena.allocate(1000);
    called() = "cpu f32";
  }
};

TEST(Run, PicksTheFormByTypeAndContext) {
  Arena arena;
  Context ctx{.arena = &arena};
  const auto args = []<class T>() { return Twice<T>{nullptr}; };
  const auto called = [&](Dtype dtype, bool reference) {
    ctx.reference = reference;
    run<Probe>(ctx, Tensor::of(dtype, {}, std::array<int64_t, 1>{1}, nullptr), args);
    return Probe::called();
  };
  EXPECT_EQ(called(Dtype::kF32, false), "cpu f32");
  EXPECT_EQ(called(Dtype::kF32, true), "reference f32");
  EXPECT_EQ(called(Dtype::kF64, false), "reference f64");
  EXPECT_EQ(arena.used_bytes(), 0) << "what a kernel takes goes when it returns";
}

TEST(Run, RefusesTypesWithoutKernels) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const auto args = []<class T>() { return Twice<T>{nullptr}; };
  const auto error = [&](Dtype dtype, Device device) {
    return testing::error_of([&] {
      run<Probe>(ctx, Tensor::of(dtype, device, std::array<int64_t, 2>{1, 3}, nullptr), args);
    });
  };
  EXPECT_EQ(error(Dtype::kBF16, Device::kCpu),
            "[probe] the cpu computes f32 and f64, got bf16 (1, 3)");
  if (!kCudaBuild) {
    EXPECT_EQ(error(Dtype::kF32, Device::kCuda),
              "[probe] this build has no CUDA kernels; move the model to the cpu");
    EXPECT_EQ(testing::error_of([] {
                OwnedTensor(Dtype::kF32, {3}, false, {Device::kCuda, 1});
              }),
              "[buffer] this build has no memory on cuda:1; take the cpu");
  }
}

// An operation given tensors that this build has no kernels for, however they came by their device.
TEST(Run, OperationsSayThatThereIsNoCuda) {
  if (kCudaBuild) {
    GTEST_SKIP() << "this build has CUDA kernels";
  }
  Arena arena;
  Context ctx{.arena = &arena};
  Tensor x = arena.empty(Dtype::kF32, {2, 8});
  Tensor w = arena.empty(Dtype::kF32, {8});
  x.device = {Device::kCuda, 0};
  EXPECT_EQ(testing::error_of([&] { rms_norm(ctx, x, w, 1e-5F); }),
            "[rms_norm] expected weight on cuda:0, got f32 (8) on cpu");
  w.device = x.device;
  EXPECT_EQ(testing::error_of([&] { rms_norm(ctx, x, w, 1e-5F); }),
            "[rms_norm_forward] this build has no CUDA kernels; move the model to the cpu");
  EXPECT_EQ(testing::error_of([&] { swiglu(ctx, x, x); }),
            "[swiglu_forward] this build has no CUDA kernels; move the model to the cpu");
}

}  // namespace
}  // namespace cambium
