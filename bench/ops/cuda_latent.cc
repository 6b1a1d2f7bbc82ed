// Latent attention, the choice of its tokens and routed experts of cuda_bench, at the sizes of
// DeepSeek-V3.2, Kimi-Linear, Qwen3-Next and MiniMax-M1.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda_machine.h"
#include "cuda_sections.h"
#include "ops/attention/attention.h"
#include "ops/experts/experts.h"
#include "ops/head_matmul/head_matmul.h"
#include "ops/latent_attention/latent_attention.h"

namespace cambium {
namespace {

constexpr int64_t kRank = 512, kRope = 64, kNope = 128;
constexpr int64_t kPage = 64;
constexpr float kScale = 0.0721688F;  // 192^-0.5

/// Pages of `batch` sequences of `context` tokens, in order.
struct Pages {
  Pages(int64_t batch, int64_t context) : per_sequence((context + kPage - 1) / kPage) {
    table.resize(static_cast<size_t>(batch * per_sequence));
    std::iota(table.begin(), table.end(), 0);
  }
  int64_t count() const { return std::ssize(table); }
  int64_t per_sequence;
  std::vector<int32_t> table;
};

// Bytes or operations, whichever takes the device longer.
Work least(double bytes, double flops) {
  const bool multiplies = flops / 800e12 > bytes / 4.2e12;
  Work work;
  (multiplies ? work.flops : work.bytes) = multiplies ? flops : bytes;
  return work;
}

/// A call of latent attention on pages that hold its tokens already: `behind` before each
/// sequence's.
struct LatentCall {
  int64_t heads;
  std::vector<int32_t> behind;
  int64_t length = 1;
  int64_t chosen = 0;  // evenly spaced tokens; 0 = all
};

void latent_call(Bench& bench, const std::string& name, const LatentCall& c) {
  bench.row("latent attention", name, [&](Scene& s) {
    const int64_t batch = std::ssize(c.behind);
    const int64_t tokens = batch * c.length;
    const int64_t longest = *std::max_element(c.behind.begin(), c.behind.end()) + c.length;
    const auto pages = std::make_shared<Pages>(batch, longest);
    const Tensor q = s.bf16({tokens, c.heads, kRank + kRope});
    const Tensor latent = s.bf16({tokens, kRank});
    const Tensor key = s.bf16({tokens, kRope});
    const LatentPages to{s.bf16({pages->count(), kPage, 4, kRank / 4}),
                         s.bf16({pages->count(), kPage, 1, kRope}), pages->table,
                         pages->per_sequence};
    Packed& packed = s.packed(batch, c.length, 0);
    packed.position = c.behind;
    double keys = 0.0;   // that are read
    double pairs = 0.0;  // of tokens and keys
    std::vector<int32_t> positions;
    for (const int32_t behind : c.behind) {
      keys += static_cast<double>(c.chosen == 0 ? behind + c.length : c.chosen);
      for (int64_t i = 0; i < c.length; ++i) {
        pairs += static_cast<double>(c.chosen == 0 ? behind + i + 1 : c.chosen);
        for (int64_t j = 0; j < c.chosen; ++j) {
          positions.push_back(static_cast<int32_t>((j + 1) * (behind + i + 1) / c.chosen - 1));
        }
      }
    }
    ChosenTokens choice;
    if (c.chosen > 0) {
      const auto bytes = static_cast<int64_t>(positions.size() * sizeof(int32_t));
      auto* there = static_cast<int32_t*>(s.inputs.allocate(bytes));
      copy_memory(there, kDevice, positions.data(), Device{}, bytes);
      choice = {there, c.chosen};
    }
    Work work = least(keys * 2 * (kRank + kRope),
                      2.0 * pairs * static_cast<double>(c.heads * (2 * kRank + kRope)));
    work.call = [=, &s, &packed](int64_t) {
      const Segments segments = packed.view();
      write_latents(s.ctx, latent, key, segments, to);
      latent_attention(s.ctx, q, latent, key, segments, kScale, choice, &to);
      (void)pages;
    };
    return work;
  });
}

// Single tokens at the ends of `batch` sequences.
void latent_decode(Bench& bench, int64_t heads, int64_t batch, int64_t context,
                   int64_t chosen = 0) {
  const std::string keys =
      chosen == 0 ? fmt::format("at {}", context) : fmt::format("{} of {}", chosen, context);
  latent_call(
      bench, fmt::format("decode, {} heads, batch {} {}", heads, batch, keys),
      {heads, std::vector<int32_t>(static_cast<size_t>(batch), static_cast<int32_t>(context - 1)),
       1, chosen});
}

// The same of 64 sequences of 1,024, 2,048, .. 65,536 tokens, and a piece of a prompt.
void latent_others(Bench& bench, int64_t heads) {
  std::vector<int32_t> behind;
  for (int32_t i = 1; i <= 64; ++i) {
    behind.push_back(i * 1024 - 1);
  }
  latent_call(bench, fmt::format("decode, {} heads, 64 at 1024 to 65536", heads), {heads, behind});
  latent_call(bench, fmt::format("{} heads, 2048 tokens after 14336", heads),
              {heads, {14336}, 2048});
}

void choice_decode(Bench& bench, int64_t batch, int64_t context) {
  constexpr int64_t kIndexHeads = 64, kIndexDim = 128, kBudget = 2048;
  bench.row("choice of 2,048 tokens", fmt::format("batch {} at {}", batch, context), [&](Scene& s) {
    const auto pages = std::make_shared<Pages>(batch, context);
    const Tensor q = s.bf16({batch, kIndexHeads, kIndexDim});
    const Tensor k = s.bf16({batch, kIndexDim});
    const Tensor weight = s.bf16({batch, kIndexHeads});
    const IndexPages to{s.bf16({pages->count(), kPage, 1, kIndexDim}), pages->table,
                        pages->per_sequence};
    Packed& packed = s.packed(batch, 1, context - 1);
    Work work = least(static_cast<double>(batch * context * 2 * kIndexDim),
                      2.0 * static_cast<double>(batch * context * kIndexHeads * kIndexDim));
    work.call = [=, &s, &packed](int64_t) {
      choose_tokens(s.ctx, q, k, weight, packed.view(), {.top = kBudget}, &to);
      (void)pages;
    };
    return work;
  });
}

// Keys of 192 and values of 128 numbers.
void expanded_prefill(Bench& bench, int64_t heads, int64_t tokens) {
  bench.row("expanded latents, prefill", fmt::format("{} heads, {} tokens", heads, tokens),
            [&](Scene& s) {
              const Tensor q = s.bf16({tokens, heads, kNope + kRope});
              const Tensor k = s.bf16({tokens, heads, kNope + kRope});
              const Tensor v = s.bf16({tokens, heads, kNope});
              Packed& packed = s.packed(1, tokens, 0);
              const double pairs = 0.5 * static_cast<double>(tokens * (tokens + 1));
              Work work;
              work.flops = 2.0 * pairs * static_cast<double>(heads * (2 * kNope + kRope));
              work.call = [=, &s, &packed](int64_t) {
                attention(s.ctx, q, k, v, packed.view(), {.scale = kScale});
              };
              return work;
            });
}

void absorbed(Bench& bench, int64_t heads, int64_t tokens) {
  bench.row("product a head, 128 x 512", fmt::format("{} heads, {} tokens", heads, tokens),
            [&](Scene& s) {
              const Tensor weight = s.bf16({heads, kNope, kRank}, -0.02, 0.02);
              const Tensor q = s.bf16({tokens, heads, kNope});
              Work work =
                  least(bytes_of({weight, q}) + 2.0 * static_cast<double>(tokens * heads * kRank),
                        2.0 * static_cast<double>(tokens * heads * kNope * kRank));
              work.call = [=, &s](int64_t) { head_matmul_transposed(s.ctx, q, weight); };
              return work;
            });
}

// A layer of routed experts, whose choices random logits make.
struct Layer {
  int64_t count, top, width, inner;
};

std::string shape_of(const Layer& l, int64_t tokens) {
  return fmt::format("{} tokens, {} of {}, {} x {}", tokens, l.top, l.count, l.width, l.inner);
}
// The share of the experts that have rows.
double met(const Layer& l, int64_t tokens) {
  return 1.0 - std::pow(1.0 - static_cast<double>(l.top) / static_cast<double>(l.count),
                        static_cast<double>(tokens));
}
double product_flops(const Layer& l, int64_t tokens) {
  return 2.0 * static_cast<double>(tokens * l.top * l.width * l.inner);
}
Routing routing_of(Context& ctx, const Tensor& logits, const Layer& l) {
  return route(ctx, logits, {}, {.top = l.top, .renormalise = true});
}

// Up and down with all that leads to them and from them: bytes of the experts that have rows.
void experts(Bench& bench, const Layer& l, int64_t tokens) {
  bench.row("experts, up and down", shape_of(l, tokens), [&](Scene& s) {
    const Tensor up = s.bf16({l.count, l.inner, l.width}, -0.02, 0.02);
    const Tensor down = s.bf16({l.count, l.width, l.inner}, -0.02, 0.02);
    Work work = least(bytes_of({up, down}) * met(l, tokens), 2.0 * product_flops(l, tokens));
    // The few weights that a few tokens choose are not to be in the caches from the call before.
    work.sets = tokens <= 16 ? 16 : 1;
    const Tensor x = s.bf16({work.sets * tokens, l.width});
    const Tensor logits = s.bf16({work.sets * tokens, l.count});
    work.call = [=, &s](int64_t set) {
      const Routing routing = routing_of(s.ctx, part_of(logits, set, tokens), l);
      const Tensor rows = dispatch(s.ctx, part_of(x, set, tokens), routing);
      const Tensor hidden = experts_matmul(s.ctx, rows, up, {}, routing);
      combine(s.ctx, experts_matmul(s.ctx, hidden, down, {}, routing), routing);
    };
    return work;
  });
}

// A whole gated layer, as a forward call alone has it, batch-invariant or not.
void experts_layer(Bench& bench, const Layer& l, int64_t tokens, bool invariant) {
  const char* name = invariant ? "experts, a gated layer, invariant" : "experts, a gated layer";
  bench.row(name, shape_of(l, tokens), [&](Scene& s) {
    s.ctx.batch_invariant = invariant;
    const Tensor gate = s.bf16({l.count, l.inner, l.width}, -0.02, 0.02);
    const Tensor up = s.bf16({l.count, l.inner, l.width}, -0.02, 0.02);
    const Tensor down = s.bf16({l.count, l.width, l.inner}, -0.02, 0.02);
    Work work = least(bytes_of({gate, up, down}) * met(l, tokens), 3.0 * product_flops(l, tokens));
    work.sets = tokens <= 16 ? 16 : 1;
    const Tensor x = s.bf16({work.sets * tokens, l.width});
    const Tensor logits = s.bf16({work.sets * tokens, l.count});
    work.call = [=, &s](int64_t set) {
      const Routing routing = routing_of(s.ctx, part_of(logits, set, tokens), l);
      const Tensor hidden =
          experts_hidden(s.ctx, part_of(x, set, tokens), gate, {}, up, {}, 0.0F, routing);
      combine(s.ctx, experts_matmul(s.ctx, hidden, down, {}, routing), routing);
    };
    return work;
  });
}

// The product up alone, batch-invariant or not, or with fp32 weights and its gradients.
enum class Product { kAlone, kInvariant, kTrained };
void product_of_experts(Bench& bench, const Layer& l, int64_t tokens, Product product) {
  const bool trained = product == Product::kTrained;
  const bool invariant = product == Product::kInvariant;
  bench.row(
      trained     ? "experts, up, forward + backward"
      : invariant ? "experts, up alone, invariant"
                  : "experts, up alone",
      shape_of(l, tokens), [&](Scene& s) {
        s.ctx.batch_invariant = invariant;
        const Dtype stored = trained ? Dtype::kF32 : Dtype::kBF16;
        const auto leaf = [&](const Tensor& t) { return trained ? s.leaf(t) : Leaf{t, nullptr}; };
        const Leaf up = leaf(s.input(stored, {l.count, l.inner, l.width}, -0.02, 0.02));
        const Leaf rows = leaf(s.bf16({tokens * l.top, l.width}));
        const Tensor logits = s.bf16({tokens, l.count});
        Work work = least(bytes_of({up.value}) * met(l, tokens), product_flops(l, tokens));
        if (trained) {
          work = {};
          work.flops = 3.0 * product_flops(l, tokens);
        }
        const auto routing = std::make_shared<Routing>();
        work.prepare = [=, &s](int64_t) { *routing = routing_of(s.ctx, logits, l); };
        work.call = [=, &s](int64_t) {
          if (!trained) {
            experts_matmul(s.ctx, rows.value, up.value, {}, *routing);
            return;
          }
          s.set_gradient(experts_matmul(s.recorded, s.fresh(rows), s.fresh(up), {}, *routing));
          s.tape.backward(s.recorded);
        };
        return work;
      });
}

}  // namespace

void latent_section(Bench& bench) {
  for (const int64_t heads : {32, 128}) {
    for (const auto& [batch, context] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 8192}, {1, 131072}, {16, 32768}, {64, 8192}}) {
      latent_decode(bench, heads, batch, context);
    }
    for (const int64_t batch : {1, 64}) {
      latent_decode(bench, heads, batch, 32768, 2048);
    }
    latent_others(bench, heads);
    expanded_prefill(bench, heads, 8192);
    for (const int64_t tokens : {1, 8, 64, 8192}) {
      absorbed(bench, heads, tokens);
    }
  }
  latent_decode(bench, 32, 1, 1 << 20);
  for (const int64_t batch : {1, 16}) {
    choice_decode(bench, batch, 131072);
  }
}

void experts_section(Bench& bench) {
  constexpr Layer kLayers[] = {{512, 10, 2048, 512},   // Qwen3-Next
                               {256, 8, 2304, 1024},   // Kimi-Linear
                               {256, 8, 7168, 2048},   // DeepSeek-V3.2
                               {32, 2, 6144, 9216},    // MiniMax-M1
                               {128, 6, 2688, 1856},   // Nemotron-3-Nano
                               {128, 4, 2880, 2880}};  // gpt-oss-120b
  for (const int64_t tokens : {1, 16, 80, 256, 1024, 8192}) {
    for (const Layer& l : kLayers) {
      experts(bench, l, tokens);
      experts_layer(bench, l, tokens, false);
    }
  }
  for (const Layer& l : kLayers) {
    for (const int64_t tokens : {16, 80, 256, 1024, 2048, 4096, 8192, 32768}) {
      product_of_experts(bench, l, tokens, Product::kAlone);
    }
    for (const int64_t tokens : {1024, 8192, 32768}) {
      product_of_experts(bench, l, tokens, Product::kInvariant);
    }
    experts_layer(bench, l, 8192, true);
    product_of_experts(bench, l, 8192, Product::kTrained);
  }
}

}  // namespace cambium
