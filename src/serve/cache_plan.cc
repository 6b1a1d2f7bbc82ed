#include "serve/cache_plan.h"

#include <algorithm>

#include "base/text.h"

namespace cambium {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// Tokens of a page by the units that keep pages. What is read of a page lies together, and tables
/// have an entry a page: a page of few bytes costs both.
int64_t choose_page_size(const std::vector<StateLayout>& layouts) {
  int64_t size = kLeastPage;
  for (const StateLayout& layout : layouts) {
    while (!layout.pages.empty() && size < kMostPage &&
           size * layout.bytes_per_token() < kPageBytes) {
      size *= 2;
    }
  }
  return size;
}

}  // namespace

Dtype parse_cache_values(const std::string& name) {
  expect(name == "bf16" || name == "f32" || name == "f8",
         "--cache: expected bf16, f32 or f8, got '{}'", name);
  return name == "bf16" ? Dtype::kBF16 : name == "f32" ? Dtype::kF32 : Dtype::kF8E4M3;
}

int64_t PageGroup::pages_for(int64_t tokens, const CacheConfig& config) const {
  const int64_t all = ceil_div(tokens, config.page_size);
  if (window == 0) {
    return all;
  }
  // Its own tokens and window - 1 before the first of them, which may start anywhere in a page, and
  // the sinks.
  return std::min(all, ceil_div(window - 1 + config.piece_tokens, config.page_size) + 1 +
                           ceil_div(sinks, config.page_size));
}

LayerBytes bytes_of(const StateLayout& kept) {
  return {kept.window > 0 ? 0 : kept.bytes_per_token(),
          kept.bytes_per_sequence() + kept.most_tokens() * kept.bytes_per_token()};
}

CachePlan::CachePlan(const Model& model, const CacheConfig& config)
    : config_(config), layouts_(model.state_layouts()) {
  expect(config.max_sequences > 0 && config.page_size >= 0 && config.piece_tokens > 0 &&
             config.memory_bytes >= 0 && config.max_tokens >= 0,
         "[cache] expected max_sequences and piece_tokens above 0 and a page_size from 0 "
         "(0: chosen), got {}, {} and {}",
         config.max_sequences, config.piece_tokens, config.page_size);
  expect(config.values == Dtype::kF32 || config.values == Dtype::kBF16 ||
             config.values == Dtype::kF8E4M3,
         "[cache] expected keys and values in f32, bf16 or f8, got {}", dtype_name(config.values));
  if (config_.max_tokens == 0) {
    config_.max_tokens = std::max<int64_t>(model.spec().max_positions, 1);
  }
  for (size_t i = 0; i < layouts_.size(); ++i) {
    layouts_[i] = layouts_[i].kept_in(config_.values);
    const StateLayout& layout = layouts_[i];
    slot_bytes_ += layout.bytes_per_sequence();
    if (layout.pages.empty()) {
      continue;
    }
    auto group = std::find_if(groups_.begin(), groups_.end(), [&](const PageGroup& g) {
      return g.window == layout.window && g.sinks == layout.sinks;
    });
    if (group == groups_.end()) {
      groups_.push_back({.window = layout.window, .sinks = layout.sinks, .units = {}});
      group = groups_.end() - 1;
    }
    group->units.push_back(static_cast<int64_t>(i));
    group->bytes_per_token += layout.bytes_per_token();
  }
  if (config_.page_size == 0) {
    config_.page_size = choose_page_size(layouts_);
  }
  size_t unit = 0;
  for (int64_t layer = 0; layer < model.layer_count(); ++layer) {
    LayerBytes& bytes = layers_.emplace_back();
    for (size_t i = 0; i < model.layer(layer).state_layouts().size(); ++i) {
      const LayerBytes own = bytes_of(layouts_[unit++]);
      bytes.per_token += own.per_token;
      bytes.per_sequence += own.per_sequence;
    }
  }
}

int64_t CachePlan::bytes_per_token() const {
  int64_t sum = 0;
  for (const PageGroup& group : groups_) {
    sum += group.bytes_per_token;
  }
  return sum;
}

int64_t CachePlan::lasting_bytes_per_token() const {
  int64_t sum = 0;
  for (const PageGroup& group : groups_) {
    sum += group.window == 0 ? group.bytes_per_token : 0;
  }
  return sum;
}

int64_t CachePlan::fixed_bytes() const {
  int64_t sum = 0;
  for (const LayerBytes& layer : layers_) {
    sum += layer.per_sequence;
  }
  return sum;
}

int64_t CachePlan::sequence_bytes(int64_t tokens) const {
  int64_t sum = slot_bytes_;
  for (const PageGroup& group : groups_) {
    sum += group.pages_for(tokens, config_) * config_.page_size * group.bytes_per_token;
  }
  return sum;
}

int64_t CachePlan::windows_and_slots() const {
  int64_t sum = slot_bytes_;
  for (const PageGroup& group : groups_) {
    if (group.window > 0) {
      sum +=
          group.pages_for(config_.max_tokens, config_) * config_.page_size * group.bytes_per_token;
    }
  }
  return sum;
}

int64_t CachePlan::least_bytes() const {
  return windows_and_slots() + config_.page_size * lasting_bytes_per_token();
}

// Slots and windowed layers have a fixed size for each sequence; the layers that see everything get
// the rest. Memory that is short costs sequences first.
CacheSizes CachePlan::sizes() const {
  const int64_t fixed = windows_and_slots();
  const int64_t page = config_.page_size * lasting_bytes_per_token();
  const int64_t least = least_bytes();
  const int64_t memory = config_.memory_bytes;
  CacheSizes sizes{config_.max_sequences, 0, 0};
  sizes.pages = sizes.sequences * ceil_div(config_.max_tokens, config_.page_size);
  if (memory > 0) {
    expect(memory >= least, "[cache] {} hold no sequence of this model: one takes at least {}",
           human_bytes(static_cast<uint64_t>(memory)), human_bytes(static_cast<uint64_t>(least)));
    if (least > 0) {
      sizes.sequences = std::min(sizes.sequences, memory / least);
    }
    if (page > 0) {
      sizes.pages = std::min(sizes.pages, (memory - sizes.sequences * fixed) / page);
    }
  }
  sizes.bytes = sizes.sequences * fixed + sizes.pages * page;
  return sizes;
}

int64_t CachePlan::sequences_in(int64_t bytes, int64_t tokens) const {
  const int64_t each = sequence_bytes(tokens);
  return bytes <= 0 || each == 0 ? 0 : bytes / each;
}

int64_t CachePlan::longest_in(int64_t bytes, int64_t most) const {
  int64_t low = 0;  // fits, or 0
  int64_t high = most + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (sequence_bytes(middle) <= bytes ? low : high) = middle;
  }
  return low;
}

}  // namespace cambium
