// Speed of attention next to what the machine can do, in one run: every figure is the best of
// several passes. Only scores that are not masked count as work. Threads: CAMBIUM_THREADS.
// Arguments: names of groups (train, prefill, decode).
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/cpu.h"
#include "machine.h"
#include "ops/attention/attention.h"
#include "tensor/copy.h"

namespace {

using namespace cambium;

struct Shape {
  int64_t segments, length, heads, kv_heads, dim, window, sinks = 0;
};

AttentionConfig config_of(const Shape& s) {
  return {.scale = 1 / std::sqrt(static_cast<float>(s.dim)), .window = s.window, .sinks = s.sinks};
}

OwnedTensor filled(std::initializer_list<int64_t> shape, bool with_grad) {
  OwnedTensor t(Dtype::kF32, shape, with_grad);
  float* p = t.view.ptr<float>();
  for (int64_t i = 0; i < t.view.numel(); ++i) {
    p[i] = static_cast<float>(i * 2654435761U % 1000) * 0.002F - 1.0F;
  }
  return t;
}

/// Scores of tokens [first, first + length) of one head.
double scores(int64_t first, const Shape& s) {
  double sum = 0;
  for (int64_t p = first; p < first + s.length; ++p) {
    sum += static_cast<double>(s.window > 0 ? std::min(s.window + s.sinks, p + 1) : p + 1);
  }
  return sum;
}

std::vector<int32_t> starts(int64_t segments, int64_t length) {
  std::vector<int32_t> start;
  for (int64_t s = 0; s <= segments; ++s) {
    start.push_back(static_cast<int32_t>(s * length));
  }
  return start;
}

void print_shape(const Shape& s) {
  std::printf("%4ld x %5ld tokens, heads %2ld/%ld x %3ld, window %4ld, sinks %3ld:",
              static_cast<long>(s.segments), static_cast<long>(s.length),
              static_cast<long>(s.heads), static_cast<long>(s.kv_heads), static_cast<long>(s.dim),
              static_cast<long>(s.window), static_cast<long>(s.sinks));
}

void train(double peak, const Shape& s) {
  const int64_t tokens = s.segments * s.length;
  const OwnedTensor q = filled({tokens, s.heads, s.dim}, true);
  const OwnedTensor k = filled({tokens, s.kv_heads, s.dim}, true);
  const OwnedTensor v = filled({tokens, s.kv_heads, s.dim}, true);
  const auto start = starts(s.segments, s.length);
  const std::vector<int32_t> position(static_cast<size_t>(s.segments));
  Arena arena;
  Tape tape(arena);
  Context ctx{.arena = &arena, .tape = &tape};
  double back = 1e30;
  double forth = 1e30;
  seconds_of([&] {
    const ArenaScope scope(arena);
    const double begin = now();
    const Tensor y = attention(ctx, q.view, k.view, v.view, {start, position, {}}, config_of(s));
    forth = std::min(forth, now() - begin);
    std::memcpy(y.grad_tensor().data, y.data, static_cast<size_t>(y.bytes()));
    const double middle = now();
    tape.backward(ctx);
    back = std::min(back, now() - middle);
  });
  const double work = 4.0 * scores(0, s) * static_cast<double>(s.segments * s.heads * s.dim) * 1e-9;
  print_shape(s);
  std::printf(" forward %8.3f ms %6.1f GFLOP/s (%2.0f%%), backward %8.3f ms %6.1f (%2.0f%%)\n",
              forth * 1e3, work / forth, 100 * work / forth / peak, back * 1e3, 2.5 * work / back,
              250 * work / back / peak);
}

/// One call on `length` tokens of each sequence from position `first` on, over pages of 64.
void cached(double limit, bool bytes, Dtype pages_type, const Shape& s, int64_t first) {
  constexpr int64_t kPage = 64;
  const int64_t tokens = s.segments * s.length;
  const int64_t per_segment = (first + s.length + kPage - 1) / kPage;
  const OwnedTensor q = filled({tokens, s.heads, s.dim}, false);
  const OwnedTensor k = filled({tokens, s.kv_heads, s.dim}, false);
  const OwnedTensor wide = filled({s.segments * per_segment, kPage, s.kv_heads, s.dim}, false);
  const OwnedTensor keys(pages_type, std::span(wide.view.shape.data(), 4));
  const OwnedTensor values(pages_type, std::span(wide.view.shape.data(), 4));
  copy(keys.view, wide.view);
  copy(values.view, wide.view);
  const auto start = starts(s.segments, s.length);
  const std::vector<int32_t> position(static_cast<size_t>(s.segments), static_cast<int32_t>(first));
  // Pages lie in no order.
  std::vector<int32_t> table;
  const int64_t pages = s.segments * per_segment;
  for (int64_t i = 0; i < pages; ++i) {
    table.push_back(static_cast<int32_t>(pages % 7 == 0 ? pages - 1 - i : i * 7 % pages));
  }
  const KvPages cache = {keys.view, values.view, table, per_segment};
  Arena arena;
  Context ctx{.arena = &arena};
  const double seconds = seconds_of([&] {
    const ArenaScope scope(arena);
    attention(ctx, q.view, k.view, k.view, {start, position, {}}, config_of(s), &cache);
  });
  print_shape(s);
  std::printf(" %s at %5ld %9.3f ms", dtype_name(pages_type), static_cast<long>(first),
              seconds * 1e3);
  const double seen = scores(first, s);
  if (bytes) {
    const double read = seen / static_cast<double>(s.length) * 2e-9 *
                        static_cast<double>(dtype_size(pages_type)) *
                        static_cast<double>(s.segments * s.kv_heads * s.dim);
    std::printf(" %6.1f GB/s (%3.0f%%)\n", read / seconds, 100 * read / seconds / limit);
  } else {
    const double work = 4e-9 * seen * static_cast<double>(s.segments * s.heads * s.dim);
    std::printf(" %6.1f GFLOP/s (%2.0f%%)\n", work / seconds, 100 * work / seconds / limit);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto wanted = [&](const char* group) {
    return argc < 2 || std::any_of(argv + 1, argv + argc,
                                   [&](const char* a) { return std::strcmp(a, group) == 0; });
  };
  const double peak = peak_gflops();
  std::printf("%d threads, %s: %.0f GFLOP/s of fp32 multiply-adds on registers\n", num_threads(),
              cpu_isa_name(cpu_isa()), peak);
  if (wanted("train")) {
    std::printf("packed training (of peak)\n");
    for (const Shape& s :
         {Shape{20, 200, 4, 2, 16, 0}, Shape{40, 100, 4, 2, 16, 0}, Shape{20, 200, 4, 2, 32, 0},
          Shape{20, 200, 4, 2, 32, 64}, Shape{4, 512, 9, 3, 64, 0}, Shape{1, 2048, 9, 3, 64, 0},
          Shape{1, 8192, 9, 3, 64, 512}, Shape{1, 8192, 9, 3, 64, 512, 64}}) {
      train(peak, s);
    }
  }
  if (wanted("prefill")) {
    std::printf("prefill over pages (of peak)\n");
    for (const Dtype type : {Dtype::kBF16, Dtype::kF32}) {
      cached(peak, false, type, {1, 2048, 4, 2, 16, 0}, 0);
      cached(peak, false, type, {1, 2048, 9, 3, 64, 0}, 0);
      cached(peak, false, type, {1, 8192, 9, 3, 64, 0}, 0);
      cached(peak, false, type, {1, 512, 9, 3, 64, 0}, 16384);
      cached(peak, false, type, {1, 8192, 9, 3, 64, 1024}, 0);
      cached(peak, false, type, {1, 8192, 9, 3, 64, 1024, 64}, 0);
      cached(peak, false, type, {1, 512, 32, 8, 128, 0}, 4096);
    }
  }
  if (wanted("decode")) {
    const double stream = stream_gbs();
    std::printf("decode over pages (of %.1f GB/s read)\n", stream);
    for (const Dtype type : {Dtype::kBF16, Dtype::kF32}) {
      for (const Shape& s :
           {Shape{1, 1, 4, 2, 16, 0}, Shape{1, 1, 9, 3, 64, 0}, Shape{1, 1, 32, 8, 128, 0}}) {
        cached(stream, true, type, s, 300);
        cached(stream, true, type, s, 4096);
        cached(stream, true, type, s, 32768);
      }
      cached(stream, true, type, {32, 1, 4, 2, 16, 0}, 300);
      cached(stream, true, type, {32, 1, 4, 2, 16, 0}, 8192);
      cached(stream, true, type, {16, 1, 9, 3, 64, 0}, 4096);
      cached(stream, true, type, {1, 4, 9, 3, 64, 0}, 16384);
      cached(stream, true, type, {1, 1, 9, 3, 64, 1024}, 32768);
      cached(stream, true, type, {1, 1, 9, 3, 64, 1024, 64}, 32768);
    }
  }
  return 0;
}
