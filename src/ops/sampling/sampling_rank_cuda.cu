// What is asked of rows of logits beside a draw. Penalties: a block takes a row and its threads the
// tokens of its list, which are each there once. Ranks: a block takes a row and reads it for the
// largest logit and for the sum of exponentials, as sampling does; then the likeliest tokens come
// one after the other, the largest of what the threads hold: each its own largest that is not taken
// yet, and the one whose was taken reads its share again.
#include "ops/sampling/sampling_cuda.cuh"

namespace cambium::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(512) penalise(PenaliseRows<T> a) {
  const int64_t r = blockIdx.x;
  const SamplingConfig config = a.config[r];
  T* row = a.logits.row(r);
  const int64_t end = a.start[r + 1];
  for (int64_t i = a.start[r] + threadIdx.x; i < end; i += blockDim.x) {
    const SeenToken seen = a.seen[i];
    const float x = load(row + seen.token);
    float lowered = x > 0.0F ? x / config.repetition : x * config.repetition;
    if (seen.generated > 0) {
      lowered -= config.frequency * static_cast<float>(seen.generated) + config.presence;
    }
    store(row + seen.token, lowered);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 1) rank(RankRows<T> a) {
  __shared__ Units part[kWarps];
  __shared__ double part_double[kWarps];
  const int64_t r = blockIdx.x;
  const int32_t wanted = a.wanted[r];
  if (wanted < 0) {
    return;
  }
  const T* logits = a.logits.row(r);
  const int64_t n = a.logits.channels;
  const auto visit = [&](const auto& f) {
    visit_row<V>(logits, 0, n, static_cast<int>(threadIdx.x), kThreads, f);
  };
  uint64_t own = 0;
  visit([&](float x, int64_t i) { own = max(own, listed_token(x, i)); });
  uint64_t best = block_largest(own, part);
  const float largest = from_order(key_of(best));  // NaN where all are
  ExpSum exps;
  visit([&](float x, int64_t) { exps.add(expf(x - largest)); });
  const double log_sum = log(block_total(exps.total(), part_double));
  const auto log_probability = [&](int32_t token) {
    return static_cast<float>(static_cast<double>(load(logits + token)) -
                              static_cast<double>(largest) - log_sum);
  };
  if (threadIdx.x == 0) {
    const int32_t token = a.token[r];
    a.log_probability[r] = log_probability(token);
  }
  for (int32_t rank = 0; rank < wanted; ++rank) {
    if (threadIdx.x == 0) {
      const int32_t token = index_of(best);
      a.likeliest[r * a.most + rank] = {token, log_probability(token)};
    }
    if (own == best) {
      own = 0;
      visit([&](float x, int64_t i) {
        const uint64_t token = listed_token(x, i);
        own = token < best ? max(own, token) : own;
      });
    }
    best = block_largest(own, part);
  }
}

template <class T>
void run_penalise(const PenaliseRows<T>& a, const Launch& on) {
  launch(on, "penalise_rows", penalise<T>, static_cast<unsigned>(a.logits.count()), 512, 0, a);
}

template <class T>
void run_rank(const RankRows<T>& a, const Launch& on) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto rows = static_cast<unsigned>(a.logits.count());
  if (rows_are_packs(a.logits)) {
    launch(on, "rank_rows", rank<T, kWidth>, rows, kThreads, 0, a);
  } else {
    launch(on, "rank_rows", rank<T, 1>, rows, kThreads, 0, a);
  }
}

}  // namespace

void penalise_rows(const PenaliseRows<float>& a, const Launch& on) {
  run_penalise(a, on);
}
void penalise_rows(const PenaliseRows<bf16>& a, const Launch& on) {
  run_penalise(a, on);
}
void rank_rows(const RankRows<float>& a, const Launch& on) {
  run_rank(a, on);
}
void rank_rows(const RankRows<bf16>& a, const Launch& on) {
  run_rank(a, on);
}

}  // namespace cambium::cuda
