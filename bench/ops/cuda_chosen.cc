// Attention to chosen blocks of cuda_bench, and the choice, at the sizes of MiniMax-M3: 64 query
// heads on 4 of keys, all of 128 numbers, 16 of the blocks of 128 tokens for each head of keys;
// beside it attention to everything.
#include <memory>
#include <numeric>
#include <vector>

#include "cuda_machine.h"
#include "cuda_sections.h"
#include "ops/chosen_attention/chosen_attention.h"
#include "ops/selection/selection.h"

namespace cambium {
namespace {

constexpr int64_t kHeads = 64, kKvHeads = 4, kDim = 128;
constexpr int64_t kPage = 32;
constexpr float kScale = 0.0883883F;  // 128^-0.5
constexpr Selection kBlocks{Granularity::kBlock, 16, 128, 1};

/// `batch` sequences of which `length` tokens come after `behind` that are in the pages.
struct Call {
  int64_t batch, behind, length;

  int64_t tokens() const { return batch * length; }
  int64_t context() const { return behind + length; }
};

std::string name_of(const Call& c) {
  return c.length == 1 ? fmt::format("decode, batch {} at {}", c.batch, c.context())
                       : fmt::format("{} tokens after {}", c.length, c.behind);
}

/// Tokens and the keys that each looks at: all before it, or what it chooses.
double pairs(const Call& c, bool chosen) {
  double sum = 0.0;
  for (int64_t own = c.behind; own < c.context(); ++own) {
    const int64_t whole = (kBlocks.top - 1) * kBlocks.size + own % kBlocks.size;
    sum += static_cast<double>(chosen ? std::min(own, whole) + 1 : own + 1);
  }
  return sum * static_cast<double>(c.batch);
}

/// Bytes or operations, whichever takes the device longer.
Work least(double bytes, double flops) {
  const bool multiplies = flops / 800e12 > bytes / 4.2e12;
  Work work;
  (multiplies ? work.flops : work.bytes) = multiplies ? flops : bytes;
  return work;
}

/// Pages of all sequences, in order, and what a call has on them.
struct Held {
  Held(Scene& s, const Call& c)
      : per_sequence((c.context() + kPage - 1) / kPage),
        table(static_cast<size_t>(c.batch * per_sequence)),
        packed(s.packed(c.batch, c.length, c.behind)) {
    std::iota(table.begin(), table.end(), 0);
  }
  Tensor pages(Scene& s, int64_t heads) const {
    return s.bf16({std::ssize(table), kPage, heads, kDim});
  }

  int64_t per_sequence;
  std::vector<int32_t> table;
  Packed& packed;
};

void choice(Bench& bench, const Call& c) {
  bench.row("choice of 16 blocks of 128", name_of(c), [&](Scene& s) {
    const auto held = std::make_shared<Held>(s, c);
    const Tensor q = s.bf16({c.tokens(), kKvHeads, kDim});
    const Tensor k = s.bf16({c.tokens(), kDim});
    const IndexPages to{held->pages(s, 1), held->table, held->per_sequence};
    Work work = least(static_cast<double>(c.batch * c.context() * 2 * kDim),
                      2.0 * pairs(c, false) * static_cast<double>(kKvHeads * kDim));
    work.call = [=, &s](int64_t) {
      choose_tokens(s.ctx, q, k, {}, held->packed.view(), kBlocks, &to);
    };
    return work;
  });
}

void attend(Bench& bench, const Call& c, bool chosen) {
  bench.row(chosen ? "attention to 16 blocks of 128" : "attention to all beside it", name_of(c),
            [&](Scene& s) {
              const auto held = std::make_shared<Held>(s, c);
              const Tensor q = s.bf16({c.tokens(), kHeads, kDim});
              const Tensor k = s.bf16({c.tokens(), kKvHeads, kDim});
              const Tensor v = s.bf16({c.tokens(), kKvHeads, kDim});
              KvPages to{held->pages(s, kKvHeads), held->pages(s, kKvHeads), held->table,
                         held->per_sequence};
              const double looks = pairs(c, chosen);
              const double all = static_cast<double>(c.batch * c.context());
              Work work = least(std::min(looks, all) * static_cast<double>(4 * kKvHeads * kDim),
                                4.0 * looks * static_cast<double>(kHeads * kDim));
              // Queries of an index choose as random ones do: each its own blocks.
              const Tensor index_q = s.bf16({c.tokens(), kKvHeads, kDim});
              const Tensor index_k = s.bf16({c.tokens(), kDim});
              const IndexPages index{held->pages(s, 1), held->table, held->per_sequence};
              const auto lists = std::make_shared<ChosenTokens>();
              if (chosen) {
                work.prepare = [=, &s](int64_t) {
                  *lists = choose_tokens(s.ctx, index_q, index_k, {}, held->packed.view(), kBlocks,
                                         &index);
                };
              }
              work.call = [=, &s](int64_t) {
                if (chosen) {
                  chosen_attention(s.ctx, q, k, v, held->packed.view(), kScale, *lists, &to);
                } else {
                  attention(s.ctx, q, k, v, held->packed.view(), {.scale = kScale}, &to);
                }
              };
              return work;
            });
}

}  // namespace

void chosen_section(Bench& bench) {
  for (const Call& c : {Call{1, 32767, 1}, Call{1, 131071, 1}, Call{16, 32767, 1},
                        Call{1, 24576, 8192}, Call{1, 122880, 8192}}) {
    choice(bench, c);
    attend(bench, c, true);
    attend(bench, c, false);
  }
}

}  // namespace cambium
