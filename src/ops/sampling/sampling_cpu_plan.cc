// Rows of logits are dealt to threads. A row is read by a kernel; only a row that is not greedy
// goes through the candidates of the definition.
#include "base/parallel.h"
#include "ops/sampling/logit_rows.h"
#include "ops/sampling/sampling_ref.h"
#include "tensor/arena.h"

namespace cambium {

void sample_rows::cpu(const SampleRows<float>& a, Arena& /*arena*/) {
  parallel_for(a.logits.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const std::span<const float> row(a.logits.row(r), static_cast<size_t>(a.logits.channels));
      int32_t best = -1;
      double log_sum = 0.0;
      read_logit_row({a.logits.channels, row.data(), &best, &log_sum});
      const bool plain = best >= 0 && std::isfinite(row[static_cast<size_t>(best)]);
      if (!plain) {
        best = definition::argmax(row);
      }
      a.token[r] = definition::draw(row, a.config[r], a.uniform[r], best);
      const auto chosen = static_cast<double>(row[static_cast<size_t>(a.token[r])]);
      const auto largest = static_cast<double>(row[static_cast<size_t>(best)]);
      a.log_probability[r] = static_cast<float>(
          plain ? chosen - largest - log_sum : definition::log_probability(row, a.token[r]));
    }
  });
}

void penalise_rows::cpu(const PenaliseRows<float>& a, Arena& /*arena*/) {
  reference(a);  // a few tokens of each row
}

void rank_rows::cpu(const RankRows<float>& a, Arena& /*arena*/) {
  parallel_for(a.logits.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (a.wanted[r] < 0) {
        continue;
      }
      const std::span<const float> row(a.logits.row(r), static_cast<size_t>(a.logits.channels));
      int32_t best = -1;
      double log_sum = 0.0;
      read_logit_row({a.logits.channels, row.data(), &best, &log_sum});
      // Without a finite largest logit there are no probabilities.
      const double shift =
          best >= 0 ? static_cast<double>(row[static_cast<size_t>(best)]) + log_sum : NAN;
      const auto log_probability = [&](int32_t token) {
        return static_cast<float>(static_cast<double>(row[static_cast<size_t>(token)]) - shift);
      };
      a.log_probability[r] = log_probability(a.token[r]);
      RankedToken* ranked = a.likeliest + r * a.most;
      for (const int32_t token : definition::likeliest(row, a.wanted[r])) {
        *ranked++ = {token, log_probability(token)};
      }
    }
  });
}

}  // namespace cambium
