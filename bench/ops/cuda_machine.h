// What benchmarks of CUDA kernels share: inputs on the device, the time of a call, and what the
// device can do. Of no use without a CUDA device, but compiled in every build.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "base/random.h"
#include "ops/matmul/matmul.h"
#include "ops/segment_plans.h"
#include "ops/segments.h"
#include "tensor/copy.h"

#if CAMBIUM_CUDA
#include <cuda_runtime_api.h>
#endif

namespace cambium {

inline constexpr Device kDevice{Device::kCuda};
inline constexpr int64_t kCopied = int64_t{1} << 30;  // bytes of the copy that is the limit
inline constexpr double kBeyondCaches = 400e6;        // bytes of all sets together
inline constexpr int64_t kMostSets = 256;
inline constexpr int64_t kMostCalls = 32;  // in a repeat: a stream queues about 1,000 kernels

#if CAMBIUM_CUDA
/// A moment in the order of the device's work.
class Event {
 public:
  Event() { check(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record() { check(cudaEventRecord(event_, compute_stream(kDevice))); }
  double ms_since(const Event& earlier) const {
    float ms = 0.0F;
    check(cudaEventElapsedTime(&ms, earlier.event_, event_));
    return static_cast<double>(ms);
  }

 private:
  static void check(cudaError_t status) {
    expect(status == cudaSuccess, "[cuda] {}", cudaGetErrorString(status));
  }
  cudaEvent_t event_ = nullptr;
};
#else
struct Event {
  void record() {}
  double ms_since(const Event&) const { return 0.0; }
};
#endif

inline double now_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Random numbers on the device: drawn once for each range, copied from another place every time.
class RandomNumbers {
 public:
  void fill(const Tensor& t, double low, double high) {
    const Tensor& from = pool(t.dtype, low, high);
    const int64_t size = dtype_size(t.dtype);
    const int64_t bytes = t.numel() * size;
    const int64_t offset = fills_++ * 37 % (kCount / 128) * 64 * size;  // in the first half
    char* to = static_cast<char*>(t.data);
    int64_t done = std::min(bytes, from.bytes() - offset);
    copy_memory(to, kDevice, static_cast<const char*>(from.data) + offset, kDevice, done);
    for (int64_t next = 0; done < bytes; done += next) {
      next = std::min(done, bytes - done);
      copy_memory(to + done, kDevice, to, kDevice, next);
    }
  }

 private:
  static constexpr int64_t kCount = (int64_t{1} << 22) + 4160;

  const Tensor& pool(Dtype dtype, double low, double high) {
    OwnedTensor& on_device = pools_[{dtype, low, high}];
    if (!on_device.view.defined()) {
      const OwnedTensor here(Dtype::kF32, {kCount});
      Rng random(1, pools_.size());
      for (int64_t i = 0; i < kCount; ++i) {
        here.view.ptr<float>()[i] = static_cast<float>(low + (high - low) * random.uniform());
      }
      on_device = OwnedTensor(dtype, {kCount}, false, kDevice);
      copy(on_device.view, here.view);
    }
    return on_device.view;
  }

  std::map<std::tuple<Dtype, double, double>, OwnedTensor> pools_;
  int64_t fills_ = 0;
};

/// Segments that own their numbers, and their plans as a forward call keeps them for its layers.
struct Packed {
  std::vector<int32_t> start{0}, position, slot;
  SegmentPlans plans;
  Segments view() { return {start, position, slot, &plans}; }
};

/// An input with memory for its gradient.
struct Leaf {
  Tensor value;
  void* grad;
};

/// The memory and inputs of one figure.
struct Scene {
  explicit Scene(RandomNumbers& numbers) : random(numbers) {}
  Scene(const Scene&) = delete;
  Scene& operator=(const Scene&) = delete;

  Tensor input(Dtype dtype, std::initializer_list<int64_t> shape, double low = -1.0,
               double high = 1.0) {
    const Tensor t = inputs.empty(dtype, shape);
    random.fill(t, low, high);
    return t;
  }
  Tensor bf16(std::initializer_list<int64_t> shape, double low = -1.0, double high = 1.0) {
    return input(Dtype::kBF16, shape, low, high);
  }
  Tensor f32(std::initializer_list<int64_t> shape, double low = -1.0, double high = 1.0) {
    return input(Dtype::kF32, shape, low, high);
  }
  Leaf leaf(const Tensor& t) { return {t, t.defined() ? inputs.allocate(t.bytes()) : nullptr}; }
  /// The input as backward passes find it: its gradient holds nothing yet.
  Tensor fresh(const Leaf& of) {
    Tensor t = of.value;
    if (t.defined()) {
      tape.set_fresh_grad(t, of.grad);
    }
    return t;
  }
  /// `count` segments of `length` tokens at `position`; slots from `first_slot` on, or none if -1.
  Packed& packed(int64_t count, int64_t length, int64_t position, int64_t first_slot = -1) {
    Packed& p = segments.emplace_back();
    for (int64_t s = 0; s < count; ++s) {
      p.start.push_back(p.start.back() + static_cast<int32_t>(length));
      p.position.push_back(static_cast<int32_t>(position));
      if (first_slot >= 0) {
        p.slot.push_back(static_cast<int32_t>(first_slot + s));
      }
    }
    return p;
  }
  /// Gives a result a random gradient. Only where it is what the call first takes from `results`:
  /// the numbers stay there from the first call to the last.
  void set_gradient(const Tensor& y) {
    y.takes_grad();
    if (gradient_at != y.grad) {
      gradient_at = y.grad;
      random.fill(Tensor::of(y.dtype, kDevice, std::span(y.shape.data(), size_t(y.rank)), y.grad),
                  -1.0, 1.0);
    }
  }

  RandomNumbers& random;
  Arena inputs{kDevice};
  Arena results{kDevice};
  Arena host = Arena::for_host(kDevice);
  Tape tape{host};
  Context ctx{.arena = &results, .host = &host, .activations = Dtype::kBF16};
  Context recorded{.arena = &results, .tape = &tape, .host = &host, .activations = Dtype::kBF16};
  std::deque<Packed> segments;
  const void* gradient_at = nullptr;
};

/// What is measured: either the bytes a call must move or the operations it must do. call(set) uses
/// inputs of that set; prepare(set) runs before it and is not measured.
struct Work {
  double bytes = 0.0;
  double flops = 0.0;
  int64_t sets = 1;
  std::function<void(int64_t)> call;
  std::function<void(int64_t)> prepare = nullptr;
};

inline int64_t sets_for(double bytes) {
  return std::clamp(static_cast<int64_t>(std::ceil(kBeyondCaches / bytes)), int64_t{2}, kMostSets);
}

inline double bytes_of(std::initializer_list<Tensor> tensors) {
  double sum = 0.0;
  for (const Tensor& t : tensors) {
    sum += t.defined() ? static_cast<double>(t.bytes()) : 0.0;
  }
  return sum;
}

inline Tensor part_of(const Tensor& all, int64_t set, int64_t rows) {
  return all.slice(0, set * rows, rows);
}

class Bench {
 public:
  explicit Bench(bool quick) : quick(quick) {
    row("copy within the device", "1 GiB", [&](Scene& s) {
      from_ = Buffer::uninitialised(kCopied, kDevice);
      to_ = Buffer::uninitialised(kCopied, kDevice);
      s.random.fill(Tensor::of(Dtype::kF32, kDevice, std::vector{kCopied / 4}, from_.data()), -1.0,
                    1.0);
      return Work{.bytes = 2.0 * kCopied, .call = [&](int64_t) { copy_once(); }};
    });
    copy_ms_ = last_ms_;
    copy_gbs = 2e-6 * kCopied / copy_ms_;
    row("product bf16", "8192 x 8192 x 8192", [&](Scene& s) {
      const Tensor x = s.bf16({2 * 8192, 8192});
      const Tensor w = s.bf16({8192, 8192}, -0.02, 0.02);
      return Work{.flops = 2.0 * 8192 * 8192 * 8192, .sets = 2, .call = [=, &s](int64_t set) {
                    matmul(s.ctx, part_of(x, set, 8192), w);
                  }};
    });
    product_tflops = 2e-9 * 8192 * 8192 * 8192 / last_ms_;
  }

  /// Measures what `make` returns and prints its line; an Error fails this line alone.
  template <class Make>
  void row(const std::string& operation, const std::string& shape, const Make& make) {
    const std::string name = operation + " " + shape;
    if (!only.empty() && std::none_of(only.begin(), only.end(), [&](const std::string& part) {
          return name.find(part) != std::string::npos;
        })) {
      return;
    }
    last_ms_ = NAN;
    try {
      Scene scene(random_);
      const Work work = make(scene);
      const auto [ms, queue_us] = measure(scene, work);
      last_ms_ = ms;
      print(operation, shape, work, ms, queue_us);
    } catch (const Error& error) {
      ++failures;
      std::printf("%-33s %-52s failed: %s\n", operation.c_str(), shape.c_str(), error.what());
    }
    std::fflush(stdout);
  }

  const bool quick;
  std::vector<std::string> only;  // rows whose operation and shape have none are left out
  double copy_gbs = NAN;
  double product_tflops = NAN;
  int failures = 0;
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  std::string section = "limits";

 private:
  struct Measured {
    double ms;        // of the device, a call
    double queue_us;  // of the host, a call
  };

  void copy_once() { copy_memory(to_.data(), kDevice, from_.data(), kDevice, kCopied); }

  /// Keeps the device busy for about this long.
  void hold(double ms) {
    const double copies = std::isnan(copy_ms_) ? 0.0 : std::min(std::ceil(ms / copy_ms_), 16.0);
    for (int i = 0; i < static_cast<int>(copies); ++i) {
      copy_once();
    }
  }

  Measured measure(Scene& scene, const Work& work) {
    const Arena::Mark results = scene.results.mark();
    const Arena::Mark host = scene.host.mark();
    int64_t calls = 0;
    const auto next_set = [&] {
      const int64_t set = calls++ % work.sets;
      if (set == 0) {
        scene.results.release(results);
        scene.host.release(host);
      }
      return set;
    };
    const auto prepared = [&] {
      const int64_t set = next_set();
      if (work.prepare) {
        work.prepare(set);
      }
      return set;
    };
    for (int64_t i = 0; i < std::max<int64_t>(work.sets, 2); ++i) {
      work.call(prepared());
    }
    wait_for(kDevice);
    const auto once = [&](double& queue_ms) {
      const int64_t set = prepared();
      wait_for(kDevice);
      const double begin = now_ms();
      work.call(set);
      queue_ms = now_ms() - begin;
      wait_for(kDevice);
      return now_ms() - begin;
    };
    double queue_ms = 0.0;
    const double about = std::min(once(queue_ms), once(queue_ms));
    const auto n = work.prepare ? 1
                                : std::clamp(static_cast<int64_t>((quick ? 2.0 : 5.0) / about),
                                             int64_t{1}, kMostCalls);
    const size_t most = quick ? 3 : 7;
    std::vector<double> samples, queues;
    Event start, stop;
    const double begin = now_ms();
    while (samples.size() < 3 || (samples.size() < most && now_ms() - begin < 400.0)) {
      hold(1.5 * static_cast<double>(n) * queue_ms);
      int64_t set = work.prepare ? prepared() : 0;
      start.record();
      const double queue_begin = now_ms();
      for (int64_t i = 0; i < n; ++i) {
        set = work.prepare ? set : next_set();
        work.call(set);
      }
      queues.push_back((now_ms() - queue_begin) / static_cast<double>(n));
      stop.record();
      wait_for(kDevice);
      samples.push_back(stop.ms_since(start) / static_cast<double>(n));
    }
    return {median(samples), 1e3 * median(queues)};
  }

  void print(const std::string& operation, const std::string& shape, const Work& work, double ms,
             double queue_us) {
    const bool moves = work.bytes > 0.0;
    const double achieved = moves ? work.bytes * 1e-6 / ms : work.flops * 1e-9 / ms;
    const double limit = moves ? copy_gbs : product_tflops;
    const double share = std::isnan(limit) ? 1.0 : achieved / limit;
    const std::string amount = moves ? fmt::format("{:.4f} GB", work.bytes * 1e-9)
                                     : fmt::format("{:.4f} TFLOP", work.flops * 1e-12);
    std::printf("%-33s %-52s %10.4f %16s %8.1f %-7s %5.1f%% %9.1f\n", operation.c_str(),
                shape.c_str(), ms, amount.c_str(), achieved, moves ? "GB/s" : "TFLOP/s",
                100.0 * share, queue_us);
    rows.push_back({{"section", section},
                    {"operation", operation},
                    {"shape", shape},
                    {"ms", ms},
                    {moves ? "bytes" : "flop", moves ? work.bytes : work.flops},
                    {moves ? "gb_per_s" : "tflop_per_s", achieved},
                    {"share", share},
                    {"queue_us", queue_us}});
  }

  RandomNumbers random_;
  Buffer from_, to_;
  double copy_ms_ = NAN;
  double last_ms_ = NAN;
};

}  // namespace cambium
