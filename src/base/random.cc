#include "base/random.h"

#include <cmath>
#include <numbers>

#include "base/error.h"

namespace cambium {
namespace {

uint32_t high(uint64_t x) {
  return static_cast<uint32_t>(x >> 32);
}
uint32_t low(uint64_t x) {
  return static_cast<uint32_t>(x);
}
uint64_t join(uint32_t lo, uint32_t hi) {
  return lo | (static_cast<uint64_t>(hi) << 32);
}

}  // namespace

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {high(b) ^ counter[1] ^ key[0], low(b), high(a) ^ counter[3] ^ key[1], low(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

uint64_t mix_seed(uint64_t a, uint64_t b) {
  const auto out = philox({low(b), high(b), 0x6D69785F, 0}, {low(a), high(a)});
  return join(out[0], out[1]);
}

uint64_t Rng::next() {
  if (left_ == 0) {
    const auto out =
        philox({low(block_), high(block_), low(stream_), high(stream_)}, {low(seed_), high(seed_)});
    words_ = {join(out[0], out[1]), join(out[2], out[3])};
    left_ = 2;
    ++block_;
  }
  return words_[static_cast<size_t>(2 - left_--)];
}

double Rng::uniform() {
  return static_cast<double>(next() >> 11) * 0x1.0p-53;
}

float Rng::normal() {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  return static_cast<float>(radius * std::cos(2.0 * std::numbers::pi * uniform()));
}

int64_t Rng::below(int64_t n) {
  CAMBIUM_CHECK(n > 0, "below({}): needs a positive bound", n);
  const auto bound = static_cast<uint64_t>(n);
  // Words under 2^64 mod n would make the small results likelier.
  const uint64_t skip = (0 - bound) % bound;
  for (;;) {
    const uint64_t word = next();
    if (word >= skip) {
      return static_cast<int64_t>(word % bound);
    }
  }
}

Permutation::Permutation(int64_t n, uint64_t seed) : n_(n), seed_(seed), half_bits_(1) {
  CAMBIUM_CHECK(n > 0 && n <= (int64_t{1} << 62), "a permutation of {} items", n);
  while ((int64_t{1} << (2 * half_bits_)) < n) {
    ++half_bits_;
  }
}

int64_t Permutation::operator()(int64_t i) const {
  CAMBIUM_CHECK(i >= 0 && i < n_, "position {} of a permutation of {}", i, n_);
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << half_bits_) - 1);
  auto x = static_cast<uint64_t>(i);
  do {
    auto left = static_cast<uint32_t>(x >> half_bits_);
    uint32_t right = static_cast<uint32_t>(x) & mask;
    for (uint32_t round = 0; round < 6; ++round) {
      const uint32_t f = philox({right, round, 0x7065726D, 0}, {low(seed_), high(seed_)})[0];
      const uint32_t next_right = left ^ (f & mask);
      left = right;
      right = next_right;
    }
    x = (static_cast<uint64_t>(left) << half_bits_) | right;
  } while (x >= static_cast<uint64_t>(n_));
  return static_cast<int64_t>(x);
}

}  // namespace cambium
