// What serving a model takes in memory, from its layers' state layouts alone: nothing is allocated
// or loaded. Cache is built from the same plan, so what `inspect` prints is what serving takes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"

namespace cambium {

struct CacheConfig {
  int64_t max_sequences = 32;
  /// Tokens of a page; 0 = by what a token takes (CachePlan): then a page of the narrowest layer
  /// takes kPageBytes or more.
  int64_t page_size = 0;
  /// Bytes the cache may take; 0 = whatever max_sequences of max_tokens need. Pages are allocated
  /// as they are needed, up to this.
  int64_t memory_bytes = 0;
  /// Longest sequence; 0 = the model's max_positions.
  int64_t max_tokens = 0;
  /// Most tokens of one sequence in a call: a windowed layer keeps its window and these.
  int64_t piece_tokens = 256;
  /// Type of keys and values: bf16, f32, or f8 (e4m3, each head's row of a token with a scale in
  /// bf16). What is compared number by number takes f32.
  Dtype values = Dtype::kBF16;
  /// All pages when the cache is made, so that a step allocates nothing.
  bool reserve = false;
};

/// How a cache divides its memory.
struct CacheSizes {
  int64_t sequences = 0;  // that can be open at once: slots
  int64_t pages = 0;      // of the layers without a window; windowed ones have theirs by sequence
  int64_t bytes = 0;      // when all pages are there
};

/// What a page of one layer takes at least, where the plan chooses its tokens: a power of two from
/// kLeastPage to kMostPage.
inline constexpr int64_t kPageBytes = int64_t{64} << 10;
inline constexpr int64_t kLeastPage = 16;
inline constexpr int64_t kMostPage = 256;
/// Of any that is asked for.
inline constexpr int64_t kMostPageAsked = 65'536;

/// "bf16", "f32" or "f8", as --cache takes it; Error otherwise.
Dtype parse_cache_values(const std::string& name);

/// What a layer's units keep.
struct LayerBytes {
  int64_t per_token = 0;     // for as long as the sequence lives
  int64_t per_sequence = 0;  // slots, and what windows hold once they are full
};

/// Of one unit, by its layout as the cache keeps it.
LayerBytes bytes_of(const StateLayout& kept);

/// Units with one window and sinks: their pages have the same indices and share one table.
struct PageGroup {
  int64_t window = 0;           // 0 = everything before
  int64_t sinks = 0;            // first tokens that are kept behind the window
  std::vector<int64_t> units;   // places in CachePlan::layouts
  int64_t bytes_per_token = 0;  // of all its units

  /// Most pages that a sequence of `tokens` tokens holds at once.
  int64_t pages_for(int64_t tokens, const CacheConfig& config) const;
};

class CachePlan {
 public:
  /// The model needs no weights.
  CachePlan(const Model& model, const CacheConfig& config);

  /// With what it leaves to the model filled in: page_size and max_tokens.
  const CacheConfig& config() const { return config_; }
  const std::vector<PageGroup>& groups() const { return groups_; }
  /// Of the model's units that keep state, as this cache keeps them.
  const std::vector<StateLayout>& layouts() const { return layouts_; }
  const std::vector<LayerBytes>& layers() const { return layers_; }
  /// Bytes of a sequence whatever its length: recurrent states and convolution tails.
  int64_t slot_bytes() const { return slot_bytes_; }
  /// Bytes a token adds while every layer still has it in reach, and for as long as the sequence
  /// lives (layers without a window).
  int64_t bytes_per_token() const;
  int64_t lasting_bytes_per_token() const;
  /// Bytes of a long sequence that do not grow: slots and full windows.
  int64_t fixed_bytes() const;
  /// Bytes of a sequence of `tokens` tokens, in whole pages.
  int64_t sequence_bytes(int64_t tokens) const;
  /// Bytes that the least sequence takes: its slots, full windows and one page.
  int64_t least_bytes() const;
  /// Of max_sequences of max_tokens, or of as much as memory_bytes hold of them. Error when that is
  /// not a single sequence.
  CacheSizes sizes() const;
  /// Sequences of `tokens` tokens that fit into `bytes`.
  int64_t sequences_in(int64_t bytes, int64_t tokens) const;
  /// Longest sequence, at most `most`, that fits into `bytes` alone; 0 if none does.
  int64_t longest_in(int64_t bytes, int64_t most) const;

 private:
  int64_t windows_and_slots() const;

  CacheConfig config_;
  std::vector<StateLayout> layouts_;
  std::vector<LayerBytes> layers_;
  std::vector<PageGroup> groups_;
  int64_t slot_bytes_ = 0;
};

}  // namespace cambium
