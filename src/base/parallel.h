// A pool of threads for loops. The pieces of a loop do not depend on the number of threads, so
// results do not either.
#pragma once

#include <cstdint>
#include <type_traits>

namespace cambium {

/// Threads used by parallel_for, the caller's included: CAMBIUM_THREADS, or the machine's cores.
int num_threads();
/// Changes the number of threads; not while a loop is running.
void set_num_threads(int threads);

/// Runs body(context, piece) for piece in [0, pieces) on the pool; returns when all are done. Loops
/// inside a piece run on the piece's own thread. An exception in a piece does not keep the others
/// from running; when all are done that of the first piece that had one is thrown to the caller.
void run_pieces(int64_t pieces, void (*body)(void* context, int64_t piece), void* context);

/// Calls f(begin, end) over [0, n) cut into pieces of `grain`.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) {
    return;
  }
  if (grain < 1) {
    grain = 1;
  }
  struct Loop {
    int64_t n;
    int64_t grain;
    std::remove_reference_t<F>* f;
  } loop{n, grain, &f};
  const int64_t pieces = (n + grain - 1) / grain;
  if (pieces == 1) {
    f(static_cast<int64_t>(0), n);
    return;
  }
  run_pieces(
      pieces,
      [](void* context, int64_t piece) {
        const Loop& l = *static_cast<Loop*>(context);
        const int64_t begin = piece * l.grain;
        const int64_t end = begin + l.grain < l.n ? begin + l.grain : l.n;
        (*l.f)(begin, end);
      },
      &loop);
}

}  // namespace cambium
