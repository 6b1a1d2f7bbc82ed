// Turning and writing at once leaves what rope() and attention() leave one after the other, to the
// bit.
#include "ops/turned_write/turned_write.h"

#include "ops/cuda_shapes_testing.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  const char* name;
  int64_t heads, kv_heads, dim, value_dim, turned;
  double query_beta = 0.0;
  Dtype pages = Dtype::kF32;  // beside f32; bf16 beside bf16
  int64_t window = 0;         // above 0: the first token's first page has been given back
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

constexpr int64_t kPageSize = 4;

// Three tokens, the second of which begins its sequence, over pages in no order.
OwnedSegments three_tokens() {
  return {{0, 1, 2, 3}, {6, 0, 3}, {0, 1, 2}};
}
const std::vector<int32_t> kTable{5, 2, 0, -1, 4, -1};

struct WriteRun {
  std::vector<double> q, y, keys, values;
};

WriteRun run(const Case& c, Device device, Dtype type, bool whole) {
  Workspace workspace(device);
  const WorkspaceScope scope(workspace);
  Context ctx = workspace.context(type);
  const Dtype of_pages = type == Dtype::kF32 ? c.pages : type;
  std::vector<OwnedTensor> owned;
  const auto drawn = [&](Dtype dtype, std::initializer_list<int64_t> shape, uint64_t seed) {
    owned.emplace_back(dtype, shape, false, device);
    put(owned.back().view, as_stored(draw({{std::vector<int64_t>(shape)}}, seed)[0], dtype));
    return owned.back().view;
  };
  const Tensor q = drawn(type, {3, c.heads, c.dim}, 1);
  const Tensor k = drawn(type, {3, c.kv_heads, c.dim}, 2);
  const Tensor v = drawn(type, {3, c.kv_heads, c.value_dim}, 3);
  KvPages pages;
  pages.keys = drawn(of_pages, {6, kPageSize, c.kv_heads, c.dim}, 4);
  pages.values = drawn(of_pages, {6, kPageSize, c.kv_heads, c.value_dim}, 5);
  std::vector<int32_t> page_table = kTable;
  page_table[0] = c.window > 0 ? -1 : page_table[0];
  pages.table = page_table;
  pages.pages_per_segment = 2;
  const OwnedSegments segments = three_tokens();
  RopeTable table({.dim = c.turned, .original_length = 4, .query_beta = c.query_beta});
  table.ensure(16);
  const Turns turns = table.turns(ctx, segments.view());
  const AttentionConfig config{.scale = 0.3F, .window = c.window};
  EXPECT_EQ(turned_write_serves(ctx, k, turns, segments.view(), pages),
            device.kind == Device::kCuda);
  WriteRun result;
  if (whole) {
    const Tensor turned = turned_write(ctx, q, k, v, turns, segments.view(), pages);
    pages.written = true;
    result.y = take(attention(ctx, turned, k, v, segments.view(), config, &pages));
    result.q = take(turned);
  } else {
    const auto turned = rope(ctx, q, k, turns);
    result.y = take(attention(ctx, turned[0], turned[1], v, segments.view(), config, &pages));
    result.q = take(turned[0]);
  }
  result.keys = take(pages.keys);
  result.values = take(pages.values);
  return result;
}

class TurnedWriteOf : public ::testing::TestWithParam<Case> {};

TEST_P(TurnedWriteOf, LeavesWhatRopeAndAttentionLeave) {
  std::vector<std::pair<Device, Dtype>> rows{{{}, Dtype::kF64}};
  if (on_cuda()) {
    rows.insert(rows.end(), {{Device::kCuda, Dtype::kF32}, {Device::kCuda, Dtype::kBF16}});
  }
  for (const auto& [device, type] : rows) {
    if (type == Dtype::kF64 && GetParam().pages != Dtype::kF32) {
      continue;
    }
    SCOPED_TRACE(device.describe() + " " + dtype_name(type));
    const WriteRun whole = run(GetParam(), device, type, true);
    const WriteRun turns = run(GetParam(), device, type, false);
    EXPECT_EQ(whole.q, turns.q);
    EXPECT_EQ(whole.keys, turns.keys);
    EXPECT_EQ(whole.values, turns.values);
    EXPECT_EQ(whole.y, turns.y);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, TurnedWriteOf,
    ::testing::Values(Case{"grouped", 14, 2, 64, 64, 64}, Case{"part_turns", 4, 4, 64, 32, 16},
                      Case{"odd", 3, 1, 10, 7, 6}, Case{"queries_grow", 4, 2, 128, 128, 128, 0.5},
                      Case{"narrow_pages", 4, 2, 64, 64, 64, 0.0, Dtype::kBF16},
                      Case{"behind_a_window", 4, 2, 64, 64, 64, 0.0, Dtype::kF32, 2}),
    ::testing::PrintToStringParamName());

TEST(TurnedWrite, NamesWhatIsWrong) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const OwnedSegments segments = three_tokens();
  RopeTable table({.dim = 8});
  table.ensure(16);
  const Turns turns = table.turns(ctx, segments.view());
  const auto x = [&](int64_t heads, int64_t dim) {
    return arena.empty(Dtype::kF32, {3, heads, dim});
  };
  KvPages pages;
  pages.keys = pages.values = arena.empty(Dtype::kF32, {6, kPageSize, 2, 8});
  pages.table = kTable;
  pages.pages_per_segment = 2;
  const auto message = [&](const Tensor& q, const Tensor& k, const Tensor& v) {
    return error_of([&] { turned_write(ctx, q, k, v, turns, segments.view(), pages); });
  };
  EXPECT_EQ(
      message(x(4, 6), x(2, 6), x(2, 8)),
      "[turned_write] expected q and k of 3 tokens and at least 8 dims (those that turn), got "
      "f32 (3, 4, 6) and f32 (3, 2, 6)");
  EXPECT_EQ(message(x(4, 8), x(1, 8), x(2, 8)),
            "[turned_write] expected cached keys f32 (pages, page_size, 1, 8), got f32 (6, 4, 2, "
            "8)");
  pages.pages_per_segment = 3;
  EXPECT_EQ(message(x(4, 8), x(2, 8), x(2, 8)),
            "[turned_write] expected a page table (3, 3), got 6 entries");
  pages.pages_per_segment = 2;
  const std::vector<int32_t> gone{5, -1, 0, -1, 4, -1};
  pages.table = gone;
  EXPECT_EQ(message(x(4, 8), x(2, 8), x(2, 8)),
            "[turned_write] segment 0 needs page 1 of its table, which names -1 of 6 pages");
}

}  // namespace
}  // namespace cambium
