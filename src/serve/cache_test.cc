#include "serve/cache.h"

#include <gtest/gtest.h>
#include <algorithm>

#include <cmath>
#include <set>

#include "model/weights.h"

namespace cambium {
namespace {

/// Attention, a window of 20 behind so many sinks, and Mamba-2.
ModelSpec spec(int64_t sinks = 0) {
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
  windowed.set("sinks", sinks);
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

TEST(CachePlan, CountsThePagesOfSinks) {
  const CachePlan without(Model(spec()), kConfig);
  for (const auto& [sinks, pages] : {std::pair{1, 1}, {8, 1}, {9, 2}, {64, 8}}) {
    SCOPED_TRACE(sinks);
    const CachePlan plan(Model(spec(sinks)), kConfig);
    const int64_t page = 8 * 16 * 4;
    // The pages of a sequence that is all within the window are those it has anyway.
    EXPECT_EQ(plan.sequence_bytes(40), without.sequence_bytes(40));
    EXPECT_EQ(plan.sequence_bytes(400), without.sequence_bytes(400) + pages * page);
    EXPECT_EQ(plan.fixed_bytes(), without.fixed_bytes() + sinks * 16 * 4);
    EXPECT_EQ(plan.lasting_bytes_per_token(), without.lasting_bytes_per_token());
    EXPECT_EQ(plan.sizes().bytes, without.sizes().bytes + 3 * pages * page);
  }
  // Windows with and without sinks have tables of their own.
  ModelSpec both = spec(4);
  both.layers.push_back(spec().layers[1]);
  both.layers.push_back(spec(4).layers[1]);
  EXPECT_EQ(CachePlan(Model(both), kConfig).groups().size(), 3U);
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

TEST(CachePlan, APageTakesItsBytes) {
  struct Row {
    int64_t kv_heads, dim;
    Dtype values;
    int64_t asked, tokens;
  };
  const Row rows[] = {
      {8, 128, Dtype::kBF16, 0, 16},    // 64 KiB
      {8, 128, Dtype::kF8E4M3, 0, 32},  // 65 KiB
      {4, 128, Dtype::kBF16, 0, 32},
      {2, 64, Dtype::kBF16, 0, 128},
      {2, 64, Dtype::kF32, 0, 64},
      {1, 8, Dtype::kBF16, 0, 256},  // no more, whatever a token takes
      {2, 64, Dtype::kBF16, 16, 16},
      {2, 64, Dtype::kBF16, 48, 48},
      {8, 128, Dtype::kBF16, 1024, 1024},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(fmt::format("{} heads of {} in {}, {} asked", row.kv_heads, row.dim,
                             dtype_name(row.values), row.asked));
    ModelSpec one = spec();
    one.layers = {decoder_layer(
        {"attention", {{"heads", row.kv_heads}, {"kv_heads", row.kv_heads}, {"head_dim", row.dim}}},
        16)};
    CacheConfig config = kConfig;
    config.values = row.values;
    config.page_size = row.asked;
    const CachePlan plan(Model(one), config);
    EXPECT_EQ(plan.config().page_size, row.tokens);
    EXPECT_EQ(plan.sequence_bytes(1), row.tokens * plan.bytes_per_token());
    EXPECT_EQ(plan.sequence_bytes(row.tokens + 1), 2 * row.tokens * plan.bytes_per_token());
  }
  // The narrowest layer decides, and states in slots do not.
  CacheConfig config = kConfig;
  config.page_size = 0;
  EXPECT_EQ(CachePlan(Model(spec()), config).config().page_size, kMostPage);
  ModelSpec states = spec();
  states.layers = {spec().layers[2]};
  EXPECT_EQ(CachePlan(Model(states), config).config().page_size, kLeastPage);
  config.page_size = -1;
  EXPECT_THROW(CachePlan(Model(spec()), config), Error);
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

/// The pages that a table of one sequence names, in the order of its tokens.
std::vector<int32_t> row_of(const UnitState& state) {
  return {state.table.begin(), state.table.begin() + state.pages_per_segment};
}

// Sinks within a page, a whole page and more; pieces of a page, of no whole number of pages and of
// one token.
TEST_P(CachePages, OfSinksStayWhileThoseBehindThemGoToOthers) {
  for (const int64_t sinks : {3, 8, 9, 30}) {
    for (const int64_t piece : {1, 8, 13}) {
      SCOPED_TRACE(fmt::format("{} sinks, pieces of {}", sinks, piece));
      const LoadedModel loaded = fresh_model(spec(sinks), 1);
      CacheConfig config = kConfig;
      config.values = GetParam();
      Cache cache(*loaded.model, config);
      Arena arena;
      const int64_t sink_pages = (sinks + 7) / 8;
      const int64_t slot = cache.open(120);
      const int64_t other = cache.open(120);
      std::vector<int32_t> first;
      std::set<int32_t> held;
      for (int64_t position = 0; position + piece <= 120; position += piece) {
        Batch batch;
        batch.add(std::vector<int32_t>(static_cast<size_t>(piece), 3), position, slot);
        const ArenaScope scope(arena);
        Context ctx{.arena = &arena};
        ForwardOptions options;
        options.states = cache.prepare(batch);
        const Tensor hidden = loaded.model->forward(ctx, batch, options);
        for (int64_t i = 0; i < hidden.numel(); ++i) {
          ASSERT_TRUE(std::isfinite(hidden.ptr<float>()[i])) << position;
        }
        const std::vector<int32_t> row = row_of(options.states[1]);
        const int64_t reach = std::max<int64_t>(0, position - 19) / 8;
        for (int64_t p = 0; p * 8 < position + piece; ++p) {
          const int32_t page = row[static_cast<size_t>(p)];
          EXPECT_EQ(page >= 0, p < sink_pages || p >= reach) << position << " page " << p;
          held.insert(page);
        }
        if (position == 0) {
          first = row;
        }
        EXPECT_EQ(row.front(), first.front());
      }
      // Another sequence takes what was given back, and nothing of the first.
      const std::vector<int32_t> mine = row_of(cache.prepare([&] {
        Batch last;
        last.add(std::vector<int32_t>{3}, 119, slot);
        return last;
      }())[1]);
      std::set<int32_t> kept(mine.begin(), mine.end());
      kept.erase(-1);
      Batch batch;
      batch.add(std::vector<int32_t>(16, 3), 0, other);
      const std::vector<int32_t> theirs = row_of(cache.prepare(batch)[1]);
      bool again = false;
      for (const int32_t page : theirs) {
        EXPECT_EQ(kept.count(page), 0U);
        again = again || (page >= 0 && held.count(page) > 0);
      }
      EXPECT_TRUE(again);
      cache.close(slot);
      cache.close(other);
      EXPECT_EQ(cache.pages_in_use(), 0);
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
