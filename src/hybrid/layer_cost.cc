#include "hybrid/layer_cost.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/parallel.h"
#include "base/text.h"
#include "hybrid/least_squares.h"
#include "serve/cache_plan.h"

namespace cambium {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct KindName {
  CostKind kind;
  const char* name;
  const char* unit;
};
constexpr KindName kNames[] = {{CostKind::kDecode, "decode", "ms a step"},
                               {CostKind::kPrefill, "prefill", "ms a prompt"},
                               {CostKind::kCache, "cache", "bytes a sequence"}};

const KindName& row_of(CostKind kind) {
  return *std::find_if(std::begin(kNames), std::end(kNames),
                       [&](const KindName& row) { return row.kind == kind; });
}

void count_cache(const MixerBank& bank, const CostConfig& config, LayerCosts& costs) {
  CacheConfig cache;
  cache.values = config.values;
  cache.max_tokens = config.context;
  for (int kind = 0; kind < static_cast<int>(costs.kinds.size()); ++kind) {
    const Model model(bank.spec(bank.all(kind)));
    const CachePlan plan(model, cache);
    for (size_t i = 0; i < costs.layers.size(); ++i) {
      if (bank.has(static_cast<int64_t>(i), kind)) {
        const LayerBytes& bytes = plan.layers()[static_cast<size_t>(bank.layers()[i])];
        costs.layers[i][static_cast<size_t>(kind)] =
            static_cast<double>(bytes.per_token * config.context + bytes.per_sequence);
      }
    }
    if (kind == 0) {
      for (size_t l = 0; l < plan.layers().size(); ++l) {
        if (std::find(bank.layers().begin(), bank.layers().end(), static_cast<int64_t>(l)) ==
            bank.layers().end()) {
          costs.rest += static_cast<double>(plan.layers()[l].per_token * config.context +
                                            plan.layers()[l].per_sequence);
        }
      }
    }
  }
}

void time_layers(const MixerBank& bank, const CostConfig& config, LayerCosts& costs) {
  const int kinds = static_cast<int>(costs.kinds.size());
  std::vector<Choices> timed = {bank.all(0)};
  const auto add = [&](int kind) {
    timed.push_back(bank.all(kind));
    timed.push_back(timed.back());
    for (size_t i = 1; i < timed.back().size(); i += 2) {
      timed.back()[i] = 0;
    }
  };
  for (int kind = 1; kind < kinds; ++kind) {
    add(kind);
  }
  add(-1);
  const size_t fitted = timed.size();
  costs.alone.resize(1);  // all else is attention, so that no model has one layer of it
  for (int kind = 1; kind < kinds; ++kind) {  // in the first layer that can have it
    timed.push_back(bank.all(0));
    for (size_t i = 0; i < timed.back().size(); ++i) {
      if (bank.has(static_cast<int64_t>(i), kind)) {
        timed.back()[i] = kind;
        break;
      }
    }
  }
  std::vector<LoadedModel> models;
  std::vector<Model*> pointers;
  for (const Choices& choices : timed) {
    models.push_back(bank.build(choices));
    pointers.push_back(models.back().model.get());
  }
  ThroughputConfig speed;
  speed.contexts = {config.context};
  speed.batch = config.batch;
  speed.repeats = config.repeats;
  speed.cache_values = config.values;
  const bool decode = config.kind == CostKind::kDecode;
  speed.prefill = !decode;
  speed.decode_tokens = decode ? 32 : 1;
  const auto speeds = measure_throughput(pointers, speed);
  std::vector<double> rows;
  std::vector<double> times;
  const double tokens = static_cast<double>(config.batch * (decode ? 1 : config.context));
  for (size_t i = 0; i < timed.size(); ++i) {
    const SpeedSummary& s = speeds[i].front();
    const Measured& rate = decode ? s.decode : s.prefill;
    LayerCosts::Row row{
        std::vector<int64_t>(costs.kinds.size(), 0),
        {1e3 * tokens / rate.value, 1e3 * tokens / rate.high, 1e3 * tokens / rate.low}};
    for (const int kind : timed[i]) {
      if (kind >= 0) {
        ++row.counts[static_cast<size_t>(kind)];
      }
    }
    if (i < fitted) {
      rows.push_back(1.0);
      rows.insert(rows.end(), row.counts.begin(), row.counts.end());
      times.push_back(row.measured.value);
      costs.rows.push_back(std::move(row));
    } else {
      costs.alone.push_back(std::move(row));
    }
  }
  const std::vector<double> fit = least_squares(rows, times, kinds + 1);
  costs.rest = std::max(fit[0], 0.0);
  for (size_t i = 0; i < costs.layers.size(); ++i) {
    for (int kind = 0; kind < kinds; ++kind) {
      if (bank.has(static_cast<int64_t>(i), kind)) {
        costs.layers[i][static_cast<size_t>(kind)] =
            std::max(fit[static_cast<size_t>(kind) + 1], 0.0);
      }
    }
  }
  for (std::vector<LayerCosts::Row>* table : {&costs.rows, &costs.alone}) {
    for (LayerCosts::Row& row : *table) {
      row.fitted = costs.rest;
      for (size_t k = 0; k < row.counts.size(); ++k) {
        row.fitted += static_cast<double>(row.counts[k]) * std::max(fit[k + 1], 0.0);
      }
    }
  }
}

}  // namespace

CostKind parse_cost_kind(const std::string& name) {
  std::vector<std::string> known;
  for (const KindName& row : kNames) {
    if (row.name == name) {
      return row.kind;
    }
    known.emplace_back(row.name);
  }
  fail("unknown cost '{}'{}; known: {}", name, did_you_mean(name, known), join(known, ", "));
}

const char* cost_kind_name(CostKind kind) {
  return row_of(kind).name;
}
const char* cost_unit(CostKind kind) {
  return row_of(kind).unit;
}

double LayerCosts::of(const Choices& choices) const {
  double sum = rest;
  for (size_t i = 0; i < layers.size(); ++i) {
    sum += layers[i][static_cast<size_t>(choices[i])];
  }
  return sum;
}

double LayerCosts::worst_fit() const {
  double worst = 0.0;
  for (const Row& row : rows) {
    worst = larger_error(worst, std::abs(row.fitted - row.measured.value) / row.measured.value);
  }
  return worst;
}

bool LayerCosts::slow_alone(size_t kind) const {
  return kind > 0 && kind < alone.size() &&
         alone[kind].measured.low > alone[kind].fitted * (1.0 + worst_fit());
}

Fingerprint cost_question(const MixerBank& bank, const CostConfig& config) {
  Fingerprint f;
  f["kinds"] = join(bank.kinds(), ", ");
  f["context"] = fmt::format("{} tokens", config.context);
  f["cache"] = dtype_name(config.values);
  if (config.kind != CostKind::kCache) {
    f["batch"] = fmt::format("{}", config.batch);
    f["repeats"] = fmt::format("{}", config.repeats);
    f["device"] = bank.teacher().device().describe();
    f["activations"] = dtype_name(bank.teacher().activations());
    f["threads"] = fmt::format("{}", num_threads());
  }
  return f;
}

LayerCosts measure_layer_costs(const MixerBank& bank, const CostConfig& config) {
  expect(config.context > 0 && config.batch > 0 && config.repeats > 0,
         "costs: expected context, batch and repeats above 0");
  LayerCosts costs{config.kind, cost_question(bank, config), bank.kinds(), {}, 0.0};
  costs.layers.assign(bank.layers().size(), std::vector<double>(bank.kinds().size(), kInfinity));
  if (config.kind == CostKind::kCache) {
    count_cache(bank, config, costs);
  } else {
    time_layers(bank, config, costs);
  }
  return costs;
}

nlohmann::ordered_json costs_json(const LayerCosts& costs) {
  using Json = nlohmann::ordered_json;
  Json json{{"of", cost_kind_name(costs.kind)},
            {"unit", cost_unit(costs.kind)},
            {"question", costs.question},
            {"kinds", Json::array()},
            {"rest", costs.rest},
            {"layers", Json::array()}};
  for (const std::string& kind : costs.kinds) {
    json["kinds"].push_back({{"name", kind}});
  }
  for (const std::vector<double>& layer : costs.layers) {
    Json row = Json::array();
    for (const double cost : layer) {
      row.push_back(std::isfinite(cost) ? Json(cost) : Json(nullptr));
    }
    json["layers"].push_back({{"costs", row}});
  }
  for (const auto& [name, table] : {std::pair("timed", &costs.rows), {"alone", &costs.alone}}) {
    json[name] = Json::array();
    for (const LayerCosts::Row& row : *table) {
      json[name].push_back({{"counts", row.counts},
                            {"value", row.measured.value},
                            {"low", row.measured.low},
                            {"high", row.measured.high},
                            {"fitted", row.fitted}});
    }
  }
  return json;
}

LayerCosts read_costs(const JsonFields& json) {
  LayerCosts costs;
  costs.kind = parse_cost_kind(json.text("of"));
  costs.question = json.texts_by_name("question");
  for (const JsonFields& kind : json.objects("kinds")) {
    costs.kinds.push_back(kind.text("name"));
  }
  costs.rest = json.real("rest");
  for (const JsonFields& layer : json.objects("layers")) {
    std::vector<double> row = layer.reals("costs");
    expect(row.size() == costs.kinds.size(), "{}: expected a cost for each of {} kinds, got {}",
           layer.where(), costs.kinds.size(), row.size());
    for (double& cost : row) {
      cost = std::isnan(cost) ? kInfinity : cost;
      expect(cost >= 0.0, "{}: expected costs of at least 0, got {}", layer.where(), cost);
    }
    costs.layers.push_back(std::move(row));
  }
  expect(costs.rest >= 0.0, "{}: expected a rest of at least 0, got {}", json.where(), costs.rest);
  for (const auto& [name, table] : {std::pair("timed", &costs.rows), {"alone", &costs.alone}}) {
    if (json.has(name)) {
      for (const JsonFields& entry : json.objects(name)) {
        table->push_back({entry.wholes("counts", 0),
                          {entry.real("value"), entry.real("low"), entry.real("high")},
                          entry.real("fitted")});
      }
    }
  }
  return costs;
}

}  // namespace cambium
