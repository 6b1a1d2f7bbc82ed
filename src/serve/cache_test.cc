#include "serve/cache.h"

#include <gtest/gtest.h>
#include <algorithm>

#include <cmath>

#include "model/weights.h"

namespace cambium {
namespace {

/// Attention, a window of 20 and Mamba-2.
ModelSpec spec() {
  ModelSpec spec;
  spec.family = "cambium";
  spec.vocab = 40;
  spec.width = 16;
  spec.rope = {.dim = 8};
  spec.max_positions = 400;
  const Options attention{
      {"heads", int64_t{2}}, {"kv_heads", int64_t{1}}, {"head_dim", int64_t{8}}};
  Options windowed = attention;
  windowed.set("window", int64_t{20});
  spec.layers = {decoder_layer({"attention", attention}, 16),
                 decoder_layer({"sliding_window", windowed}, 16),
                 decoder_layer({"mamba2",
                                {{"heads", int64_t{2}},
                                 {"head_dim", int64_t{8}},
                                 {"state", int64_t{4}},
                                 {"b_heads", int64_t{1}}}},
                               16)};
  return spec;
}

constexpr CacheConfig kConfig{
    .max_sequences = 3, .page_size = 8, .piece_tokens = 16, .values = Dtype::kF32};

bool all_nan(const Tensor& t, int64_t row) {
  const int64_t n = t.numel() / t.dim(0);
  if (t.dtype == Dtype::kF8E4M3) {
    const f8e4m3* p = t.ptr<f8e4m3>() + row * n;
    return std::all_of(p, p + n, [](f8e4m3 x) { return std::isnan(widen(x)); });
  }
  if (t.dtype == Dtype::kBF16) {
    const bf16* p = t.ptr<bf16>() + row * n;
    return std::all_of(p, p + n, [](bf16 x) { return std::isnan(widen(x)); });
  }
  const float* p = t.ptr<float>() + row * n;
  return std::all_of(p, p + n, [](float x) { return std::isnan(x); });
}

TEST(CachePlan, CountsBytesBeforeAnythingIsLoaded) {
  const Model model(spec());
  const CachePlan plan(model, kConfig);
  ASSERT_EQ(plan.groups().size(), 2U);
  EXPECT_EQ(plan.bytes_per_token(), 2 * (8 + 8) * 4);
  EXPECT_EQ(plan.lasting_bytes_per_token(), (8 + 8) * 4);
  // Convolution tail of 16 + 4 + 4 channels, 3 inputs each; state 2 x 4 x 8.
  EXPECT_EQ(plan.slot_bytes(), (24 * 3 + 64) * 4);
  const int64_t page = 8 * 16 * 4;
  EXPECT_EQ(plan.sequence_bytes(1), plan.slot_bytes() + 2 * page);
  EXPECT_EQ(plan.sequence_bytes(9), plan.slot_bytes() + 4 * page);
  // The window keeps ceil((19 + 16) / 8) + 1 pages at most.
  EXPECT_EQ(plan.sequence_bytes(400), plan.slot_bytes() + (50 + 6) * page);
  EXPECT_EQ(plan.sequences_in(10 * plan.sequence_bytes(100) + 5, 100), 10);
  EXPECT_EQ(plan.longest_in(plan.sequence_bytes(200), 400), 200);
  EXPECT_EQ(plan.longest_in(plan.slot_bytes(), 400), 0);
}

TEST(CachePlan, CountsTheBytesOfTheTypeAsked) {
  const Model model(spec());
  CacheConfig narrow = kConfig;
  narrow.values = Dtype::kBF16;
  const CachePlan wide(model, kConfig);
  const CachePlan halved(model, narrow);
  EXPECT_EQ(halved.bytes_per_token(), wide.bytes_per_token() / 2);
  EXPECT_EQ(halved.slot_bytes(), wide.slot_bytes());  // states stay fp32
  narrow.values = Dtype::kF8E4M3;
  const CachePlan least(model, narrow);
  // Half as much again, and a scale of two bytes for each row of a key or value.
  EXPECT_EQ(least.bytes_per_token(), halved.bytes_per_token() / 2 + 2 * 2 * 2);
  EXPECT_EQ(least.slot_bytes(), wide.slot_bytes());
  narrow.values = Dtype::kF64;
  EXPECT_THROW(CachePlan(model, narrow), Error);
}

class CachePages : public ::testing::TestWithParam<Dtype> {};

TEST_P(CachePages, AreTakenGivenBackAndPoisoned) {
  const LoadedModel loaded = fresh_model(spec(), 1);
  CacheConfig config = kConfig;
  config.values = GetParam();
  Cache cache(*loaded.model, config);
  Arena arena;
  const std::vector<int32_t> tokens(16, 3);
  const int64_t slot = cache.open(128);
  for (int64_t position = 0; position < 128; position += 16) {
    Batch batch;
    batch.add(tokens, position, slot);
    const ArenaScope scope(arena);
    Context ctx{.arena = &arena};
    ForwardOptions options;
    options.states = cache.prepare(batch);
    const Tensor hidden = loaded.model->forward(ctx, batch, options);
    for (int64_t i = 0; i < hidden.numel(); ++i) {
      ASSERT_TRUE(std::isfinite(hidden.ptr<float>()[i])) << position;
    }
    const auto pages = [&](size_t layer) {
      const auto table = options.states[layer].table;
      return std::count_if(table.begin(), table.end(), [](int32_t p) { return p >= 0; });
    };
    EXPECT_EQ(pages(0), (position + 16) / 8);
    EXPECT_LE(pages(1), 6);
  }
  Batch none;
  const auto states = cache.prepare(none);
  EXPECT_FALSE(all_nan(states[2].slots[1], slot));
  cache.close(slot);
  EXPECT_EQ(cache.pages_in_use(), 0);
  for (const Tensor& part : states[2].slots) {
    EXPECT_TRUE(all_nan(part, slot));
  }
  for (const size_t layer : {0U, 1U}) {
    EXPECT_EQ(states[layer].pages[0].dtype, GetParam());
    for (const Tensor& t : states[layer].pages) {
      for (int64_t page = 0; page < t.dim(0); ++page) {
        EXPECT_TRUE(all_nan(t, page)) << layer << " " << page;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, CachePages,
                         ::testing::Values(Dtype::kF32, Dtype::kBF16, Dtype::kF8E4M3),
                         [](const auto& row) { return dtype_name(row.param); });

TEST(Cache, RoomIsSetAsideForTheWholeSequence) {
  const Model model(spec());
  Cache cache(model, kConfig);
  const int64_t a = cache.open(400);
  const int64_t b = cache.open(1);
  const int64_t c = cache.open(400);
  EXPECT_GE(c, 0);
  EXPECT_EQ(cache.open(1), -1);  // three slots
  cache.close(b);
  EXPECT_EQ(cache.open(10), b);
  cache.close(a);
  EXPECT_THROW(cache.open(401), Error);

  CacheConfig small = kConfig;
  small.memory_bytes = 2 * CachePlan(model, kConfig).sequence_bytes(400);
  Cache tight(model, small);
  EXPECT_GE(tight.open(400), 0);
  EXPECT_GE(tight.open(300), 0);
  EXPECT_EQ(tight.open(300), -1);
}

TEST(Cache, RoomGrowsWhileThereIsSome) {
  const Model model(spec());
  CacheConfig small = kConfig;
  const CachePlan plan(model, kConfig);
  small.memory_bytes = 2 * plan.sequence_bytes(400);
  Cache cache(model, small);
  const int64_t a = cache.open(10);
  const int64_t b = cache.open(300);
  EXPECT_TRUE(cache.extend(a, 5));  // never less than there was
  EXPECT_TRUE(cache.extend(a, 400));
  EXPECT_TRUE(cache.extend(a, 400));
  EXPECT_FALSE(cache.extend(b, 400));
  EXPECT_EQ(cache.open(300), -1);
  cache.close(a);
  EXPECT_TRUE(cache.extend(b, 400));
  EXPECT_THROW(cache.extend(b, 401), Error);
  cache.close(b);
  // All that was set aside is given back: as much fits as at first, and no more.
  EXPECT_GE(cache.open(400), 0);
  EXPECT_GE(cache.open(300), 0);
  EXPECT_EQ(cache.open(300), -1);
}

}  // namespace
}  // namespace cambium
