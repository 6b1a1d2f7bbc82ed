// Private to the operation: what its definition and kernels are given.
#pragma once

#include "ops/kernel.h"
#include "ops/sampling/sampling_config.h"
#include "tensor/view.h"

namespace cambium {

template <class T>
struct SampleRows {
  View<T> logits;                // (R, V)
  const SamplingConfig* config;  // (R)
  const double* uniform;         // (R)
  int32_t* token;                // row r's at place(r)
  float* log_probability;
  const int32_t* places = nullptr;  // (R); null: r itself

  constexpr int64_t place(int64_t r) const { return places == nullptr ? r : places[r]; }
};
CAMBIUM_PLANNED_KERNEL(sample_rows, SampleRows)

template <class T>
struct PenaliseRows {
  View<T> logits;                // (R, V), changed in place
  const SamplingConfig* config;  // (R)
  const int64_t* start;          // (R + 1) where the tokens of each row begin
  const SeenToken* seen;         // of a row each token once
};
CAMBIUM_PLANNED_KERNEL(penalise_rows, PenaliseRows)

template <class T>
struct RankRows {
  View<T> logits;          // (R, V)
  const int32_t* token;    // (R)
  const int32_t* wanted;   // (R) of the likeliest tokens; a row of -1 is left out
  int64_t most;            // no row wants more
  float* log_probability;  // (R) of `token`
  RankedToken* likeliest;  // (R, most), the likeliest first
};
CAMBIUM_PLANNED_KERNEL(rank_rows, RankRows)

}  // namespace cambium
