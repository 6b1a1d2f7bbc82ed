// Speed of the matrix products next to what the machine can do, in one run: every figure is the
// best of several passes. Threads: CAMBIUM_THREADS. Arguments: names of groups (tiny, real,
// decode).
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/float16.h"
#include "base/parallel.h"
#include "machine.h"
#include "ops/matmul/matmul.h"

namespace {

using namespace cambium;

struct Operand {
  std::vector<float> floats;
  std::vector<bf16> rounded;
  Tensor wide, narrow;

  Operand(int64_t rows, int64_t columns)
      : floats(static_cast<size_t>(rows * columns)), rounded(floats.size()) {
    for (size_t i = 0; i < floats.size(); ++i) {
      floats[i] = static_cast<float>(i * 2654435761U % 1000) * 0.002F - 1.0F;
      rounded[i] = round_to_bf16(floats[i]);
    }
    wide = Tensor::of(floats.data(), {rows, columns});
    narrow = Tensor::of(rounded.data(), {rows, columns});
  }
};

void products(double peak, int64_t t, int64_t k, int64_t n, bool training) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const Operand x(t, k);
  const Operand w(n, k);
  const Operand y(t, n);
  const double flops = 2.0 * static_cast<double>(t * k * n);
  const auto print = [&](const char* name, const std::function<void()>& call) {
    const double gflops = flops / seconds_of(call) * 1e-9;
    std::printf("  %s %6.1f (%3.0f%%)", name, gflops, 100 * gflops / peak);
  };
  std::printf("T %5ld K %5ld N %5ld", static_cast<long>(t), static_cast<long>(k),
              static_cast<long>(n));
  print("f32", [&] { matmul_into(ctx, y.wide, x.wide, w.wide); });
  print("bf16", [&] { matmul_into(ctx, y.wide, x.wide, w.narrow); });
  if (training) {
    print("dx", [&] { matmul_grad_input(ctx, x.wide, y.wide, w.wide, true); });
    print("dw", [&] { matmul_grad_weight(ctx, w.wide, y.wide, x.wide, true); });
  }
  std::printf("\n");
}

// A few tokens through weights too large for the caches: bound by reading the weights.
void decode(double stream, int64_t t, int64_t k, int64_t n) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const int64_t copies = (int64_t{400} << 20) / (n * k * 2) + 1;
  const Operand x(t, k);
  const Operand w(n * copies, k);
  const Operand y(t, n);
  std::printf("T %5ld K %5ld N %5ld", static_cast<long>(t), static_cast<long>(k),
              static_cast<long>(n));
  for (const Tensor* weight : {&w.wide, &w.narrow}) {
    const double seconds = seconds_of([&] {
      for (int64_t i = 0; i < copies; ++i) {
        matmul_into(ctx, y.wide, x.wide, weight->slice(0, i * n, n));
      }
    });
    const double gbs = static_cast<double>(weight->bytes()) / seconds * 1e-9;
    std::printf("  %s %5.1f GB/s (%3.0f%%) %6.1f GFLOP/s %7.1f rows/ms", dtype_name(weight->dtype),
                gbs, 100 * gbs / stream,
                2.0 * static_cast<double>(t * k * n * copies) / seconds * 1e-9,
                static_cast<double>(t * copies) / seconds * 1e-3);
  }
  std::printf("\n");
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
  if (wanted("tiny")) {
    std::printf("tiny models (GFLOP/s, of peak)\n");
    for (const int64_t t : {256, 1024, 4096}) {
      products(peak, t, 64, 64, true);
      products(peak, t, 80, 80, true);
      products(peak, t, 80, 224, true);
      products(peak, t, 224, 80, true);
      products(peak, t, 256, 512, true);
      products(peak, t, 512, 512, true);
    }
  }
  if (wanted("real")) {
    std::printf("prefill of real models (GFLOP/s, of peak)\n");
    for (const int64_t t : {16, 64, 256, 1024}) {
      products(peak, t, 576, 1536, t == 1024);
      products(peak, t, 1536, 576, t == 1024);
      products(peak, t, 4096, 4096, t == 1024);
    }
    products(peak, 256, 4096, 14336, false);
  }
  if (wanted("decode")) {
    const double stream = stream_gbs();
    std::printf("decode, weights from memory (of %.1f GB/s read)\n", stream);
    for (const int64_t t : {1, 2, 4, 8, 12, 16}) {
      decode(stream, t, 576, 1536);
      decode(stream, t, 4096, 4096);
    }
  }
  return 0;
}
