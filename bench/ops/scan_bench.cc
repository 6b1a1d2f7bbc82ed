// Speed of the selective scan: whole sequences forward, forward + backward, and the token step of
// many sequences. Every figure is the best of several passes. Threads: CAMBIUM_THREADS.
#include <cstdio>
#include <cstring>
#include <vector>

#include "base/cpu.h"
#include "base/parallel.h"
#include "machine.h"
#include "ops/selective_scan/selective_scan.h"

namespace {

using namespace cambium;

OwnedTensor filled(std::initializer_list<int64_t> shape, float low, float high) {
  OwnedTensor t(Dtype::kF32, shape, true);
  for (int64_t i = 0; i < t.view.numel(); ++i) {
    t.view.ptr<float>()[i] =
        low + (high - low) * 0.001F * static_cast<float>(i * 2654435761U % 1000);
  }
  return t;
}

void measure(int64_t sequences, int64_t length, int64_t channels, int64_t states, int64_t b_groups,
             int64_t c_groups) {
  const int64_t t = sequences * length;
  const OwnedTensor u = filled({t, channels}, -1, 1);
  const OwnedTensor dt = filled({t, channels}, -1, 1);
  const OwnedTensor b = filled({t, b_groups, states}, -1, 1);
  const OwnedTensor c = filled({t, c_groups, states}, -1, 1);
  const OwnedTensor z = filled({t, channels}, -1, 1);
  const OwnedTensor a_log = filled({channels, states}, -1, 2);
  const OwnedTensor d = filled({channels}, -1, 1);
  const OwnedTensor bias = filled({channels}, -4, 0);
  const OwnedTensor state = filled({sequences, channels, states}, -1, 1);
  std::vector<int32_t> start{0};
  std::vector<int32_t> step_start{0};
  std::vector<int32_t> slot;
  const std::vector<int32_t> position(static_cast<size_t>(sequences), 0);
  const std::vector<int32_t> step_position(static_cast<size_t>(sequences), 1);
  for (int64_t s = 0; s < sequences; ++s) {
    start.push_back(start.back() + static_cast<int32_t>(length));
    step_start.push_back(step_start.back() + 1);
    slot.push_back(static_cast<int32_t>(s));
  }
  Arena arena;
  Tape tape(arena);
  Context ctx{.arena = &arena};
  const SelectiveScanInputs in{u.view, dt.view,    b.view, c.view,
                               z.view, a_log.view, d.view, bias.view};
  const double forward = seconds_of([&] {
    const ArenaScope scope(arena);
    selective_scan(ctx, in, {start, position, slot}, state.view);
  });
  const auto rows = [&](const OwnedTensor& x) { return x.view.slice(0, 0, sequences); };
  const double step = seconds_of([&] {
    const ArenaScope scope(arena);
    selective_scan(ctx,
                   {rows(u), rows(dt), rows(b), rows(c), rows(z), a_log.view, d.view, bias.view},
                   {step_start, step_position, slot}, state.view);
  });
  ctx.tape = &tape;
  const double train = seconds_of([&] {
    const ArenaScope scope(arena);
    const Tensor y = selective_scan(ctx, in, {start, position, {}});
    std::memcpy(y.grad_tensor().data, y.data, static_cast<size_t>(y.bytes()));
    tape.backward(ctx);
  });
  const double updates = static_cast<double>(t * channels * states);
  std::printf(
      "%3ld x %5ld tokens, %4ld channels of %2ld states: forward %7.0f ns/token (%4.2f ns/state), "
      "token step %7.0f ns/token, forward + backward %7.0f ns/token (%4.2f ns/state)\n",
      static_cast<long>(sequences), static_cast<long>(length), static_cast<long>(channels),
      static_cast<long>(states), forward * 1e9 / static_cast<double>(t), forward * 1e9 / updates,
      step * 1e9 / static_cast<double>(sequences), train * 1e9 / static_cast<double>(t),
      train * 1e9 / updates);
}

}  // namespace

int main() {
  std::printf("%d threads, %s\n", num_threads(), cpu_isa_name(cpu_isa()));
  measure(13, 300, 64, 16, 2, 4);
  measure(13, 300, 96, 16, 2, 6);
  measure(51, 80, 64, 8, 2, 8);
  measure(13, 300, 64, 16, 1, 1);
  measure(1, 1024, 4096, 16, 64, 256);
  return 0;
}
