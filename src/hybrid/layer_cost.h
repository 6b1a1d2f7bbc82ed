// What a layer of each kind of mixer costs, in the engine that serves: time of a decode step or of
// a prefill at a context length, or bytes of the cache. Costs that are counted from shapes rank
// kinds otherwise than the server does (Super Apriel's presets by ideal costs were much slower
// than their number said), so times are measured here.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/json_fields.h"
#include "eval/throughput.h"
#include "hybrid/importance.h"
#include "hybrid/mixer_bank.h"

namespace cambium {

enum class CostKind { kDecode, kPrefill, kCache };
/// "decode", "prefill" or "cache"; Error with the nearest otherwise.
CostKind parse_cost_kind(const std::string& name);
const char* cost_kind_name(CostKind kind);
/// "ms a step", "ms a prompt", "bytes a sequence".
const char* cost_unit(CostKind kind);

struct CostConfig {
  CostKind kind = CostKind::kCache;
  int64_t context = 4096;  // tokens
  int64_t batch = 1;       // sequences at once; of times
  int64_t repeats = 5;     // of times
  Dtype values = Dtype::kBF16;
};

struct LayerCosts {
  CostKind kind = CostKind::kCache;
  /// What decides them: context, batch, device, threads, type of the cache, the kinds.
  Fingerprint question;
  std::vector<std::string> kinds;
  std::vector<std::vector<double>> layers;  // (L, M) of the open layers; infinite = not to be had
  double rest = 0.0;                        // of all that placements do not change
  /// A model that was timed: layers of each kind, what it took (the median with the least and the
  /// largest) and what the costs say it takes. None of cache bytes, which are exact.
  struct Row {
    std::vector<int64_t> counts;
    Measured measured;
    double fitted = 0.0;
  };
  std::vector<Row> rows = {};

  /// A model with one layer of the kind, the others attention: of each kind but attention, whose
  /// row is empty. Not part of the fit. Empty of cache bytes, and of costs that were kept without
  /// them.
  std::vector<Row> alone = {};

  /// Of a whole model.
  double of(const Choices& choices) const;
  double teacher() const { return of(Choices(layers.size(), 0)); }
  /// The largest |fitted - measured| as a share of what was measured.
  double worst_fit() const;
  /// Whether one layer of the kind took longer than its share, beyond what the fit is off by: in
  /// every round.
  bool slow_alone(size_t kind) const;
};

/// What tells one question about costs from another.
Fingerprint cost_question(const MixerBank& bank, const CostConfig& config);

/// Times: models of which all, and every second, open layer has a kind or no mixer at all take
/// turns, and those of which one layer has it; a layer's cost is by least squares over the former
/// and the same in every layer. A cost that the noise makes negative is 0. Bytes are the cache
/// plan's.
LayerCosts measure_layer_costs(const MixerBank& bank, const CostConfig& config);

nlohmann::ordered_json costs_json(const LayerCosts& costs);
LayerCosts read_costs(const JsonFields& json);

}  // namespace cambium
