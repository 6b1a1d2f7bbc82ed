#include "serve/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>

#include "base/error.h"
#include "base/signals.h"
#include "base/test_paths.h"
#include "serve/testing.h"

namespace cambium {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr int64_t kMiB = int64_t{1} << 20;

// Every kind of state, and more layers than kinds.
ModelSpec mixed_spec() {
  return testing::mixed_spec(
      {"attention", "mamba2", "mamba2", "sliding_window", "attention", "mamba", "gated_delta_net"});
}

MemoryRequest request_for(const ModelSpec& spec, int64_t total) {
  MemoryRequest request;
  request.spec = &spec;
  request.weights = {.bytes = 10 * kMiB, .narrow = true};
  request.engine.max_sequences = 8;
  request.device = Device::kMeta;
  request.total_bytes = total;
  return request;
}

GenerationRequest request_of(int64_t prompt, int64_t answer, int64_t seed) {
  GenerationRequest request;
  for (int64_t i = 0; i < prompt; ++i) {
    request.prompt.push_back(static_cast<int32_t>((seed * 31 + i * i * 7) % 96));
  }
  request.max_new_tokens = answer;
  request.seed = static_cast<uint64_t>(seed);
  request.sampling.temperature = seed % 3 == 0 ? 1.0F : 0.0F;
  request.sampling.top_k = seed % 2 == 0 ? 5 : 0;
  return request;
}

// What was measured on one layer of each kind is enough for the whole model, whatever comes, and
// the engine takes nothing from the system once it is made.
void expect_nothing_is_allocated(Device device) {
  LoadedModel loaded = fresh_model(mixed_spec(), 3, 0.2);
  loaded.weights.move_to(*loaded.model, device);
  EngineConfig config;
  config.max_sequences = 5;
  config.prefill_chunk = 64;
  config.prefill_tokens = 192;
  config.cache_values = Dtype::kF32;
  config.workspace = measure_workspace(loaded.model->spec(), false, config, device, 512);
  config.reserve = true;
  Engine engine(*loaded.model, config);
  const int64_t before = memory_use(device).allocations;
  const int64_t pinned = memory_use(device, MemoryKind::kPinned).allocations;
  const int64_t bytes = engine.cache().bytes();
  std::vector<GenerationRequest> requests;
  for (int64_t i = 0; i < 16; ++i) {
    requests.push_back(request_of(1 + i * 37 % 500, 3 + i % 9, i));
  }
  engine.generate(std::move(requests));
  EXPECT_EQ(memory_use(device).allocations, before);
  EXPECT_EQ(memory_use(device, MemoryKind::kPinned).allocations, pinned);
  EXPECT_EQ(engine.cache().bytes(), bytes);
  const WorkspaceBytes peak = engine.workspace_peak();
  EXPECT_LE(peak.device, config.workspace.device);
  EXPECT_LE(peak.host, config.workspace.host);
  // Beside what is added for other divisions.
  EXPECT_GE(peak.device, (config.workspace.device - 16 * kMiB) / 2);
}

TEST(MemoryPlan, AStepOfAPlannedEngineAllocatesNothing) {
  expect_nothing_is_allocated(Device::kCpu);
}

TEST(OnCuda, AStepOfAPlannedEngineAllocatesNothing) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  expect_nothing_is_allocated(Device::kCuda);
}

// A wish to stop, while the largest steps run: nothing stays behind.
void expect_ends_when_asked(Device device) {
  const int64_t before = memory_use(device).bytes;
  const StopAnywhere stop("nothing is measured");
  std::raise(SIGINT);
  EXPECT_THROW(measure_workspace(mixed_spec(), false, {}, device, 1), Interrupted);
  EXPECT_EQ(memory_use(device).bytes, before);
}

TEST(MemoryPlan, EndsWhenItIsAskedTo) {
  expect_ends_when_asked(Device::kCpu);
}

TEST(OnCuda, MeasuringEndsWhenItIsAskedTo) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  expect_ends_when_asked(Device::kCuda);
}

// A plan that is carried out takes what it says, to 5 %.
TEST(OnCuda, MemoryIsAsItWasPlanned) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  const Device device{Device::kCuda};
  const ModelSpec spec = mixed_spec();
  LoadedModel loaded = fresh_model(spec, 3, 0.2);
  MemoryRequest request = request_for(spec, int64_t{6} << 30);  // others may be here too
  request.device = device;
  request.weights = {.bytes = loaded.weights.bytes(), .narrow = false};
  request.engine.cache_values = Dtype::kF32;
  request.engine.max_sequences = 2048;
  const int64_t before = memory_use(device).bytes;
  const MemoryPlan plan = plan_memory(request);
  EXPECT_TRUE(plan.measured);
  EXPECT_EQ(memory_use(device).bytes, before);
  loaded.weights.move_to(*loaded.model, device);
  Engine engine(*loaded.model, plan.engine);
  engine.submit(request_of(400, 5, 1));
  while (engine.step()) {
  }
  const auto planned = static_cast<double>(plan.weights + plan.workspace.device + plan.cache.bytes);
  EXPECT_NEAR(static_cast<double>(memory_use(device).bytes - before), planned, 0.05 * planned);
  EXPECT_GT(plan.cache.bytes, 100 * kMiB);
}

TEST(MemoryPlan, DividesWhatThereIs) {
  const ModelSpec spec = mixed_spec();
  const int64_t total = int64_t{4} << 30;
  const MemoryPlan plan = plan_memory(request_for(spec, total));
  EXPECT_FALSE(plan.measured);
  EXPECT_EQ(plan.weights, 10 * kMiB);
  EXPECT_GE(plan.reserve, total / 64);
  EXPECT_EQ(plan.cache.sequences, 8);
  EXPECT_EQ(plan.longest, 512);
  EXPECT_GT(plan.left(), 0);
  EXPECT_EQ(plan.left(),
            total - plan.weights - plan.workspace.device - plan.reserve - plan.cache.bytes);
  EXPECT_THAT(plan.line(), AllOf(HasSubstr("weights 10.0 MiB"), HasSubstr("workspace about"),
                                 HasSubstr("8 sequences at once of 4096 tokens in all")));
  // The cache that is made of it takes what was planned, and more sequences take more workspace.
  const Model model(spec);
  CacheConfig config = cache_config(plan.engine);
  EXPECT_EQ(CachePlan(model, config).sizes().bytes, plan.cache.bytes);
  MemoryRequest more = request_for(spec, total);
  more.engine.max_sequences = 64;
  EXPECT_GT(plan_memory(more).cache.bytes, plan.cache.bytes);
  EXPECT_GE(plan_memory(more).workspace.device, plan.workspace.device);
}

TEST(MemoryPlan, GivesTheCacheWhatIsLeft) {
  const ModelSpec spec = mixed_spec();
  MemoryRequest request = request_for(spec, 512 * kMiB);
  request.engine.max_sequences = 4096;
  const MemoryPlan plan = plan_memory(request);
  EXPECT_LT(plan.cache.pages * plan.engine.page_size, 4096 * 512);
  EXPECT_GE(plan.left(), 0);
  EXPECT_LT(plan.left(), 2 * CachePlan(Model(spec), cache_config(plan.engine)).least_bytes());
  request.engine.memory_bytes = 5 * kMiB;
  const MemoryPlan limited = plan_memory(request);
  EXPECT_LE(limited.cache.bytes, 5 * kMiB);
  EXPECT_GT(limited.cache.bytes, 4 * kMiB);
  EXPECT_GT(limited.left(), plan.left());
}

TEST(MemoryPlan, HoldsAsManyTokensInPagesOfAnySize) {
  const ModelSpec spec = mixed_spec();
  for (const auto& [asked, taken] : {std::pair{0, 256}, {16, 16}, {64, 64}, {256, 256}}) {
    SCOPED_TRACE(asked);
    MemoryRequest request = request_for(spec, int64_t{1} << 30);
    request.engine.page_size = asked;
    const MemoryPlan plan = plan_memory(request);
    EXPECT_EQ(plan.engine.page_size, taken);
    EXPECT_EQ(plan.cache.pages * taken, 8 * 512);
    EXPECT_EQ(plan.longest, 512);
    EXPECT_EQ(CachePlan(Model(spec), cache_config(plan.engine)).sizes().bytes, plan.cache.bytes);
  }
}

TEST(MemoryPlan, NamesThePartsThatLeaveNoRoom) {
  const ModelSpec spec = mixed_spec();
  MemoryRequest request = request_for(spec, 312 * kMiB);
  EXPECT_THAT([&] { plan_memory(request); },
              ThrowsMessage<Error>(AllOf(HasSubstr("weights 10.0 MiB"), HasSubstr("workspace"),
                                         HasSubstr("reserve 256 MiB"), HasSubstr("of 312 MiB"),
                                         HasSubstr("a sequence takes at least"),
                                         HasSubstr("--storage bf16"))));
  request = request_for(spec, int64_t{1} << 30);
  request.engine.memory_bytes = int64_t{1} << 30;
  EXPECT_THAT([&] { plan_memory(request); },
              ThrowsMessage<Error>(HasSubstr("1.0 GiB of cache were asked for")));
  request.total_bytes = 0;
  EXPECT_THAT([&] { plan_memory(request); }, ThrowsMessage<Error>(HasSubstr("--memory-total")));
}

// The same activations, counted without memory and taken in a step of the CPU; the CPU's kernels
// take scratch beside.
TEST(MemoryPlan, CountsWhatAStepTakes) {
  const ModelSpec spec = mixed_spec();
  EngineConfig config;
  config.max_sequences = 6;
  config.prefill_chunk = 256;
  config.prefill_tokens = 1024;
  const int64_t before = memory_use(Device::kCpu).bytes;
  const WorkspaceBytes counted = count_workspace(spec, false, config);
  const WorkspaceBytes measured = measure_workspace(spec, false, config, Device::kCpu, 1);
  EXPECT_EQ(memory_use(Device::kCpu).bytes, before);
  EXPECT_LE(counted.device, measured.device);
  EXPECT_GE(counted.device, (measured.device - 16 * kMiB) / 3);
  EXPECT_LT(count_workspace(spec, true, config).device, counted.device) << "bf16 takes less";
}

TEST(WeightSizes, AreThoseOfTheLoadedModel) {
  for (const char* name : {"llama", "apriel_h1"}) {
    const std::string dir = std::string(kSourceDir) + "/tests/fixtures/" + name;
    for (const MatrixStorage storage :
         {MatrixStorage::kF32, MatrixStorage::kBF16, MatrixStorage::kStored}) {
      const WeightSizes sizes = weight_sizes(dir, storage);
      EXPECT_EQ(sizes.bytes, load_model(dir, {.storage = storage}).weights.bytes()) << name;
    }
    EXPECT_TRUE(weight_sizes(dir, MatrixStorage::kBF16).narrow);
    EXPECT_FALSE(weight_sizes(dir, MatrixStorage::kF32).narrow);
    // Without weights beside it, as random ones are made.
    EXPECT_EQ(weight_sizes(dir + "/config.json", MatrixStorage::kStored).bytes,
              weight_sizes(dir, MatrixStorage::kF32).bytes);
  }
}

}  // namespace
}  // namespace cambium
