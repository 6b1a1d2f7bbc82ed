#include "serve/cache.h"

#include <algorithm>
#include <cstring>

#include "base/text.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

/// Rows [begin, end) of the first axis filled with NaN, whatever the dtype: all bits set.
void poison_rows(const Tensor& t, int64_t begin, int64_t end) {
  if (t.device.kind != Device::kCpu) {
    return;  // a launch for every page; what reads it is tested with poisoned memory
  }
  const int64_t row = t.bytes() / std::max<int64_t>(t.dim(0), 1);
  std::memset(static_cast<std::byte*>(t.data) + begin * row, 0xFF,
              static_cast<size_t>((end - begin) * row));
}

/// Pages that a table of a device grows by: steps whose sizes are the same are queued as one.
constexpr int64_t kTogether = 64;

std::vector<int64_t> with_axes(std::vector<int64_t> axes, const Part& part) {
  axes.insert(axes.end(), part.shape.begin(), part.shape.end());
  return axes;
}

}  // namespace

Cache::Cache(const Model& model, const CacheConfig& config)
    : plan_(model, config), device_(model.device()) {
  expect(model.activations() != Dtype::kBF16 || config.values != Dtype::kF32,
         "[cache] this model computes in bf16 and keeps keys and values so, or in f8; take --cache "
         "bf16 or f8, or --storage f32");
  divide_memory();
  for (const StateLayout& layout : plan_.layouts()) {
    Unit& unit = units_.emplace_back();
    unit.pages.resize(layout.pages.size());
    unit.page_views.resize(layout.pages.size());
    for (const Part& part : layout.slots) {
      unit.slots.emplace_back(part.dtype, with_axes({capacity()}, part), false, device_);
      unit.slot_views.push_back(unit.slots.back().view);
    }
  }
  for (int64_t slot = 0; slot < capacity(); ++slot) {
    poison_slot(slot);
  }
  states_.resize(units_.size());
  for (Group& group : groups_) {
    if (config.reserve && group.limit > 0) {
      grow(group);
    }
  }
}

void Cache::divide_memory() {
  const CacheConfig& config = plan_.config();
  const CacheSizes sizes = plan_.sizes();
  sequences_.resize(static_cast<size_t>(sizes.sequences));
  for (const PageGroup& plan : plan_.groups()) {
    Group& group = groups_.emplace_back();
    group.plan = plan;
    group.limit = plan.window == 0 ? sizes.pages
                                   : sizes.sequences * plan.pages_for(config.max_tokens, config);
  }
  for (Sequence& sequence : sequences_) {
    sequence.pages.resize(groups_.size());
  }
}

void Cache::expect_fits(int64_t tokens) const {
  const CacheConfig& config = plan_.config();
  expect(tokens <= config.max_tokens,
         "[cache] a sequence of {} tokens can never fit: the longest is {} tokens", tokens,
         config.max_tokens);
  for (const Group& group : groups_) {
    expect(group.plan.pages_for(tokens, config) <= group.limit,
           "[cache] a sequence of {} tokens can never fit: it takes {} and the cache has {}; give "
           "it more memory or ask for fewer tokens",
           tokens, human_bytes(static_cast<uint64_t>(plan_.sequence_bytes(tokens))),
           human_bytes(static_cast<uint64_t>(config.memory_bytes)));
  }
}

int64_t Cache::open(int64_t tokens) {
  expect_fits(tokens);
  const CacheConfig& config = plan_.config();
  const auto unused =
      std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return !s.open; });
  const bool fits = std::all_of(groups_.begin(), groups_.end(), [&](const Group& group) {
    return group.set_aside + group.plan.pages_for(tokens, config) <= group.limit;
  });
  if (unused == sequences_.end() || !fits) {
    return -1;
  }
  for (Group& group : groups_) {
    group.set_aside += group.plan.pages_for(tokens, config);
  }
  unused->open = true;
  unused->tokens = tokens;
  ++open_;
  return unused - sequences_.begin();
}

bool Cache::extend(int64_t slot, int64_t tokens) {
  expect_fits(tokens);
  Sequence& sequence = sequences_.at(static_cast<size_t>(slot));
  CAMBIUM_CHECK(sequence.open, "slot {} is not open", slot);
  if (tokens <= sequence.tokens) {
    return true;
  }
  const auto more = [&](const Group& group) {
    const CacheConfig& config = plan_.config();
    return group.plan.pages_for(tokens, config) - group.plan.pages_for(sequence.tokens, config);
  };
  if (!std::all_of(groups_.begin(), groups_.end(), [&](const Group& group) {
        return group.set_aside + more(group) <= group.limit;
      })) {
    return false;
  }
  for (Group& group : groups_) {
    group.set_aside += more(group);
  }
  sequence.tokens = tokens;
  return true;
}

void Cache::close(int64_t slot) {
  Sequence& sequence = sequences_.at(static_cast<size_t>(slot));
  CAMBIUM_CHECK(sequence.open, "slot {} is not open", slot);
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (const int32_t page : sequence.pages[g]) {
      if (page >= 0) {
        give_back(groups_[g], page);
      }
    }
    sequence.pages[g].clear();
    groups_[g].set_aside -= groups_[g].plan.pages_for(sequence.tokens, plan_.config());
  }
  poison_slot(slot);
  sequence.open = false;
  --open_;
}

void Cache::poison_slot(int64_t slot) {
  for (const Unit& unit : units_) {
    for (const Tensor& part : unit.slot_views) {
      poison_rows(part, slot, slot + 1);
    }
  }
}

void Cache::give_back(Group& group, int32_t page) {
  for (const int64_t place : group.plan.units) {
    for (const Tensor& part : unit(place).page_views) {
      poison_rows(part, page, page + 1);
    }
  }
  group.free.push_back(page);
}

int32_t Cache::take_page(Group& group) {
  if (group.free.empty()) {
    grow(group);
  }
  const int32_t page = group.free.back();
  group.free.pop_back();
  return page;
}

// Doubles the pages, up to the limit; all of them where they are reserved. Unit by unit, so that
// little is held twice. On a device, where growing stops all work, it begins with more and goes to
// the limit when that is near.
void Cache::grow(Group& group) {
  const int64_t before = group.pages;
  const bool cpu = device_.kind == Device::kCpu;
  const int64_t more = std::max<int64_t>(2 * before, cpu ? 16 : 1024);
  const bool step = !plan_.config().reserve && (cpu || group.limit > 2 * more);
  group.pages = step ? std::min(group.limit, more) : group.limit;
  CAMBIUM_CHECK(group.pages > before, "more pages are taken than were set aside");
  const int64_t page_size = plan_.config().page_size;
  for (const int64_t place : group.plan.units) {
    const std::vector<Part>& parts = plan_.layouts()[static_cast<size_t>(place)].pages;
    for (size_t i = 0; i < parts.size(); ++i) {
      OwnedTensor& old = unit(place).pages[i];
      OwnedTensor grown(parts[i].dtype, with_axes({group.pages, page_size}, parts[i]), false,
                        device_);
      if (before > 0) {
        copy(grown.view.slice(0, 0, before), old.view);
      }
      poison_rows(grown.view, before, group.pages);
      old = std::move(grown);
      unit(place).page_views[i] = old.view;
    }
  }
  for (int64_t page = group.pages - 1; page >= before; --page) {
    group.free.push_back(static_cast<int32_t>(page));
  }
}

// Holds exactly the pages that tokens [begin, end) write or read.
void Cache::reach(Group& group, std::vector<int32_t>& pages, int64_t begin, int64_t end) {
  const int64_t page_size = plan_.config().page_size;
  const int64_t window = group.plan.window;
  const int64_t first = window > 0 && begin >= window ? (begin - window + 1) / page_size : 0;
  const int64_t sinks = (group.plan.sinks + page_size - 1) / page_size;  // pages with any
  for (int64_t i = sinks; i < std::min<int64_t>(first, static_cast<int64_t>(pages.size())); ++i) {
    int32_t& page = pages[static_cast<size_t>(i)];
    if (page >= 0) {
      give_back(group, page);
      page = -1;
    }
  }
  const auto needed = static_cast<size_t>((end + page_size - 1) / page_size);
  while (pages.size() < needed) {
    const auto i = static_cast<int64_t>(pages.size());
    pages.push_back(i >= sinks && i < first ? -1 : take_page(group));
  }
}

std::span<const UnitState> Cache::prepare(const Batch& batch) {
  const Segments segments = batch.segments();
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    group.pages_per_segment = 0;
    for (int64_t s = 0; s < segments.count(); ++s) {
      const auto slot = static_cast<size_t>(segments.slot[static_cast<size_t>(s)]);
      CAMBIUM_CHECK(slot < sequences_.size() && sequences_[slot].open, "slot {} is not open", slot);
      Sequence& sequence = sequences_[slot];
      const int64_t begin = segments.position[static_cast<size_t>(s)];
      const int64_t end = begin + segments.length(s);
      CAMBIUM_CHECK(end <= sequence.tokens && end - begin <= plan_.config().piece_tokens,
                    "tokens {}..{} of a sequence of {}", begin, end, sequence.tokens);
      reach(group, sequence.pages[g], begin, end);
      group.pages_per_segment =
          std::max(group.pages_per_segment, static_cast<int64_t>(sequence.pages[g].size()));
    }
    if (device_.kind == Device::kCuda) {
      group.pages_per_segment = (group.pages_per_segment + kTogether - 1) / kTogether * kTogether;
    }
    group.table.assign(static_cast<size_t>(segments.count() * group.pages_per_segment), -1);
    for (int64_t s = 0; s < segments.count(); ++s) {
      const auto slot = static_cast<size_t>(segments.slot[static_cast<size_t>(s)]);
      std::copy(sequences_[slot].pages[g].begin(), sequences_[slot].pages[g].end(),
                group.table.begin() + s * group.pages_per_segment);
    }
    for (const int64_t place : group.plan.units) {
      UnitState& state = states_[static_cast<size_t>(place)];
      state.pages = unit(place).page_views;
      state.table = group.table;
      state.pages_per_segment = group.pages_per_segment;
    }
  }
  for (size_t i = 0; i < states_.size(); ++i) {
    states_[i].slots = units_[i].slot_views;
  }
  return states_;
}

int64_t Cache::pages_in_use() const {
  int64_t sum = 0;
  for (const Group& group : groups_) {
    sum += group.pages - static_cast<int64_t>(group.free.size());
  }
  return sum;
}

void Cache::clear() {
  for (const Unit& unit : units_) {
    for (const auto* views : {&unit.page_views, &unit.slot_views}) {
      for (const Tensor& part : *views) {
        if (part.defined()) {
          fill(part, 0);
        }
      }
    }
  }
}

int64_t Cache::table_entries() const {
  const int64_t longest = plan_.config().max_tokens / plan_.config().page_size + kTogether;
  return static_cast<int64_t>(groups_.size()) * longest * capacity();
}

int64_t Cache::bytes() const {
  int64_t sum = capacity() * plan_.slot_bytes();
  for (const Group& group : groups_) {
    sum += group.pages * plan_.config().page_size * group.plan.bytes_per_token;
  }
  return sum;
}

}  // namespace cambium
