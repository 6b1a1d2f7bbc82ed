// How attention's work is cut for CUDA: lists of tiles, made from the host's arrays once for all
// layers of a forward call and copied to the device, as are the segments and the page table.
#include <algorithm>
#include <utility>

#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cudnn.h"

namespace cambium::cuda::attention {
namespace {

/// Blocks that fill the largest devices once or twice; where a segment has fewer tiles, keys are
/// split.
constexpr int64_t kBlocksWanted = 256;
/// The fewest keys of a split: below, what it costs to begin and to add parts is felt.
constexpr int64_t kDecodeSplit = 256;
constexpr int64_t kPrefillSplit = 1024;
constexpr int64_t kMaxSplits = 128;
/// Keys of a part where parts are fixed: enough that adding them up is not felt, and few enough
/// that a long sequence alone is taken by many blocks.
constexpr int64_t kFixedSplit = 512;

/// Host arrays one after the other in one copy on the device.
class Upload {
 public:
  template <class Item>
  int64_t add(const Item* items, int64_t count) {
    static_assert(sizeof(Item) % sizeof(int32_t) == 0);
    const auto at = static_cast<int64_t>(words_.size());
    const auto* from = reinterpret_cast<const int32_t*>(items);
    words_.insert(words_.end(), from,
                  from + count * static_cast<int64_t>(sizeof(Item) / sizeof(int32_t)));
    return at;
  }
  template <class Item>
  int64_t add(const std::vector<Item>& items) {
    return add(items.data(), static_cast<int64_t>(items.size()));
  }
  DeviceArray copy(const Launch& on) const {
    return {words_.data(), static_cast<int64_t>(words_.size() * sizeof(int32_t)), on};
  }

 private:
  std::vector<int32_t> words_;
};

template <class Item>
List<Item> list_at(const DeviceArray& memory, int64_t at, const std::vector<Item>& items) {
  return {reinterpret_cast<const Item*>(memory.as<int32_t>() + at),
          static_cast<int64_t>(items.size())};
}

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

int32_t narrow(int64_t n) {
  return static_cast<int32_t>(n);
}

/// The positions of the first and of the last of rows [row, row + rows) of a segment.
std::pair<int64_t, int64_t> positions_of(const AttentionShape& shape, int64_t s, int64_t row,
                                         int64_t rows) {
  const int64_t last = std::min(row + rows, shape.length(s) * shape.group()) - 1;
  const int64_t position = shape.first_position(s);
  return {position + row / shape.group(), position + last / shape.group()};
}

/// The tile of rows [row, row + rows) of a segment with all keys they see.
Tile whole_tile(const AttentionShape& shape, int64_t s, int64_t row, int64_t rows) {
  const auto [first, last] = positions_of(shape, s, row, rows);
  const SeenKeys seen = shape.seen_keys(first, last);
  return {narrow(s), narrow(row), narrow(seen.first), narrow(seen.end), -1, narrow(seen.sinks)};
}

/// The same for the kernel of few rows, a tile for each range of keys.
void add_ranges(const AttentionShape& shape, int64_t s, int64_t row, int64_t rows,
                std::vector<Tile>& tiles) {
  const auto [first, last] = positions_of(shape, s, row, rows);
  for (const KeyRange& keys : shape.key_ranges(first, last)) {
    tiles.push_back({narrow(s), narrow(row), narrow(keys.first), narrow(keys.end), -1, 0});
  }
}
bool same_rows(const Tile& a, const Tile& b) {
  return a.segment == b.segment && a.first_row == b.first_row;
}

/// Adds the tile, its keys in parts of `split` (from multiples of it) if they are more than one;
/// the first has the sinks.
void add_parts(const Tile& tile, int64_t split, std::vector<Tile>& tiles, std::vector<Parts>& parts,
               int64_t& partials) {
  const int64_t first = tile.first_key / split;
  const int64_t count = ceil_div(tile.end_key, split) - first;
  if (count == 1) {
    tiles.push_back(tile);
    return;
  }
  parts.push_back(
      {tile.segment, tile.first_row, static_cast<int32_t>(partials), static_cast<int32_t>(count)});
  for (int64_t i = first; i < first + count; ++i) {
    Tile part = tile;
    part.first_key = std::max(tile.first_key, static_cast<int32_t>(i * split));
    part.end_key = static_cast<int32_t>(std::min<int64_t>(tile.end_key, (i + 1) * split));
    part.partial = static_cast<int32_t>(partials++);
    part.sinks = i == first ? tile.sinks : 0;
    tiles.push_back(part);
  }
}

/// The longest first, so that none is left to run alone at the end.
void longest_first(std::vector<Tile>& tiles) {
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
    return a.sinks + a.end_key - a.first_key > b.sinks + b.end_key - b.first_key;
  });
}

/// The keys of row tiles of few rows, for the blocks that share them.
struct Shared {
  std::vector<Piece> pieces;
  std::vector<int32_t> first_piece{0};
  int32_t parts = 0;

  /// Makes sizes those of all steps over as many row tiles, so that they are queued alike: blocks
  /// with no piece, and more places for partial results than there are parts.
  void same_sizes(size_t tiles, int64_t blocks, int64_t& partials) {
    constexpr int64_t kTogether = 128;
    if (pieces.empty()) {
      return;
    }
    first_piece.resize(static_cast<size_t>(blocks) + 1, first_piece.back());
    parts = static_cast<int32_t>(tiles);
    partials = ceil_div(std::max<int64_t>(partials, 1), kTogether) * kTogether;
  }
};

int64_t units_of(const Tile& t) {
  return ceil_div(t.end_key, kKeys) - t.first_key / kKeys;
}

/// Makes the pieces of a row tile, which follow each other, its parts: they are added up where they
/// are more than one.
void join_pieces(Shared& all, int64_t& partials) {
  for (size_t first = 0; first < all.pieces.size();) {
    size_t end = first + 1;
    while (end < all.pieces.size() && same_rows(all.pieces[first].tile, all.pieces[end].tile)) {
      ++end;
    }
    const auto count = static_cast<int64_t>(end - first);
    for (size_t i = first; count > 1 && i < end; ++i) {
      all.pieces[i].tile.partial = narrow(partials + static_cast<int64_t>(i - first));
      all.pieces[i].parts = all.parts;
      all.pieces[i].first_partial = narrow(partials);
      all.pieces[i].count = narrow(count);
    }
    partials += count > 1 ? count : 0;
    all.parts += count > 1 ? 1 : 0;
    first = end;
  }
}

/// The tiles of kKeys that a block takes at least where the longest row tile has so many: a part
/// costs the block that adds them up a thirteenth of what a tile costs the blocks that read them
/// beside each other, so that n / share / 13 + share is the least there is.
int64_t least_share(int64_t longest) {
  constexpr int64_t kPartsOfTile = 13;
  int64_t share = 1;
  while ((share + 1) * (share + 1) * kPartsOfTile <= longest) {
    ++share;
  }
  return share;
}

/// The tiles of kKeys of the longest row tile that one block takes as soon as several would: a part
/// is written, told and counted before its sums are read, four accesses of the device's memory one
/// after the other, in which a block alone reads about as many tiles.
constexpr int64_t kUncut = 5;

/// Divides the tiles' keys, in tiles of kKeys, evenly among `blocks` blocks: block after block
/// takes its share, and a tile that does not end with the block goes on in the next. But a cut
/// costs about what kKeys keys do: where the end of a tile is as near, and shares are larger by
/// far, a block ends there. Short tiles are not cut where there are blocks enough.
Shared share_keys(const std::vector<Tile>& tiles, int64_t blocks, int64_t& partials) {
  int64_t rest = 0;
  for (const Tile& t : tiles) {
    rest += units_of(t);
  }
  int64_t longest = 0;
  for (const Tile& t : tiles) {
    longest = std::max(longest, units_of(t));
  }
  const bool whole = longest <= kUncut && ceil_div(rest, blocks) <= longest;
  const int64_t share = whole ? longest : std::max(ceil_div(rest, blocks), least_share(longest));
  const int64_t slack = share >= 8 ? 1 : 0;
  Shared all;
  int64_t left = 0;  // of the share of the block in hand; 0: the next begins
  const auto done = [&] { return static_cast<int64_t>(all.first_piece.size()) - 1; };
  for (const Tile& t : tiles) {
    const int64_t end = t.first_key / kKeys + units_of(t);
    if (whole && left > 0 && left < units_of(t)) {
      all.first_piece.push_back(static_cast<int32_t>(all.pieces.size()));
      left = 0;
    }
    for (int64_t at = t.first_key / kKeys; at < end;) {
      const int64_t blocks_left = blocks - done();
      if (left == 0) {
        left = std::max(share, ceil_div(rest, blocks_left));
      }
      const int64_t take = end - at <= left + slack ? end - at : left;
      Piece piece{t, -1, 0, 1};
      piece.tile.first_key = std::max(t.first_key, static_cast<int32_t>(at * kKeys));
      piece.tile.end_key = static_cast<int32_t>(std::min<int64_t>(t.end_key, (at + take) * kKeys));
      all.pieces.push_back(piece);
      at += take;
      rest -= take;
      left -= take;
      if (left <= 0 || (at == end && left <= slack && blocks_left > 1)) {
        all.first_piece.push_back(static_cast<int32_t>(all.pieces.size()));
        left = 0;
      }
    }
  }
  if (left > 0) {
    all.first_piece.push_back(static_cast<int32_t>(all.pieces.size()));
  }
  join_pieces(all, partials);
  return all;
}

/// Cuts every tile's keys where its sequence alone says, at multiples of kFixedSplit, and deals the
/// pieces in their order to `blocks` blocks: who takes a piece does not change its results.
Shared fix_parts(const std::vector<Tile>& tiles, int64_t blocks, int64_t& partials) {
  Shared all;
  int64_t total = 0;
  for (const Tile& t : tiles) {
    for (int64_t at = t.first_key; at < t.end_key;) {
      const int64_t end = std::min<int64_t>(t.end_key, (at / kFixedSplit + 1) * kFixedSplit);
      Piece piece{t, -1, 0, 1};
      piece.tile.first_key = static_cast<int32_t>(at);
      piece.tile.end_key = static_cast<int32_t>(end);
      all.pieces.push_back(piece);
      total += units_of(piece.tile);
      at = end;
    }
  }
  join_pieces(all, partials);
  const auto count = static_cast<int64_t>(all.pieces.size());
  int64_t before = 0;  // of what the pieces before have
  int64_t block = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = count <= blocks ? i : before * blocks / total;
    if (own > block) {
      all.first_piece.push_back(static_cast<int32_t>(i));
      block = own;
    }
    before += units_of(all.pieces[static_cast<size_t>(i)].tile);
  }
  if (count > 0) {
    all.first_piece.push_back(static_cast<int32_t>(count));
  }
  return all;
}

struct ForwardPlan {
  struct Key {
    int64_t heads, kv_heads, window, sinks;
    bool paged;  // else every segment stands at position 0
    Cut cut;
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray memory;
  TileLists lists;
};

ForwardPlan forward_plan(const AttentionShape& shape, const ForwardPlan::Key& key,
                         const Launch& on) {
  std::vector<Tile> many, few;
  std::vector<Parts> many_parts, few_parts;
  ForwardPlan plan{key, {}, {}};
  const Cut& cut = key.cut;
  for (int64_t s = 0; s < shape.segments; ++s) {
    const int64_t rows = shape.length(s) * shape.group();
    if (rows == 0 || (cut.gathered > 0 && is_long_piece(shape, s, cut.gathered))) {
      continue;
    }
    const bool decodes = !cut.training && is_few(shape, s);
    const int64_t tile_rows = decodes ? cut.few_rows : cut.many_rows;
    const int64_t end = shape.first_position(s) + shape.length(s);
    const int64_t keys = shape.seen_keys(s).count();
    const int64_t blocks = ceil_div(rows, tile_rows) * shape.kv_heads;
    const int64_t splits = std::clamp<int64_t>(kBlocksWanted / blocks, 1, kMaxSplits);
    const int64_t split = cut.training || splits == 1
                              ? power_of_two_from(end)
                              : std::max(decodes ? kDecodeSplit : kPrefillSplit,
                                         power_of_two_from(ceil_div(keys, splits)));
    for (int64_t row = 0; row < rows; row += tile_rows) {
      if (decodes && cut.blocks > 0) {
        add_ranges(shape, s, row, tile_rows, few);
        continue;
      }
      const Tile tile = whole_tile(shape, s, row, tile_rows);
      if (decodes) {
        add_parts(tile, split, few, few_parts, plan.lists.few_partials);
      } else {
        add_parts(tile, split, many, many_parts, plan.lists.many_partials);
      }
    }
  }
  longest_first(many);
  const auto most_rows = [&](const std::vector<Parts>& parts, int64_t tile_rows) {
    int64_t most = 0;
    for (const Parts& p : parts) {
      const int64_t rows = shape.length(p.segment) * shape.group() - p.first_row;
      most = std::max(most, std::min(rows, tile_rows));
    }
    return most;
  };
  plan.lists.many_parts_rows = most_rows(many_parts, cut.many_rows);
  plan.lists.few_parts_rows = most_rows(few_parts, cut.few_rows);
  Shared shared;
  if (cut.blocks > 0) {
    shared = cut.fixed_parts ? fix_parts(few, cut.blocks, plan.lists.few_partials)
                             : share_keys(few, cut.blocks, plan.lists.few_partials);
    shared.same_sizes(few.size(), cut.blocks, plan.lists.few_partials);
    few.clear();
  }
  Upload upload;
  const int64_t at[] = {
      upload.add(many),
      upload.add(few),
      upload.add(many_parts),
      upload.add(few_parts),
      upload.add(std::vector<int32_t>(static_cast<size_t>(shared.parts * shape.kv_heads))),
      upload.add(shared.first_piece),
      upload.add(shared.pieces)};
  plan.memory = upload.copy(on);
  plan.lists.pieces = list_at(plan.memory, at[6], shared.pieces);
  plan.lists.first_piece = list_at(plan.memory, at[5], shared.first_piece);
  plan.lists.done = plan.memory.as_mutable<unsigned>() + at[4];
  plan.lists.many = list_at(plan.memory, at[0], many);
  plan.lists.few = list_at(plan.memory, at[1], few);
  plan.lists.many_parts = list_at(plan.memory, at[2], many_parts);
  plan.lists.few_parts = list_at(plan.memory, at[3], few_parts);
  return plan;
}

struct BackwardPlan {
  struct Key {
    int64_t heads, kv_heads, window, sinks;
    int rows, keys;
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray memory;
  BackwardTiles tiles;
};

BackwardPlan backward_plan(const AttentionShape& shape, const BackwardPlan::Key& key,
                           const Launch& on) {
  std::vector<Tile> by_rows, by_keys;
  for (int64_t s = 0; s < shape.segments; ++s) {
    const int64_t length = shape.length(s);
    for (int64_t row = 0; row < length * shape.group(); row += key.rows) {
      by_rows.push_back(whole_tile(shape, s, row, key.rows));
    }
    for (int64_t first = 0; first < length; first += key.keys) {
      by_keys.push_back({narrow(s), narrow(first * shape.group()), narrow(first),
                         narrow(std::min(first + key.keys, length)), -1, 0});
    }
  }
  longest_first(by_rows);
  // Without a window the first keys are seen by the most queries.
  std::stable_sort(by_keys.begin(), by_keys.end(), [&](const Tile& a, const Tile& b) {
    return shape.length(a.segment) - a.first_key > shape.length(b.segment) - b.first_key;
  });
  Upload upload;
  const int64_t rows_at = upload.add(by_rows);
  const int64_t keys_at = upload.add(by_keys);
  BackwardPlan plan{key, upload.copy(on), {}};
  plan.tiles.rows = list_at(plan.memory, rows_at, by_rows);
  plan.tiles.keys = list_at(plan.memory, keys_at, by_keys);
  return plan;
}

/// A page table is known again by what it holds: callers fill the same memory anew.
struct PagesKey {
  const int32_t* table;
  int64_t entries;
  int64_t page_size;
  std::vector<int32_t> held;  // by the plan itself

  explicit PagesKey(const AttentionShape& shape)
      : table(shape.table),
        entries(table == nullptr ? 0 : shape.segments * shape.pages_per_segment),
        page_size(shape.page_size) {}
  void hold() { held.assign(table, table + entries); }
  bool operator==(const PagesKey& other) const {
    return entries == other.entries && page_size == other.page_size &&
           (table == nullptr) == (other.table == nullptr) &&
           std::equal(held.begin(), held.end(), other.table);
  }
};

/// Segments and page table on the device.
struct LayoutPlan {
  using Key = PagesKey;
  Key key;
  DeviceArray memory;
  const int32_t* start = nullptr;
  const int32_t* position = nullptr;
  const int32_t* table = nullptr;
};

LayoutPlan layout_plan(const AttentionShape& shape, PagesKey key, const Launch& on) {
  key.hold();
  Upload upload;
  const int32_t zero = 0;
  const int64_t start =
      shape.segments == 0 ? upload.add(&zero, 1) : upload.add(shape.start, shape.segments + 1);
  const std::vector<int32_t> zeros(static_cast<size_t>(shape.segments));
  const int64_t position =
      shape.position == nullptr ? upload.add(zeros) : upload.add(shape.position, shape.segments);
  const int64_t table = upload.add(key.held);
  LayoutPlan plan{std::move(key), upload.copy(on)};
  plan.start = plan.memory.as<int32_t>() + start;
  plan.position = plan.memory.as<int32_t>() + position;
  plan.table = shape.table == nullptr ? nullptr : plan.memory.as<int32_t>() + table;
  return plan;
}

/// The row of the pages of each token.
struct TokenRowsPlan {
  using Key = PagesKey;
  Key key;
  DeviceArray memory;
};

TokenRowsPlan token_rows_plan(const AttentionShape& shape, PagesKey key, const Launch& on) {
  key.hold();
  std::vector<int64_t> rows;
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t i = 0; i < shape.length(s); ++i) {
      rows.push_back(shape.key_row(s, shape.first_position(s) + i));
    }
  }
  return {std::move(key), {rows.data(), static_cast<int64_t>(rows.size() * sizeof(int64_t)), on}};
}

}  // namespace

TileLists forward_tiles(const AttentionShape& shape, const Cut& cut, const Launch& on) {
  const ForwardPlan::Key key = {
      shape.heads, shape.kv_heads, shape.window, shape.sinks, shape.position != nullptr, cut};
  const auto plan =
      plan_for<ForwardPlan>(shape.plans, key, [&] { return forward_plan(shape, key, on); });
  TileLists lists = plan->lists;
  lists.owner = plan;
  return lists;
}

BackwardTiles backward_tiles(const AttentionShape& shape, int rows, int keys, const Launch& on) {
  const BackwardPlan::Key key = {shape.heads, shape.kv_heads, shape.window,
                                 shape.sinks, rows,           keys};
  const auto plan =
      plan_for<BackwardPlan>(shape.plans, key, [&] { return backward_plan(shape, key, on); });
  BackwardTiles tiles = plan->tiles;
  tiles.owner = plan;
  return tiles;
}

DeviceLayout layout_of(const AttentionShape& shape, const Launch& on, const float* sink_logits) {
  const PagesKey key(shape);
  const auto plan =
      plan_for<LayoutPlan>(shape.plans, key, [&] { return layout_plan(shape, key, on); });
  return {{.start = plan->start,
           .position = plan->position,
           .table = plan->table,
           .pages_per_segment = narrow(shape.pages_per_segment),
           .page_size = narrow(shape.page_size),
           .heads = narrow(shape.heads),
           .kv_heads = narrow(shape.kv_heads),
           .group = narrow(shape.group()),
           .head_dim = narrow(shape.head_dim),
           .value_dim = narrow(shape.value_dim),
           .window = narrow(std::min<int64_t>(shape.window, INT32_MAX)),
           .sinks = narrow(std::min<int64_t>(shape.sinks, INT32_MAX)),
           .scale = shape.scale,
           .softcap = shape.softcap,
           .sink_logits = sink_logits},
          plan};
}

TokenRows token_rows(const AttentionShape& shape, const Launch& on) {
  const PagesKey key(shape);
  const auto plan =
      plan_for<TokenRowsPlan>(shape.plans, key, [&] { return token_rows_plan(shape, key, on); });
  return {plan->memory.as<int64_t>(), plan};
}

Partials make_partials(int64_t partials, int rows, const AttentionShape& shape, const Launch& on) {
  const int64_t count = partials * shape.kv_heads * rows;
  if (count == 0) {
    return {};
  }
  return {scratch<float>(on, count * shape.value_dim), scratch<float>(on, count),
          scratch<float>(on, count)};
}

}  // namespace cambium::cuda::attention
