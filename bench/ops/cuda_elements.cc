// What cuda_bench measures beside products and mixers: operations on elements, the loss, sampling,
// an optimiser.
#include <memory>
#include <vector>

#include "cuda_machine.h"
#include "cuda_sections.h"
#include "ops/conv/conv.h"
#include "ops/loss/loss.h"
#include "ops/loss/loss_kernels.h"
#include "ops/loss/loss_ref.h"
#include "ops/norm/norm.h"
#include "ops/optimizer/optimizer.h"
#include "ops/pointwise/pointwise.h"
#include "ops/rope/rope.h"
#include "ops/run.h"
#include "ops/sampling/sampling.h"
#include "ops/sampling/sampling_kernels.h"
#include "ops/sampling/sampling_ref.h"

namespace cambium {
namespace {

constexpr int64_t kWidth = 5120;

/// An operation that reads `inputs` tensors (tokens, width) and writes one, and reads or writes
/// `more` bytes a call beside them.
template <class MakeCall>
void pointwise(Bench& bench, const char* name, int64_t tokens, int64_t inputs, double more,
               const MakeCall& make_call, int64_t width = kWidth) {
  bench.row(name, fmt::format("{} tokens of {}", tokens, width), [&](Scene& s) {
    const double bytes = 2.0 * static_cast<double>((inputs + 1) * tokens * width) + more;
    const int64_t sets = sets_for(bytes);
    const Tensor a = s.bf16({sets * tokens, width});
    const Tensor b = inputs > 1 ? s.bf16({sets * tokens, width}) : a;
    return Work{.bytes = bytes, .sets = sets, .call = [=, call = make_call(s, sets)](int64_t set) {
                  call(set, part_of(a, set, tokens), part_of(b, set, tokens));
                }};
  });
}

void pointwise_of(Bench& bench, int64_t tokens) {
  // Many tokens are one sequence that keeps no state, few are a step of as many sequences.
  const bool step = tokens <= 64;
  const double conv_bytes = 4.0 * kWidth * (5.0 + (step ? 6.0 * static_cast<double>(tokens) : 0.0));
  pointwise(bench, "short_conv", tokens, 1, conv_bytes, [&](Scene& s, int64_t sets) {
    const Tensor weight = s.f32({kWidth, 4});
    const Tensor bias = s.f32({kWidth});
    const Tensor state = step ? s.f32({sets * tokens, kWidth, 3}) : Tensor{};
    for (int64_t set = 0; set < sets; ++set) {
      step ? s.packed(tokens, 1, 100, set * tokens) : s.packed(1, tokens, 0);
    }
    return [=, &s](int64_t set, const Tensor& x, const Tensor&) {
      short_conv(s.ctx, x, weight, bias, true, s.segments[static_cast<size_t>(set)].view(), state);
    };
  });
  pointwise(bench, "rms_norm", tokens, 1, 4.0 * kWidth, [&](Scene& s, int64_t) {
    const Tensor weight = s.f32({kWidth}, 0.5, 1.5);
    return [=, &s](int64_t, const Tensor& x, const Tensor&) { rms_norm(s.ctx, x, weight, 1e-5F); };
  });
  // The residual is of fp32, read and written, what is added and what comes of bf16.
  const double residual = 8.0 * static_cast<double>(tokens * kWidth);
  pointwise(bench, "add_rms_norm", tokens, 1, residual + 4.0 * kWidth, [&](Scene& s, int64_t sets) {
    const Tensor weight = s.f32({kWidth}, 0.5, 1.5);
    const Tensor stream = s.f32({sets * tokens, kWidth});
    return [=, &s](int64_t set, const Tensor& y, const Tensor&) {
      add_rms_norm(s.ctx, part_of(stream, set, tokens), 1.0F, y, 0.1F, weight, 1e-5F);
    };
  });
  pointwise(bench, "gated_rms_norm", tokens, 2, 4.0 * 128, [&](Scene& s, int64_t) {
    const Tensor weight = s.f32({128}, 0.5, 1.5);
    return [=, &s](int64_t, const Tensor& x, const Tensor& gate) {
      gated_rms_norm(s.ctx, x, gate, weight, {.group = 128, .order = GateOrder::kNormFirst});
    };
  });
  pointwise(bench, "swiglu", tokens, 2, 0.0, [&](Scene& s, int64_t) {
    return [&s](int64_t, const Tensor& gate, const Tensor& up) { swiglu(s.ctx, gate, up); };
  });
  pointwise(bench, "add", tokens, 2, 0.0, [&](Scene& s, int64_t) {
    return [&s](int64_t, const Tensor& x, const Tensor& y) { add(s.ctx, x, y); };
  });
  pointwise(bench, "rope", tokens, 1, 8.0 * 64 * static_cast<double>(tokens),
            [&](Scene& s, int64_t) {
              const auto table = std::make_shared<RopeTable>(RopeConfig{.theta = 1e6, .dim = 128});
              table->ensure(tokens);
              const Turns turns = table->turns(s.ctx, s.packed(1, tokens, 0).view());
              return [=, &s](int64_t, const Tensor& x, const Tensor&) {
                rope(s.ctx, x.split_last(kWidth / 128, 128), turns);
                static_cast<void>(table);  // outlives the turns
              };
            });
}

// Those of Nemotron-Nano: 12,288 channels and groups of 1,280.
void pointwise_of_nano(Bench& bench, int64_t tokens) {
  constexpr int64_t kChannels = 12288, kNormed = 10240;
  pointwise(
      bench, "short_conv", tokens, 1, 4.0 * kChannels * 8.0,
      [&](Scene& s, int64_t) {
        const Tensor weight = s.f32({kChannels, 4});
        const Tensor bias = s.f32({kChannels});
        const Tensor state = s.f32({1, kChannels, 3});
        Packed& packed = s.packed(1, tokens, 0, 0);
        return [=, &s, &packed](int64_t, const Tensor& x, const Tensor&) {
          short_conv(s.ctx, x, weight, bias, true, packed.view(), state);
        };
      },
      kChannels);
  pointwise(
      bench, "gated_rms_norm, groups of 1280", tokens, 2, 4.0 * kNormed,
      [&](Scene& s, int64_t) {
        const Tensor weight = s.f32({kNormed}, 0.5, 1.5);
        return [=, &s](int64_t, const Tensor& x, const Tensor& gate) {
          gated_rms_norm(s.ctx, x, gate, weight, {.group = 1280});
        };
      },
      kNormed);
}

constexpr int64_t kVocabulary = 131072;

// Two readings and the gradient in place of the student's logits.
void loss_kernel(Bench& bench, int64_t rows) {
  bench.row("loss, both KL, gradient", fmt::format("{} rows of {}", rows, kVocabulary),
            [&](Scene& s) {
              const Tensor student = s.bf16({rows, kVocabulary}, -8.0, 8.0);
              const Tensor teacher = s.bf16({rows, kVocabulary}, -8.0, 8.0);
              auto* label = s.ctx.shared_scratch<int32_t>(rows);
              auto* result = s.ctx.shared_scratch<LossRow>(rows);
              for (int64_t r = 0; r < rows; ++r) {
                label[r] = static_cast<int32_t>(r * 31 % kVocabulary);
              }
              Work work{.bytes = 3.0 * bytes_of({student}), .call = [=, &s](int64_t) {
                          run<loss_rows>(s.ctx, student, [&]<class T>() {
                            return LossRows<T>{.student = view<T>(student),
                                               .teacher = view<T>(teacher),
                                               .label = label,
                                               .gradient = true,
                                               .cross_entropy = 0.0,
                                               .forward_kl = 0.5,
                                               .reverse_kl = 0.5,
                                               .temperature = 1.0,
                                               .result = result};
                          });
                        }};
              work.prepare = [=, &s](int64_t) {  // the kernel overwrites both
                s.random.fill(student, -8.0, 8.0);
                s.random.fill(teacher, -8.0, 8.0);
              };
              return work;
            });
}

// With the heads' products: two forward, one backward, as the head has no gradient here.
void fused_loss(Bench& bench, int64_t rows) {
  const std::string shape = fmt::format("{} rows, head {} x {}", rows, kVocabulary, kWidth);
  bench.row("head_loss, both KL", shape, [&](Scene& s) {
    const Leaf hidden = s.leaf(s.bf16({rows, kWidth}));
    const Tensor teacher_hidden = s.bf16({rows, kWidth});
    const Tensor head = s.bf16({kVocabulary, kWidth}, -0.02, 0.02);
    const Tensor teacher_head = s.bf16({kVocabulary, kWidth}, -0.02, 0.02);
    const std::vector<int32_t> labels(static_cast<size_t>(rows), 1);
    return Work{.flops = 6.0 * static_cast<double>(rows * kVocabulary * kWidth),
                .call = [=, &s](int64_t) {
                  head_loss(s.ctx,
                            {.hidden = s.fresh(hidden),
                             .head = head,
                             .teacher_hidden = teacher_hidden,
                             .teacher_head = teacher_head,
                             .labels = labels,
                             .scale = 1.0},
                            {.forward_kl = 0.5F, .reverse_kl = 0.5F});
                }};
  });
}

void sampling(Bench& bench, const char* name, int64_t rows, const SamplingConfig& config) {
  bench.row(name, fmt::format("{} rows of {}", rows, kVocabulary), [&](Scene& s) {
    const double bytes = 2.0 * static_cast<double>(rows * kVocabulary);
    const int64_t sets = sets_for(bytes);
    const Tensor logits = s.bf16({sets * rows, kVocabulary}, -10.0, 10.0);
    auto* configs = s.ctx.shared_scratch<SamplingConfig>(rows);
    auto* uniform = s.ctx.shared_scratch<double>(rows);
    auto* token = s.ctx.shared_scratch<int32_t>(rows);
    auto* log_probability = s.ctx.shared_scratch<float>(rows);
    Rng random(2, 0);
    for (int64_t r = 0; r < rows; ++r) {
      configs[r] = config;
      uniform[r] = random.uniform();
    }
    return Work{.bytes = bytes, .sets = sets, .call = [=, &s](int64_t set) {
                  run<sample_rows>(s.ctx, logits, [&]<class T>() {
                    return SampleRows<T>{view<T>(part_of(logits, set, rows)), configs, uniform,
                                         token, log_probability};
                  });
                }};
  });
}

// Reads p, its gradient, m and v and writes all but the gradient.
void adamw(Bench& bench, int64_t parameters) {
  bench.row("adamw_update", fmt::format("{} parameters, f32", parameters), [&](Scene& s) {
    Tensor p = s.f32({parameters}, -0.02, 0.02);
    const Tensor gradient = s.f32({parameters}, -1.0, 1.0);
    const Tensor m = s.f32({parameters}, -1.0, 1.0);
    const Tensor v = s.f32({parameters}, 0.01, 1.0);
    p.grad = gradient.data;
    return Work{.bytes = 28.0 * static_cast<double>(parameters), .call = [=, &s](int64_t) {
                  adamw_update(s.ctx, p, m, v, {.rate = 1e-4F, .weight_decay = 0.1F});
                }};
  });
}

}  // namespace

void pointwise_section(Bench& bench) {
  pointwise_of(bench, 8192);
  pointwise_of(bench, 64);
  pointwise_of_nano(bench, 8192);
}

void loss_section(Bench& bench) {
  loss_kernel(bench, 4096);
  fused_loss(bench, bench.quick ? 512 : 4096);
  sampling(bench, "sampling, greedy", 64, {});
  sampling(bench, "sampling, top-k 50, top-p 0.95", 64,
           {.temperature = 0.8F, .top_k = 50, .top_p = 0.95F});
  sampling(bench, "sampling, top-p 0.95", 64, {.temperature = 0.8F, .top_p = 0.95F});
  sampling(bench, "sampling, all", 64, {.temperature = 1.0F});
  adamw(bench, bench.quick ? 100'000'000 : 1'000'000'000);
}

}  // namespace cambium
