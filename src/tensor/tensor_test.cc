#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "base/parallel.h"
#include "base/testing.h"
#include "tensor/context.h"
#include "tensor/copy.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

TEST(Tensor, ViewsKeepDataAndGradientInStep) {
  OwnedTensor t(Dtype::kF32, {4, 12}, true);
  const Tensor v = t.view.slice(1, 4, 6).split_last(2, 3).slice(0, 1, 2);
  EXPECT_EQ(v.describe(), "f32 (2, 2, 3)");
  EXPECT_EQ(v.ptr<float>() - t.view.ptr<float>(), 16);
  EXPECT_EQ(v.grad_ptr<float>() - t.view.grad_ptr<float>(), 16);
  EXPECT_TRUE(v.merge_last().row_contiguous());
  EXPECT_EQ(v.merge_last().row_stride(), 12);
  EXPECT_FALSE(v.row_contiguous());
  EXPECT_FALSE(v.contiguous());
}

TEST(Arena, OfADeviceHoldsNoMoreThanItsLargestStep) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  const Device device{Device::kMeta};
  const int64_t before = memory_use(device).bytes;
  Arena arena(device);
  const auto step = [&](const std::vector<int64_t>& sizes) {
    const ArenaScope scope(arena);
    for (const int64_t size : sizes) {
      arena.allocate(size * kMiB);
    }
  };
  step({12, 12, 12, 12, 100});
  // No single block of the first step holds 120: all would be passed by.
  for (int i = 0; i < 3; ++i) {
    step({120, 12, 12});
    EXPECT_EQ(memory_use(device).bytes - before, 148 * kMiB);
  }
}

TEST(Arena, ReleaseReusesMemoryAndKeepsThePeak) {
  Arena arena;
  const auto mark = arena.mark();
  void* first = arena.allocate(1000);
  arena.allocate(40 << 20);
  arena.release(mark);
  EXPECT_EQ(arena.allocate(10), first);
  EXPECT_GE(arena.peak_bytes(), 40 << 20);
  EXPECT_EQ(arena.used_bytes(), 64);
}

TEST(Tape, RunsBackwardsOnce) {
  Arena arena;
  Tape tape(arena);
  std::vector<int> order;
  auto* sink = &order;
  const Context ctx{.arena = &arena, .tape = &tape};
  ctx.record({}, [sink](const Context&) { sink->push_back(1); });
  ctx.record({}, [sink](const Context&) { sink->push_back(2); });
  tape.backward(ctx);
  tape.backward(ctx);
  EXPECT_EQ(order, (std::vector<int>{2, 1}));
}

/// A fresh gradient is set by a first writer that writes all of it, else zeroed before it is
/// touched.
TEST(Tape, FreshGradientsAreSetOrZeroedBeforeTheyAreTouched) {
  Arena arena;
  {
    const ArenaScope scope(arena);
    std::memset(arena.allocate(4096), 0xff, 4096);  // NaN
  }
  Tape tape(arena);
  const Context ctx{.arena = &arena, .tape = &tape};
  const Tensor set = ctx.result(Dtype::kF32, {2, 3}, true);
  const Tensor added = ctx.result(Dtype::kF32, {2, 3}, true);
  const Tensor part = ctx.result(Dtype::kF32, {2, 3}, true);
  const Tensor untouched = ctx.result(Dtype::kF32, {2, 3}, true);
  ctx.record({}, [=](const Context&) {
    EXPECT_FALSE(set.takes_grad()) << "it was set by the step before";
    set.grad_ptr<float>()[1] += 1.0F;
  });
  ctx.record({added}, [=](const Context&) {
    EXPECT_TRUE(set.takes_grad());
    fill(set.grad_tensor(), 2.0);
    EXPECT_FALSE(added.takes_grad()) << "a step that names it adds to it";
    static_cast<float*>(added.grad)[0] += 1.0F;
    const Tensor row = part.slice(0, 1, 1);
    EXPECT_FALSE(row.takes_grad()) << "a part cannot set the whole";
    static_cast<float*>(row.grad)[0] += 1.0F;
  });
  tape.backward(ctx);
  const auto grads = [](const Tensor& t) {
    const float* g = t.grad_ptr<float>();
    return std::vector<float>(g, g + t.numel());
  };
  EXPECT_EQ(grads(set), (std::vector<float>{2, 3, 2, 2, 2, 2}));
  EXPECT_EQ(grads(added), (std::vector<float>{1, 0, 0, 0, 0, 0}));
  EXPECT_EQ(grads(part), (std::vector<float>{0, 0, 0, 1, 0, 0}));
  EXPECT_EQ(grads(untouched), std::vector<float>(6, 0.0F));
  set.forget_grad();
  EXPECT_TRUE(set.reshape({6}).takes_grad());
  OwnedTensor parameter(Dtype::kF32, {3}, true);
  EXPECT_FALSE(parameter.view.takes_grad()) << "zeroed, so not fresh";
  parameter.view.forget_grad();
  EXPECT_EQ(grads(parameter.view), std::vector<float>(3, 0.0F));
}

/// Every view of a tensor is one of its rounded elements.
TEST(TensorViews, AreViewsOfTheRoundedElementsToo) {
  std::vector<float> values(24);
  std::vector<bf16> rounded(24);
  for (size_t i = 0; i < values.size(); ++i) {
    rounded[i] = round_to_bf16(static_cast<float>(i));
  }
  Tensor t = Tensor::of(values.data(), {4, 6}, values.data());
  EXPECT_FALSE(t.rounded_tensor().defined());
  t.rounded = rounded.data();
  const Tensor part = t.slice(0, 1, 2).slice(1, 2, 4).split_last(2, 2).rounded_tensor();
  EXPECT_EQ(part.describe(), "bf16 (2, 2, 2)");
  EXPECT_FALSE(part.has_grad());
  EXPECT_EQ(widen(part.ptr<bf16>()[0]), 8.0F);
  EXPECT_EQ(part.stride[0], 6);
  EXPECT_EQ(t.reshape({24}).detached().rounded_tensor().data, rounded.data());
  EXPECT_FALSE(t.grad_tensor().rounded_tensor().defined()) << "a gradient is not rounded";
}

// Each device on its own; the tests of one process run one after the other.
void expect_counted(Device device) {
  const MemoryUse before = memory_use(device);
  {
    Buffer a(1000, device);
    EXPECT_EQ(memory_use(device).bytes, before.bytes + 1000);
    const Buffer b = std::move(a);
    EXPECT_EQ(memory_use(device).bytes, before.bytes + 1000);
    EXPECT_GE(memory_use(device).peak_bytes, before.bytes + 1000);
    a = Buffer(500, device);
    EXPECT_EQ(memory_use(device).bytes, before.bytes + 1500);
  }
  EXPECT_EQ(memory_use(device).bytes, before.bytes);
  EXPECT_EQ(memory_use(device).allocations, before.allocations + 2);
}

// What was reserved is all that is taken, however it is divided.
void expect_reserved(Device device) {
  Workspace workspace(device);
  workspace.reserve({int64_t{40} << 20, 1000});
  const int64_t before = memory_use(device).allocations;
  for (int step = 0; step < 3; ++step) {
    const WorkspaceScope scope(workspace);
    const void* first = workspace.arena().allocate(100);
    workspace.arena().allocate(int64_t{30} << 20);
    workspace.arena().allocate(int64_t{9} << 20);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 64, 0U);
    EXPECT_EQ(memory_use(device).allocations, before);
  }
  workspace.reserve({int64_t{20} << 20, 10});  // there is more already
  EXPECT_EQ(memory_use(device).allocations, before);
  workspace.arena().allocate(int64_t{41} << 20);
  EXPECT_EQ(memory_use(device).allocations, before + 1);
}

TEST(Memory, IsCounted) {
  expect_counted(Device::kCpu);
}

TEST(Memory, ReservedIsEnough) {
  expect_reserved(Device::kCpu);
}

class OnCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_devices() == 0) {
      GTEST_SKIP() << why_no_cuda();
    }
  }

  static constexpr Device kDevice{Device::kCuda};
};

TEST_F(OnCuda, TensorsAreOwnedAndZeroed) {
  const OwnedTensor t(Dtype::kBF16, {4, 12}, true, kDevice);
  EXPECT_EQ(t.view.device, kDevice);
  EXPECT_EQ(t.view.grad_tensor().dtype, Dtype::kF32) << "of a weight";
  EXPECT_EQ(elements_of(t.view), std::vector<float>(48, 0.0F));
  EXPECT_EQ(elements_of(t.view.grad_tensor()), std::vector<float>(48, 0.0F));
  const Tensor v = t.view.slice(1, 4, 6).split_last(2, 3).slice(0, 1, 2);
  EXPECT_EQ(v.device, kDevice);
  EXPECT_EQ(static_cast<const char*>(v.data) - static_cast<const char*>(t.view.data), 32);
  EXPECT_EQ(static_cast<const char*>(v.grad) - static_cast<const char*>(t.view.grad), 64);
  fill(t.view.grad_tensor(), 3);
  t.view.forget_grad();
  EXPECT_EQ(elements_of(t.view.grad_tensor()), std::vector<float>(48, 0.0F)) << "fresh again";
  const OwnedTensor none(Dtype::kF32, {0, 3}, true, kDevice);
  EXPECT_TRUE(elements_of(none.view).empty());
}

TEST_F(OnCuda, BuffersMoveAndPinnedOnesAreTheHosts) {
  Buffer a(1000, kDevice);
  void* memory = a.data();
  Buffer b = std::move(a);
  EXPECT_EQ(b.data(), memory);
  EXPECT_EQ(b.bytes(), 1000);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 256, 0U);
  const Buffer pinned = Buffer::pinned(16, kDevice);
  auto* numbers = static_cast<float*>(pinned.data());
  std::fill_n(numbers, 4, 2.5F);
  copy_from_pinned(b.data(), kDevice, numbers, 16);
  EXPECT_EQ(elements_of(Tensor::of(Dtype::kF32, kDevice, std::array<int64_t, 1>{4}, b.data())),
            std::vector<float>(4, 2.5F));
}

TEST_F(OnCuda, ArenasReuseMemoryAndKeepTheirPeak) {
  Arena arena(kDevice);
  Arena host = Arena::for_host(kDevice);
  for (Arena* of : {&arena, &host}) {
    const auto mark = of->mark();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(of->allocate(1000)) % 256, 0U);
    of->allocate(40 << 20);
    of->release(mark);
    void* first = of->allocate(10);  // of one block for all, now that it is known how much that is
    EXPECT_EQ(of->used_bytes(), 256);
    const int64_t buffers = memory_use(kDevice).allocations;
    of->allocate(40 << 20);
    of->release(mark);
    EXPECT_EQ(of->allocate(10), first);
    EXPECT_EQ(memory_use(kDevice).allocations, buffers);
    EXPECT_GE(of->peak_bytes(), 40 << 20);
    EXPECT_EQ(of->device(), kDevice);
  }
  // What lies after another does not touch it.
  const Tensor a = arena.empty(Dtype::kF32, {5});
  const Tensor b = arena.empty(Dtype::kF32, {5});
  fill(a, 1);
  fill(b, 2);
  EXPECT_EQ(elements_of(a), std::vector<float>(5, 1.0F));
  EXPECT_EQ(elements_of(b), std::vector<float>(5, 2.0F));
}

// And the memory that there is can be had afterwards.
TEST_F(OnCuda, OutOfMemoryNamesWhatWasAsked) {
  constexpr int64_t kBytes = int64_t{10} << 40;
  Arena arena(kDevice);
  const auto expect_message = [](const std::string& message) {
    EXPECT_THAT(message, ::testing::StartsWith("[cuda:0] out of memory: 10.0 TiB were asked for "
                                               "(10995116277760 bytes), "));
    EXPECT_THAT(message, ::testing::HasSubstr(
                             " are free (planned: a note); take fewer or shorter sequences"));
  };
  set_memory_note("a note");
  expect_message(testing::error_of([&] { arena.allocate(kBytes); }));
  EXPECT_EQ(arena.used_bytes(), 0);
  expect_message(testing::error_of([&] { Buffer(kBytes, kDevice); }));
  expect_message(testing::error_of([&] { Buffer::uninitialised(kBytes, kDevice); }));
  expect_message(
      testing::error_of([&] { OwnedTensor(Dtype::kF32, {kBytes / 4}, false, kDevice); }));
  set_memory_note("");
  const Tensor t = arena.empty(Dtype::kF32, {3});
  fill(t, 1);
  EXPECT_EQ(elements_of(t), std::vector<float>(3, 1.0F));
}

TEST_F(OnCuda, MemoryIsCountedAndReserved) {
  expect_counted(kDevice);
  expect_reserved(kDevice);
}

// On its own stream: what was copied is there after the wait for its mark.
TEST_F(OnCuda, CopiesThatAreWaitedForAreThere) {
  constexpr int64_t kCount = 1 << 20;
  const Buffer pinned = Buffer::pinned(2 * kCount * 4, kDevice);
  auto* numbers = static_cast<float*>(pinned.data());
  const OwnedTensor to(Dtype::kF32, {2, kCount}, false, kDevice);
  wait_for(kDevice);
  std::fill_n(numbers, kCount, 1.0F);
  std::fill_n(numbers + kCount, kCount, 2.0F);
  const std::unique_ptr<CopyQueue> queue = CopyQueue::on(kDevice);
  queue->copy(to.data.data(), numbers, kCount * 4);
  const int64_t first = queue->mark();
  queue->copy(static_cast<float*>(to.data.data()) + kCount, numbers + kCount, kCount * 4);
  queue->wait(first);
  std::fill_n(numbers, kCount, 7.0F);  // its copy was made
  queue->wait(queue->mark());
  EXPECT_EQ(elements_of(to.view.slice(0, 0, 1)), std::vector<float>(kCount, 1.0F));
  EXPECT_EQ(elements_of(to.view.slice(0, 1, 1)), std::vector<float>(kCount, 2.0F));
}

TEST_F(OnCuda, DevicesThatAreNotThereAreNamed) {
  const Device missing{Device::kCuda, 77};
  EXPECT_THAT(testing::error_of([&] { Buffer(16, missing); }),
              ::testing::HasSubstr("CUDA devices, got cuda:77"));
  const CudaDeviceInfo info = cuda_device_info(kDevice);
  EXPECT_FALSE(info.name.empty());
  EXPECT_GT(info.free_bytes, 0);
  EXPECT_LE(info.free_bytes, info.total_bytes);
}

// As on the CPU: a fresh gradient, full of what was there, is zeroed before a step adds to it.
TEST_F(OnCuda, FreshGradientsAreZeroedBeforeTheyAreTouched) {
  Workspace workspace(kDevice);
  const WorkspaceScope scope(workspace);
  {
    const ArenaScope before(workspace.arena());
    fill_memory(workspace.arena().allocate(4096), kDevice, 0xff, 4096);  // NaN
  }
  Tape tape(workspace.host());
  const Context ctx = workspace.context(Dtype::kF32, &tape);
  const Tensor added = ctx.result(Dtype::kF32, {2, 3}, true);
  const Tensor set = ctx.result(Dtype::kF32, {2, 3}, true);
  const std::vector<int64_t> rows{1};
  const Tensor ones = ctx.result(Dtype::kF32, {1, 3}, false);
  fill(ones, 1);
  ctx.record({added}, [&](const Context&) {
    add_rows(added.grad_tensor(), ones, rows);
    EXPECT_TRUE(set.takes_grad());
    fill(set.grad_tensor(), 2);
  });
  tape.backward(ctx);
  EXPECT_EQ(elements_of(added.grad_tensor()), (std::vector<float>{0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(elements_of(set.grad_tensor()), std::vector<float>(6, 2.0F));
}

TEST_F(OnCuda, HostAndDeviceSeeEachOthersNumbers) {
  Workspace workspace(kDevice);
  const Context ctx = workspace.context();
  const std::vector<float> numbers{1, 2, 3};
  const float* there = ctx.to_device(std::span(numbers));
  EXPECT_EQ(elements_of(Tensor::of(Dtype::kF32, kDevice, std::array<int64_t, 1>{3},
                                   const_cast<float*>(there))),
            numbers);
  auto* shared = ctx.shared_scratch<float>(3);
  copy_memory(shared, {}, there, kDevice, 3 * sizeof(float));
  ctx.synchronize();
  EXPECT_EQ(std::vector<float>(shared, shared + 3), numbers);
}

TEST(ParallelFor, CoversTheRangeOnceWithAnyNumberOfThreads) {
  for (const int threads : {1, 2, 5}) {
    set_num_threads(threads);
    for (int repeat = 0; repeat < 200; ++repeat) {
      std::vector<int> hits(1000, 0);
      parallel_for(1000, 7, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          ++hits[static_cast<size_t>(i)];
        }
      });
      EXPECT_EQ(hits, std::vector<int>(1000, 1));
    }
  }
}

}  // namespace
}  // namespace cambium
