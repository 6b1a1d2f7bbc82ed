// Speed of the losses fused with the output head, next to the matrix products they contain (two
// forward, two backward), in one run. Threads: CAMBIUM_THREADS.
#include <cstdio>
#include <vector>

#include "base/cpu.h"
#include "base/parallel.h"
#include "machine.h"
#include "ops/loss/loss.h"
#include "ops/matmul/matmul.h"

namespace {

using namespace cambium;

OwnedTensor filled(std::initializer_list<int64_t> shape, float scale, bool grad) {
  OwnedTensor t(Dtype::kF32, shape, grad);
  for (int64_t i = 0; i < t.view.numel(); ++i) {
    t.view.ptr<float>()[i] = scale * (static_cast<float>(i * 2654435761U % 1000) * 0.002F - 1.0F);
  }
  return t;
}

void measure(int64_t tokens, int64_t channels, int64_t vocabulary) {
  const OwnedTensor hidden = filled({tokens, channels}, 1, true);
  const OwnedTensor head = filled({vocabulary, channels}, 1, true);
  const OwnedTensor teacher_hidden = filled({tokens, channels}, 0.9F, false);
  const OwnedTensor teacher_head = filled({vocabulary, channels}, 1, false);
  const std::vector<int32_t> labels(static_cast<size_t>(tokens), 1);
  Arena arena;
  Context ctx{.arena = &arena};
  const auto loss = [&](const LossConfig& config, bool teacher) {
    return 1e9 / static_cast<double>(tokens) * seconds_of([&] {
             head_loss(ctx,
                       {.hidden = hidden.view,
                        .head = head.view,
                        .teacher_hidden = teacher ? teacher_hidden.view : Tensor{},
                        .teacher_head = teacher ? teacher_head.view : Tensor{},
                        .labels = labels,
                        .scale = 1e-4},
                       config);
           });
  };
  const int64_t chunk = 256;
  const Tensor logits = arena.empty(Dtype::kF32, {chunk, vocabulary});
  const Tensor x = hidden.view.slice(0, 0, chunk);
  const double products = 1e9 / static_cast<double>(chunk) * seconds_of([&] {
                            matmul_into(ctx, logits, x, head.view);
                            matmul_into(ctx, logits, x, teacher_head.view);
                            matmul_grad_weight(ctx, head.view.grad_tensor(), logits, x, true);
                            matmul_grad_input(ctx, x.grad_tensor(), logits, head.view, true);
                          });
  std::printf(
      "T %5ld C %4ld V %6ld, ns/token: four products %8.0f, reverse KL %8.0f, forward and "
      "reverse %8.0f, cross-entropy (three products) %8.0f\n",
      static_cast<long>(tokens), static_cast<long>(channels), static_cast<long>(vocabulary),
      products, loss({.reverse_kl = 1.0F}, true),
      loss({.forward_kl = 0.5F, .reverse_kl = 0.5F}, true), loss({.cross_entropy = 1.0F}, false));
}

}  // namespace

int main() {
  std::printf("%d threads, %s\n", num_threads(), cpu_isa_name(cpu_isa()));
  measure(4096, 80, 512);
  measure(4096, 96, 1024);
  measure(4096, 80, 4096);
  measure(512, 576, 49152);
  return 0;
}
