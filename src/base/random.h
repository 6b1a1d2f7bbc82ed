// Random numbers by counter: a stream is named by (seed, stream) and its i-th number depends on
// nothing else, so a run is the same after a resume and on any number of workers.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <utility>

namespace cambium {

/// One block of Philox4x32-10: a bijection of the counter chosen by the key (Salmon, Moraes, Dror
/// and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

/// Mixes two words into one that looks random: to name a stream by more than one number.
uint64_t mix_seed(uint64_t a, uint64_t b);

/// The stream (seed, stream): 2^65 words before it repeats. Cheap to make: make one per sample.
class Rng {
 public:
  Rng(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  /// 64 uniform bits.
  uint64_t next();
  /// Uniform in [0, 1), 53 bits.
  double uniform();
  /// Standard normal (Box-Muller).
  float normal();
  /// Uniform in 0..n-1 without bias. n > 0.
  int64_t below(int64_t n);
  /// Uniform in low..high, both included. low <= high.
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  /// True with probability p.
  bool chance(double p) { return uniform() < p; }

  /// Every order equally likely (Fisher-Yates).
  template <class T>
  void shuffle(std::span<T> items) {
    for (auto i = static_cast<int64_t>(items.size()) - 1; i > 0; --i) {
      std::swap(items[static_cast<size_t>(i)], items[static_cast<size_t>(below(i + 1))]);
    }
  }

  /// One of the items. Not empty.
  template <class Items>
  const auto& pick(const Items& items) {
    return items[static_cast<size_t>(below(static_cast<int64_t>(std::size(items))))];
  }

 private:
  uint64_t seed_;
  uint64_t stream_;
  uint64_t block_ = 0;             // the next counter
  std::array<uint64_t, 2> words_;  // what the last block gave
  int left_ = 0;                   // how many of words_ are unused
};

/// A seeded permutation of 0..n-1 that needs no table: a Feistel network over the next power of
/// four, walked along its cycle until it falls inside 0..n-1 (fewer than four steps on average).
class Permutation {
 public:
  /// 0 < n <= 2^62.
  Permutation(int64_t n, uint64_t seed);

  int64_t size() const { return n_; }
  /// Where position i (0 <= i < n) goes.
  int64_t operator()(int64_t i) const;

 private:
  int64_t n_;
  uint64_t seed_;
  int half_bits_;
};

}  // namespace cambium
