// Rope as config.json says it: rope_theta beside rope_scaling, or both in rope_parameters.
#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "model/families/config.h"

namespace cambium::config {
namespace {

struct Kind {
  const char* name;
  RopeScaling scaling;
};
constexpr Kind kKinds[] = {
    {"default", RopeScaling::kNone},    {"linear", RopeScaling::kLinear},
    {"dynamic", RopeScaling::kDynamic}, {"llama3", RopeScaling::kLlama3},
    {"yarn", RopeScaling::kYarn},       {"longrope", RopeScaling::kLongRope},
    {"su", RopeScaling::kLongRope},  // longrope in older files
};
constexpr double kMaxFactor = 1e6;

std::string kind_of(const Json& scaling, const std::string& where) {
  const std::string type = text_or(scaling, "type", "", where);
  const std::string rope_type = text_or(scaling, "rope_type", "", where);
  expect(type.empty() || rope_type.empty() || type == rope_type,
         "{}: rope's 'type' is '{}' and its 'rope_type' '{}'; expected one kind", where, type,
         rope_type);
  const std::string kind = rope_type.empty() ? type : rope_type;
  return kind.empty() ? "default" : kind;
}

double positive(const Json& json, const char* key, double fallback, const std::string& where) {
  return in_range(where, key, real_or(json, key, fallback, where), 1e-6, kMaxFactor);
}

/// 0.1 m ln s + 1: what scores are multiplied by (its square) when s times as many keys compete.
double yarn_scale(double s, double m) {
  return s <= 1.0 ? 1.0 : 0.1 * m * std::log(s) + 1.0;
}

double yarn_attention_factor(const Json& scaling, double factor, const std::string& where) {
  const double all = real_or(scaling, "mscale_all_dim", 0.0, where);
  const double one = real_or(scaling, "mscale", 0.0, where);
  return all != 0.0 && one != 0.0 ? yarn_scale(factor, one) / yarn_scale(factor, all)
                                  : yarn_scale(factor, 1.0);
}

std::vector<double> factors(const Json& scaling, const char* key, int64_t count,
                            const std::string& where) {
  const auto it = scaling.find(key);
  expect(it != scaling.end() && it->is_array() && static_cast<int64_t>(it->size()) == count,
         "{}: expected '{}' to be a list of {} numbers, one a rotated pair", where, key, count);
  std::vector<double> list;
  for (const Json& entry : *it) {
    list.push_back(positive(Json{{key, entry}}, key, 0.0, where));
  }
  return list;
}

}  // namespace

std::pair<Json, std::optional<Json>> split_ropes(const Json& config) {
  Json full = config;
  std::optional<Json> local;
  const auto it = config.find("rope_parameters");
  if (it != config.end() && it->is_object() && it->contains("full_attention")) {
    full["rope_parameters"] = it->at("full_attention");
    if (it->contains("sliding_attention")) {
      local = Json{{"rope_parameters", it->at("sliding_attention")}};
    }
  }
  return {full, local};
}

void set_absent_scaling(Json& config, const Json& scaling) {
  if (!config.contains("rope_scaling") && !config.contains("rope_parameters")) {
    config["rope_scaling"] = scaling;
  }
}

RopeConfig read_rope(const Json& config, int64_t head_dim, int64_t max_positions,
                     const std::string& where) {
  RopeConfig rope;
  rope.theta = real_or(config, "rope_theta", absent_rope_theta(config), where);
  double partial = real_or(config, "partial_rotary_factor", 1.0, where);
  Json scaling = Json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (const auto it = config.find(key); it != config.end() && it->is_object()) {
      scaling = *it;
      expect(!has(scaling, "full_attention"),
             "{}: '{}' says rotations by kind of layer, which this family has not", where, key);
      rope.theta = real_or(scaling, "rope_theta", rope.theta, where);
      partial = real_or(scaling, "partial_rotary_factor", partial, where);
    }
  }
  rope.theta = in_range(where, "rope_theta", rope.theta, 1e-6, 1e18);
  partial = in_range(where, "partial_rotary_factor", partial, 0.0, 1.0);
  rope.dim = static_cast<int64_t>(static_cast<double>(head_dim) * partial);
  const std::string kind = kind_of(scaling, where);
  const Kind* row = nullptr;
  std::string names;
  for (const Kind& known : kKinds) {
    row = kind == known.name ? &known : row;
    names += names.empty() ? known.name : std::string(", ") + known.name;
  }
  expect(row != nullptr, "{}: rope scaling of type '{}' is not supported; this build knows {}",
         where, kind, names);
  rope.interleaved = flag_or(config, "rope_interleave", false, where);
  rope.query_beta = in_range(where, "llama_4_scaling_beta",
                             real_or(scaling, "llama_4_scaling_beta", 0.0, where), 0.0, kMaxFactor);
  rope.scaling = row->scaling;
  expect(rope.query_beta == 0.0 || rope.scaling != RopeScaling::kNone,
         "{}: 'llama_4_scaling_beta' counts original lengths; expected a rope scaling beside it",
         where);
  if (rope.scaling == RopeScaling::kNone) {
    return rope;
  }
  // Some files keep the original length outside the object.
  const int64_t outside = integer_or(config, "original_max_position_embeddings", max_positions, 1,
                                     kMaxPositions, where);
  const auto original = [&](int64_t absent) {
    return integer_or(scaling, "original_max_position_embeddings", absent, 1, kMaxPositions, where);
  };
  const auto ratio = [&] {
    return static_cast<double>(max_positions) / static_cast<double>(rope.original_length);
  };
  switch (rope.scaling) {
    case RopeScaling::kNone:
      break;
    case RopeScaling::kLinear:
    case RopeScaling::kDynamic:
      expect(has(scaling, "factor"), "{}: expected 'factor' for rope scaling {}", where, kind);
      rope.factor = positive(scaling, "factor", 1.0, where);
      rope.original_length = max_positions;
      break;
    case RopeScaling::kLlama3:
      rope.original_length = original(8192);
      rope.factor = positive(scaling, "factor", 8.0, where);
      rope.low_freq_factor = positive(scaling, "low_freq_factor", 1.0, where);
      rope.high_freq_factor = positive(scaling, "high_freq_factor", 4.0, where);
      expect(rope.high_freq_factor > rope.low_freq_factor,
             "{}: expected rope factor > 0 and high_freq_factor > low_freq_factor", where);
      break;
    case RopeScaling::kYarn:
      rope.original_length = original(outside);
      rope.factor = positive(scaling, "factor", ratio(), where);
      rope.beta_fast = positive(scaling, "beta_fast", 32.0, where);
      rope.beta_slow = positive(scaling, "beta_slow", 1.0, where);
      rope.truncate = flag_or(scaling, "truncate", true, where);
      rope.attention_factor = positive(scaling, "attention_factor",
                                       yarn_attention_factor(scaling, rope.factor, where), where);
      break;
    case RopeScaling::kLongRope: {
      rope.original_length = original(outside);
      rope.factor = positive(scaling, "factor", ratio(), where);
      const double length = static_cast<double>(rope.original_length);
      const double scale =
          rope.factor <= 1.0 ? 1.0 : std::sqrt(1.0 + std::log(rope.factor) / std::log(length));
      rope.attention_factor = positive(scaling, "attention_factor", scale, where);
      rope.short_factors = factors(scaling, "short_factor", rope.dim / 2, where);
      rope.long_factors = factors(scaling, "long_factor", rope.dim / 2, where);
      break;
    }
  }
  return rope;
}

Json write_rope_scaling(const RopeConfig& rope) {
  const auto* row = std::find_if(std::begin(kKinds), std::end(kKinds),
                                 [&](const Kind& kind) { return kind.scaling == rope.scaling; });
  Json scaling{{"rope_type", row->name}, {"factor", rope.factor}};
  if (rope.scaling == RopeScaling::kLlama3) {
    scaling["low_freq_factor"] = rope.low_freq_factor;
    scaling["high_freq_factor"] = rope.high_freq_factor;
  } else if (rope.scaling == RopeScaling::kYarn) {
    scaling["beta_fast"] = rope.beta_fast;
    scaling["beta_slow"] = rope.beta_slow;
    scaling["truncate"] = rope.truncate;
    scaling["attention_factor"] = rope.attention_factor;
  } else if (rope.scaling == RopeScaling::kLongRope) {
    scaling["short_factor"] = rope.short_factors;
    scaling["long_factor"] = rope.long_factors;
    scaling["attention_factor"] = rope.attention_factor;
  }
  if (rope.query_beta != 0.0) {
    scaling["llama_4_scaling_beta"] = rope.query_beta;
  }
  if (rope.scaling != RopeScaling::kLinear && rope.scaling != RopeScaling::kDynamic) {
    scaling["original_max_position_embeddings"] = rope.original_length;
  }
  return scaling;
}

double rotary_share(int64_t dim, int64_t head_dim) {
  const auto head = static_cast<double>(head_dim);
  double share = static_cast<double>(dim) / head;
  // 30 / 44 * 44 is a little less than 30, and the product is cut to a whole number.
  while (static_cast<int64_t>(head * share) < dim) {
    share = std::nextafter(share, 2.0);
  }
  return share;
}

void move_rope_to_parameters(Json& config, const RopeConfig& rope, int64_t head_dim) {
  Json parameters =
      has(config, "rope_scaling") ? config["rope_scaling"] : Json{{"rope_type", "default"}};
  parameters["rope_theta"] = rope.theta;
  if (rope.dim != head_dim) {
    parameters["partial_rotary_factor"] = rotary_share(rope.dim, head_dim);
  }
  config.erase("rope_scaling");
  config.erase("rope_theta");
  config["rope_parameters"] = parameters;
}

}  // namespace cambium::config
