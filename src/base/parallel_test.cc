#include "base/parallel.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/testing.h"

namespace cambium {
namespace {

class Parallel : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { set_num_threads(GetParam()); }
  void TearDown() override { set_num_threads(before_); }

 private:
  int before_ = num_threads();
};

TEST_P(Parallel, EveryIndexOnceInPiecesOfTheGrain) {
  for (const int64_t n : {1, 2, 7, 64, 1000}) {
    for (const int64_t grain : {0, 1, 3, 64, 5000}) {
      std::vector<int> count(static_cast<size_t>(n));
      parallel_for(n, grain, [&](int64_t begin, int64_t end) {
        EXPECT_TRUE(grain == 0 || begin % grain == 0);
        for (int64_t i = begin; i < end; ++i) {
          ++count[static_cast<size_t>(i)];
        }
      });
      EXPECT_EQ(count, std::vector<int>(static_cast<size_t>(n), 1)) << n << " by " << grain;
    }
  }
  parallel_for(0, 1, [](int64_t, int64_t) { FAIL(); });
}

// Short loops in a row: a worker that is late for one must neither run it again nor harm the next.
TEST_P(Parallel, ManyShortLoops) {
  std::vector<int64_t> values(4);
  for (int64_t round = 0; round < 20000; ++round) {
    parallel_for(4, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        values[static_cast<size_t>(i)] += round;
      }
    });
    // What the workers wrote is visible here, and they no longer write.
    ASSERT_EQ(std::accumulate(values.begin(), values.end(), int64_t{0}),
              4 * round * (round + 1) / 2);
  }
}

TEST_P(Parallel, LoopsInsidePieces) {
  std::atomic<int64_t> sum{0};
  parallel_for(6, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parallel_for(10, 3, [&](int64_t b, int64_t e) { sum += (e - b) * i; });
    }
  });
  EXPECT_EQ(sum, 150);
}

INSTANTIATE_TEST_SUITE_P(Threads, Parallel, ::testing::Values(1, 2, 3, 8),
                         ::testing::PrintToStringParamName());

TEST(ParallelErrors, TheFirstFailedPieceIsTheError) {
  const int before = num_threads();
  for (const int threads : {1, 2, 4, 8}) {
    set_num_threads(threads);
    for (int round = 0; round < 50; ++round) {
      std::atomic<int> ran{0};
      EXPECT_EQ(testing::message_of([&] {
                  parallel_for(64, 1, [&](int64_t begin, int64_t) {
                    ++ran;
                    expect(begin % 7 != 6, "piece {}", begin);
                  });
                }),
                "piece 6");
      EXPECT_TRUE(ran == 64 || threads == 1);
      // The pool is as good as new.
      std::atomic<int64_t> sum{0};
      parallel_for(100, 3, [&](int64_t begin, int64_t end) { sum += end - begin; });
      EXPECT_EQ(sum, 100);
    }
  }
  set_num_threads(before);
}

TEST(ParallelErrors, ErrorsOfLoopsInsidePiecesComeOut) {
  const int before = num_threads();
  set_num_threads(4);
  EXPECT_EQ(testing::message_of([] {
              parallel_for(8, 1, [](int64_t outer, int64_t) {
                parallel_for(8, 1, [&](int64_t inner, int64_t) {
                  expect(outer != 3 || inner != 2, "outer {} inner {}", outer, inner);
                });
              });
            }),
            "outer 3 inner 2");
  EXPECT_THROW(parallel_for(8, 1, [](int64_t, int64_t) { throw std::bad_alloc(); }),
               std::bad_alloc);
  set_num_threads(before);
}

// Threads that cannot be started are an error, not a hang.
TEST(ParallelErrors, ThreadsThatCannotStartAreNamed) {
#ifdef CAMBIUM_SANITIZED
  GTEST_SKIP() << "the sanitizers' own memory is beyond any limit that stops a thread";
#endif
  EXPECT_EXIT(
      {
        rlimit memory{};
        getrlimit(RLIMIT_AS, &memory);
        memory.rlim_cur = size_t{256} << 20;
        setrlimit(RLIMIT_AS, &memory);
        const std::string message = testing::message_of([] { set_num_threads(512); });
        std::fprintf(stderr, "%s", message.c_str());
        std::_Exit(message.find("of 512 threads") != std::string::npos ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "could start only .* CAMBIUM_THREADS");
}

}  // namespace
}  // namespace cambium
