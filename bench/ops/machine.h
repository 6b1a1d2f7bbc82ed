// What benchmarks compare with: the time of a call, and what this machine can do.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "base/parallel.h"

namespace cambium {

/// Seconds since some moment. With one thread, the seconds this thread ran: then other programs on
/// the machine do not count.
inline double now() {
  timespec time{};
  clock_gettime(num_threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

/// The best of several passes.
inline double seconds_of(const std::function<void()>& call) {
  double best = 1e30;
  double total = 0;
  for (int pass = 0; pass < 200 && (pass < 5 || total < 0.4); ++pass) {
    const double start = now();
    call();
    const double time = now() - start;
    best = std::min(best, time);
    total += time;
  }
  return best;
}

/// Fused multiply-adds on registers only, on every thread.
inline double peak_gflops() {
#if defined(__AVX512F__)
  constexpr int kLanes = 16;
#else
  constexpr int kLanes = 8;
#endif
  typedef float Vector __attribute__((vector_size(kLanes * 4)));
  constexpr int kChains = 12;
  constexpr int64_t kSteps = 4'000'000;
  std::vector<float> sink(static_cast<size_t>(num_threads()));
  const double seconds = seconds_of([&] {
    parallel_for(num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        Vector sum[kChains];
        for (int c = 0; c < kChains; ++c) {
          sum[c] = Vector{} + static_cast<float>(c);  // equal chains would be merged into one
        }
        Vector x = Vector{} + 1e-3F;
        Vector y = Vector{} + 0.5F;
        for (int64_t i = 0; i < kSteps; ++i) {
          asm volatile("" : "+v"(x), "+v"(y));
#pragma GCC unroll 12
          for (int c = 0; c < kChains; ++c) {
            sum[c] = sum[c] * y + x;
          }
        }
        for (int c = 0; c < kChains; ++c) {
          sink[static_cast<size_t>(t)] += sum[c][0];
        }
      }
    });
  });
  return 2.0 * kLanes * kChains * kSteps * num_threads() / seconds * 1e-9;
}

/// Gigabytes a second read from memory that no cache holds.
inline double stream_gbs() {
  const std::vector<uint64_t> memory(size_t{1} << 26, 1);  // 512 MiB
  std::vector<uint64_t> sink(64);
  const double seconds = seconds_of([&] {
    parallel_for(64, 1, [&](int64_t begin, int64_t) {
      const uint64_t* p = memory.data() + begin * (int64_t{1} << 20);
      uint64_t sum = 0;
      for (int64_t i = 0; i < int64_t{1} << 20; ++i) {
        sum += p[i];
      }
      sink[static_cast<size_t>(begin)] = sum;
    });
  });
  return 8.0 * static_cast<double>(memory.size()) / seconds * 1e-9;
}

}  // namespace cambium
