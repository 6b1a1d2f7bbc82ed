// Speed of the recurrence: the chunk form of whole sequences next to the token step (a call for
// each token of all sequences, as in decoding) on the same tokens, and forward + backward. Every
// figure is the best of several passes, in one run. Threads: CAMBIUM_THREADS. Arguments: names of
// groups (tiny, real, decode).
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "base/cpu.h"
#include "base/parallel.h"
#include "machine.h"
#include "ops/recurrence/recurrence.h"

namespace {

using namespace cambium;

struct Problem {
  const char* mixer;
  int64_t sequences, length, key_heads, heads, key_dim, dim;
  bool delta, per_channel;
};

Tensor filled(const OwnedTensor& t, float low, float high) {
  for (int64_t i = 0; i < t.view.numel(); ++i) {
    t.view.ptr<float>()[i] =
        low + (high - low) * 0.001F * static_cast<float>(i * 2654435761U % 1000);
  }
  return t.view;
}

struct Data {
  OwnedTensor q, k, v, log_decay, weight, state;
  std::vector<int32_t> start{0}, position, slot;
  std::vector<int32_t> step_start, step_position;

  explicit Data(const Problem& p)
      : q(Dtype::kF32, {p.sequences * p.length, p.key_heads, p.key_dim}, true),
        k(Dtype::kF32, {p.sequences * p.length, p.key_heads, p.key_dim}, true),
        v(Dtype::kF32, {p.sequences * p.length, p.heads, p.dim}, true),
        log_decay(p.per_channel
                      ? OwnedTensor(Dtype::kF32, {p.sequences * p.length, p.heads, p.key_dim}, true)
                      : OwnedTensor(Dtype::kF32, {p.sequences * p.length, p.heads}, true)),
        weight(Dtype::kF32, {p.sequences * p.length, p.heads}, true),
        state(Dtype::kF32, {p.sequences, p.heads, p.key_dim, p.dim}) {
    const float key = 1.0F / static_cast<float>(p.key_dim);
    filled(q, -1.0F, 1.0F);
    filled(k, -key, key);
    filled(v, -1.0F, 1.0F);
    filled(log_decay, -0.2F, 0.0F);
    filled(weight, 0.0F, 1.0F);
    step_start.push_back(0);
    for (int64_t s = 0; s < p.sequences; ++s) {
      start.push_back(start.back() + static_cast<int32_t>(p.length));
      step_start.push_back(step_start.back() + 1);
      position.push_back(0);
      step_position.push_back(1);
      slot.push_back(static_cast<int32_t>(s));
    }
  }

  RecurrenceInputs inputs(const Problem& p, bool grad, int64_t begin, int64_t count) const {
    const auto rows = [&](const OwnedTensor& t) {
      const Tensor part = t.view.slice(0, begin, count);
      return grad ? part : part.detached();
    };
    return {.q = rows(q),
            .k = rows(k),
            .v = rows(v),
            .log_decay = rows(log_decay),
            .weight = rows(weight),
            .delta = p.delta};
  }
};

void measure(const Problem& p) {
  const Data data(p);
  Arena arena;
  Tape tape(arena);
  Context ctx{.arena = &arena};
  const int64_t tokens = p.sequences * p.length;
  const double chunk = seconds_of([&] {
    const ArenaScope scope(arena);
    recurrence(ctx, data.inputs(p, false, 0, tokens), {data.start, data.position, data.slot},
               data.state.view);
  });
  const double step = seconds_of([&] {
    for (int64_t t = 0; t < p.length; ++t) {
      const ArenaScope scope(arena);
      recurrence(ctx, data.inputs(p, false, t * p.sequences, p.sequences),
                 {data.step_start, data.step_position, data.slot}, data.state.view);
    }
  });
  ctx.tape = &tape;
  const double train = seconds_of([&] {
    const ArenaScope scope(arena);
    const Tensor y =
        recurrence(ctx, data.inputs(p, true, 0, tokens), {data.start, data.position, {}});
    std::memcpy(y.grad_tensor().data, y.data, static_cast<size_t>(y.bytes()));
    tape.backward(ctx);
  });
  const double per_token = 1e9 / static_cast<double>(tokens);
  std::printf(
      "%-10s %3ld x %5ld tokens, heads %2ld/%2ld of %3ld x %3ld: chunks %7.0f ns/token, token "
      "steps "
      "%7.0f (%4.1fx), forward + backward %7.0f\n",
      p.mixer, static_cast<long>(p.sequences), static_cast<long>(p.length),
      static_cast<long>(p.key_heads), static_cast<long>(p.heads), static_cast<long>(p.key_dim),
      static_cast<long>(p.dim), chunk * per_token, step * per_token, step / chunk,
      train * per_token);
}

// One token of many sequences whose states no cache holds: bound by reading and writing them.
void decode(double stream, const Problem& p) {
  const Data data(p);
  Arena arena;
  Context ctx{.arena = &arena};
  const double seconds = seconds_of([&] {
    const ArenaScope scope(arena);
    recurrence(ctx, data.inputs(p, false, 0, p.sequences),
               {data.step_start, data.step_position, data.slot}, data.state.view);
  });
  const double gbs = 2.0 * static_cast<double>(data.state.view.bytes()) / seconds * 1e-9;
  std::printf("%-10s %4ld states of %2ld x %3ld x %3ld: %6.1f GB/s read and written (%3.0f%%)\n",
              p.mixer, static_cast<long>(p.sequences), static_cast<long>(p.heads),
              static_cast<long>(p.key_dim), static_cast<long>(p.dim), gbs, 100 * gbs / stream);
}

}  // namespace

int main(int argc, char** argv) {
  const auto wanted = [&](const char* group) {
    return argc < 2 || std::any_of(argv + 1, argv + argc,
                                   [&](const char* a) { return std::strcmp(a, group) == 0; });
  };
  std::printf("%d threads, %s\n", num_threads(), cpu_isa_name(cpu_isa()));
  if (wanted("tiny")) {
    std::printf("training of tiny models\n");
    for (const int64_t length : {80, 300}) {
      const int64_t sequences = 4096 / length;
      measure({"lightning", sequences, length, 4, 4, 16, 16, false, false});
      measure({"mamba2", sequences, length, 1, 4, 16, 32, false, false});
      measure({"gdn", sequences, length, 4, 4, 16, 16, true, false});
      measure({"gdn", sequences, length, 4, 4, 32, 32, true, false});
      measure({"kda", sequences, length, 4, 4, 16, 16, true, true});
    }
  }
  if (wanted("real")) {
    std::printf("long sequences of real heads\n");
    measure({"mamba2", 1, 8192, 1, 8, 128, 64, false, false});
    measure({"gdn", 1, 8192, 4, 4, 64, 64, true, false});
    measure({"gdn", 1, 8192, 4, 4, 128, 128, true, false});
    measure({"kda", 1, 8192, 4, 4, 128, 128, true, true});
  }
  if (wanted("decode")) {
    const double stream = stream_gbs();
    std::printf("decode, states from memory (of %.1f GB/s read)\n", stream);
    decode(stream, {"mamba2", 128, 1, 1, 16, 128, 64, false, false});
    decode(stream, {"gdn", 64, 1, 16, 16, 128, 128, true, false});
    decode(stream, {"kda", 64, 1, 16, 16, 128, 128, true, true});
  }
  return 0;
}
