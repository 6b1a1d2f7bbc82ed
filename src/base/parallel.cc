#include "base/parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"

namespace cambium {
namespace {

thread_local bool inside_piece = false;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Workers spin for a few tens of microseconds between loops (a model step is thousands of short
// ones), then sleep.
class Pool {
 public:
  explicit Pool(int threads) {
    try {
      workers_.reserve(static_cast<size_t>(threads));
      for (int i = 1; i < threads; ++i) {
        workers_.emplace_back([this](const std::stop_token& stop) { work(stop); });
      }
    } catch (const std::exception& error) {
      // Those that did start are waiting for work.
      const size_t started = workers_.size() + 1;
      stop();
      workers_.clear();
      fail(
          "could start only {} of {} threads ({}); set CAMBIUM_THREADS or --threads to a smaller "
          "number, or allow more processes and memory (ulimit -u, ulimit -v)",
          started, threads, error.what());
    }
  }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t pieces, void (*body)(void*, int64_t), void* context) {
    if (workers_.empty() || inside_piece) {
      for (int64_t i = 0; i < pieces; ++i) {
        body(context, i);
      }
      return;
    }
    const std::lock_guard one_loop(loop_mutex_);
    body_ = body;
    context_ = context;
    pieces_ = pieces;
    failed_ = pieces;
    next_.store(0, std::memory_order_relaxed);
    inside_.store(0, std::memory_order_release);
    {
      const std::lock_guard lock(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) {
      wake_.notify_all();
    }
    take_pieces();
    // Every piece is taken. Workers that have not come by now (another process may have their core)
    // are not waited for.
    inside_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; inside_.load(std::memory_order_acquire) != kClosed; ++spins) {
      // A worker that lost its core in a piece must get it back before we can go on.
      if (spins < 4000) {
        pause_cpu();
      } else {
        std::this_thread::yield();
      }
    }
    if (error_) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  void stop() {
    for (auto& worker : workers_) {
      worker.request_stop();
    }
    {
      const std::lock_guard lock(mutex_);
      ++epoch_;
    }
    wake_.notify_all();
  }

  /// Keeps the exception of the first piece that has one: which that is does not depend on the
  /// threads, as every piece runs whatever the others do.
  void keep_error(int64_t piece) {
    const std::lock_guard lock(error_mutex_);
    if (piece < failed_) {
      failed_ = piece;
      error_ = std::current_exception();
    }
  }

  void take_pieces() {
    inside_piece = true;
    for (;;) {
      const int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces_) {
        break;
      }
      try {
        body_(context_, piece);
      } catch (...) {
        keep_error(piece);
      }
    }
    inside_piece = false;
  }

  void work(const std::stop_token& stop) {
    uint64_t seen = 0;
    for (;;) {
      int spins = 0;
      while (epoch_.load(std::memory_order_acquire) == seen) {
        if (++spins < 4000) {
          pause_cpu();
          continue;
        }
        std::unique_lock lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
        --sleeping_;
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop.stop_requested()) {
        return;
      }
      if (enter()) {
        take_pieces();
        inside_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  // Joins the loop that is open, be it a later one than the worker woke up for.
  bool enter() {
    int inside = inside_.load(std::memory_order_relaxed);
    while ((inside & kClosed) == 0) {
      if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire,
                                        std::memory_order_relaxed)) {
        return true;
      }
    }
    return false;
  }

  static constexpr int kClosed = 1 << 30;

  std::mutex loop_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> inside_{kClosed};  // workers in the loop; kClosed when none may enter
  std::atomic<int64_t> next_{0};
  int64_t pieces_ = 0;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::mutex error_mutex_;
  int64_t failed_ = 0;  // the piece of error_, or the number of pieces
  std::exception_ptr error_;
  std::vector<std::jthread> workers_;
};

int default_threads() {
  if (const char* wanted = std::getenv("CAMBIUM_THREADS"); wanted != nullptr && *wanted != '\0') {
    char* end = nullptr;
    const long threads = std::strtol(wanted, &end, 10);
    expect(*end == '\0' && threads >= 1 && threads <= 1024,
           "CAMBIUM_THREADS: expected a number from 1 to 1024, got '{}'", wanted);
    return static_cast<int>(threads);
  }
  const unsigned cores = std::thread::hardware_concurrency();
  return cores == 0 ? 1 : static_cast<int>(cores);
}

std::unique_ptr<Pool>& pool() {
  static std::unique_ptr<Pool> instance = std::make_unique<Pool>(default_threads());
  return instance;
}

}  // namespace

int num_threads() {
  return pool()->threads();
}

void set_num_threads(int threads) {
  CAMBIUM_CHECK(threads >= 1);
  if (threads != num_threads()) {
    pool() = std::make_unique<Pool>(threads);
  }
}

void run_pieces(int64_t pieces, void (*body)(void* context, int64_t piece), void* context) {
  pool()->run(pieces, body, context);
}

}  // namespace cambium
