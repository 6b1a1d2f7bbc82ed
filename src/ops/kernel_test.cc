#include "ops/kernel.h"

#include <gtest/gtest.h>

#include "ops/cuda_launch.h"
#include "ops/device_clock.h"
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

TEST(Run, TellsATimerOfEveryCall) {
  class Told : public OpTimer {
   public:
    void begin(const OpCall& call) override {
      EXPECT_EQ(call.as<Twice<double>>(), nullptr);
      ASSERT_NE(call.as<Twice<float>>(), nullptr);
      events.push_back(fmt::format("begin {} {}", call.kernel, *call.as<Twice<float>>()->x));
      Probe::called() = "nothing";
    }
    void end(const OpCall& call) override {
      events.push_back(fmt::format("end {} after {}", call.kernel, Probe::called()));
    }
    std::vector<std::string> events;
  };
  Arena arena;
  Told timer;
  float x = 3.0F;
  const Context ctx{.arena = &arena, .timer = &timer};
  const auto args = [&]<class T>() { return Twice<T>{reinterpret_cast<T*>(&x)}; };
  const std::array<int64_t, 1> one = {1};
  run<Probe>(ctx, Tensor::of(Dtype::kF32, {}, one, nullptr), args);
  run<Probe>(ctx, Tensor::of(Dtype::kF32, Device::kMeta, one, nullptr), args);  // not a call
  EXPECT_EQ(timer.events, (std::vector<std::string>{"begin probe 3", "end probe after cpu f32"}));
}

TEST(DeviceClock, TellsTimesBetweenMarks) {
  for (const Device device :
       testing::on_cuda() ? std::vector<Device>{{}, {Device::kCuda}} : std::vector<Device>{{}}) {
    const auto clock = DeviceClock::on(device);
    for (int round = 0; round < 2; ++round) {
      clock->clear();
      EXPECT_EQ(clock->mark(nullptr), 0);
      EXPECT_EQ(clock->mark(nullptr), 1);
      EXPECT_EQ(clock->mark(nullptr), 2);
      wait_for(device);
      EXPECT_GE(clock->seconds(0, 1), 0.0);
      EXPECT_LE(clock->seconds(0, 1), clock->seconds(0, 2) + 1e-6);
    }
  }
}

#if CAMBIUM_CUDA
struct Failing : Probe {
  static constexpr const char* kName = "failing";
  template <class T>
  static void cuda(const Twice<T>&, const Launch&) {
    constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
    cuda::check_launch("failing's rows", {3, 2}, {128}, 512, kInvalidValue);
  }
};

TEST(Run, AFailedLaunchNamesTheOperationAndItsShape) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const auto args = []<class T>() { return Twice<T>{nullptr}; };
  EXPECT_EQ(testing::error_of([&] {
              run<Failing>(
                  ctx,
                  Tensor::of(Dtype::kBF16, Device::kCuda, std::array<int64_t, 2>{1, 3}, nullptr),
                  args);
            }),
            "[failing's rows] its CUDA kernel failed: invalid argument (launched as 3 x 2 x 1 "
            "blocks of 128 x 1 x 1 threads, 512 bytes of shared memory); failing was called with "
            "bf16 (1, 3)");
}
#endif

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
            "[activation_forward] this build has no CUDA kernels; move the model to the cpu");
}

}  // namespace
}  // namespace cambium
