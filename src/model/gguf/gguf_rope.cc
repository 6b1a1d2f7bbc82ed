#include "model/gguf/gguf_rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace cambium {
namespace {

// Divisors are stored as fp32 and parameters are short decimals.
constexpr double kTolerance = 1e-3;

/// Rotations per token of frequency i.
double turns(double theta, int64_t i, int64_t count) {
  return std::pow(theta, -static_cast<double>(i) / static_cast<double>(count)) /
         (2 * std::numbers::pi);
}

double rounded_if_near(double value) {
  const double whole = std::round(value);
  return std::abs(value - whole) < kTolerance * std::max(1.0, std::abs(whole)) ? whole : value;
}

bool gives(const Llama3Rope& parameters, std::span<const float> divisors, double theta) {
  const auto count = static_cast<int64_t>(divisors.size());
  for (int64_t i = 0; i < count; ++i) {
    const double wanted = divisors[static_cast<size_t>(i)];
    if (!(std::abs(llama3_divisor(parameters, theta, i, count) - wanted) <= kTolerance * wanted)) {
      return false;
    }
  }
  return true;
}

using Json = GgufJson;

Json llama3_json(const Llama3Rope& rope) {
  return {{"rope_type", "llama3"},
          {"factor", rope.factor},
          {"low_freq_factor", rope.low_freq_factor},
          {"high_freq_factor", rope.high_freq_factor},
          {"original_max_position_embeddings", static_cast<int64_t>(rope.original_length)}};
}

std::vector<float> rope_tensor(const Gguf& gguf, const GgufTensor& tensor, int64_t count) {
  expect(tensor.type == GgufType::kF32 && tensor.shape == std::vector<int64_t>{count},
         "{}: expected {} to be F32 ({}), half of what turns of a head", gguf.path(), tensor.name,
         count);
  std::vector<float> values(static_cast<size_t>(count));
  dequantise_rows(tensor, 0, 1, values);
  for (const float value : values) {
    expect(std::isfinite(value) && value > 0, "{}: {}: {} is no divisor of a frequency",
           gguf.path(), tensor.name, value);
  }
  return values;
}

Json shortest_of(const std::vector<float>& values) {
  Json list = Json::array();
  for (const float value : values) {
    list.push_back(shortest_decimal(value));
  }
  return list;
}

/// What yarn multiplies cosines and sines by.
double yarn_scale(double factor, double m) {
  return factor <= 1 ? 1 : 0.1 * m * std::log(factor) + 1;
}

/// What config.json says of the rotary frequencies' stretch, of `count` pairs; null = nothing.
Json read_scaling(GgufArchitectureKeys& keys, const GgufRope& rope, double theta, int64_t count) {
  const Gguf& gguf = keys.gguf();
  const std::string kind = keys.text("rope.scaling.type").value_or("none");
  // An older key for linear scaling.
  const auto factor = keys.positive("rope.scaling.factor");
  const auto linear = keys.positive("rope.scale_linear");
  const auto original = keys.size("rope.scaling.original_context_length");
  expect(original.value_or(1) > 0, "{}: '{}' is 0, expected more", gguf.path(),
         keys.named("rope.scaling.original_context_length"));
  const auto attention = keys.positive("rope.scaling.attn_factor");
  const auto fast = keys.positive("rope.scaling.yarn_beta_fast");
  const auto slow = keys.positive("rope.scaling.yarn_beta_slow");
  const auto multiplier = keys.positive("rope.scaling.yarn_log_multiplier");
  for (const auto& [key, plain] :
       {std::pair{"rope.scaling.yarn_ext_factor", 1.0}, {"rope.scaling.alpha", 0.0}}) {
    const auto value = keys.number(key);
    expect(!value || *value == plain, "{}: '{}' is {}, expected {}", gguf.path(), keys.named(key),
           value.value_or(0), plain);
  }
  const GgufTensor* freqs = gguf.find("rope_freqs.weight");
  const GgufTensor* longs = gguf.find("rope_factors_long.weight");
  const GgufTensor* shorts = gguf.find("rope_factors_short.weight");
  expect((freqs != nullptr) + (longs != nullptr || shorts != nullptr || kind == "longrope") +
                 (kind == "linear" || kind == "yarn" || linear.value_or(1) != 1) <=
             1,
         "{}: the rotary frequencies are stretched in more than one way ('{}' is '{}')",
         gguf.path(), keys.named("rope.scaling.type"), kind);
  if (freqs != nullptr) {
    try {
      const auto llama3 = recover_llama3_rope(rope_tensor(gguf, *freqs, count), theta);
      return llama3 ? llama3_json(*llama3) : Json();
    } catch (const Error& error) {
      fail("{}: rope_freqs.weight: {}", gguf.path(), error.what());
    }
  }
  if (longs != nullptr || shorts != nullptr || kind == "longrope") {
    expect(longs != nullptr && shorts != nullptr && original.has_value(),
           "{}: LongRoPE needs rope_factors_long.weight, rope_factors_short.weight and '{}'",
           gguf.path(), keys.named("rope.scaling.original_context_length"));
    Json scaling = {{"rope_type", "longrope"},
                    {"long_factor", shortest_of(rope_tensor(gguf, *longs, count))},
                    {"short_factor", shortest_of(rope_tensor(gguf, *shorts, count))},
                    {"original_max_position_embeddings", *original}};
    if (attention) {
      scaling["attention_factor"] = *attention;
    }
    return scaling;
  }
  if (kind == "linear" || (kind == "none" && linear.value_or(1) != 1)) {
    const double by = factor.value_or(linear.value_or(1));
    return by == 1 ? Json() : Json{{"rope_type", "linear"}, {"factor", by}};
  }
  if (kind == "yarn") {
    expect(factor && original, "{}: YaRN needs '{}' and '{}'", gguf.path(),
           keys.named("rope.scaling.factor"), keys.named("rope.scaling.original_context_length"));
    Json scaling = {{"rope_type", "yarn"},
                    {"factor", *factor},
                    {"original_max_position_embeddings", *original}};
    if (rope.scales_scores) {
      expect(multiplier && attention.value_or(1) == 1,
             "{}: YaRN of latent attention needs '{}', and '{}' to be 1", gguf.path(),
             keys.named("rope.scaling.yarn_log_multiplier"),
             keys.named("rope.scaling.attn_factor"));
      scaling["attention_factor"] = 1.0;
      scaling["mscale_all_dim"] = rounded_if_near(10 * *multiplier);
    } else if (const double by = attention.value_or(1); by != 1 || multiplier) {
      // llama.cpp multiplies what the factor gives anyway, 0.1 ln(factor) + 1, by attn_factor.
      scaling["attention_factor"] =
          by * yarn_scale(*factor, 1) / yarn_scale(*factor, multiplier.value_or(0));
    }
    if (fast) {
      scaling["beta_fast"] = *fast;
    }
    if (slow) {
      scaling["beta_slow"] = *slow;
    }
    if (!rope.truncate) {
      scaling["truncate"] = false;
    }
    const char* temperature = "attention.temperature_scale";
    if (const auto beta = keys.has(temperature) ? keys.positive(temperature) : std::nullopt) {
      scaling["llama_4_scaling_beta"] = *beta;
    }
    return scaling;
  }
  expect(kind == "none",
         "{}: '{}' is '{}', which cannot be imported; expected none, linear, yarn or longrope "
         "(Llama 3's own stretch is stored as rope_freqs.weight)",
         gguf.path(), keys.named("rope.scaling.type"), kind);
  return {};
}

/// What llama.cpp divides each rotary frequency by: plain / scaled.
std::vector<float> rope_divisors(const RopeConfig& rope) {
  RopeConfig plain = rope;
  plain.scaling = RopeScaling::kNone;
  std::vector<float> divisors = rope_frequencies(plain);
  const std::vector<float> scaled = rope_frequencies(rope, 0);
  std::transform(divisors.begin(), divisors.end(), scaled.begin(), divisors.begin(),
                 [](float a, float b) { return a / b; });
  return divisors;
}

std::vector<float> narrowed(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

}  // namespace

void read_gguf_rope(GgufArchitectureKeys& keys, const GgufRope& rope, Json& config) {
  const std::string dims_key = rope.dims;
  const bool latent = dims_key == "qk_rope_head_dim";
  const int64_t head = config.at(latent ? dims_key : "head_dim").get<int64_t>();
  const int64_t dims = keys.size("rope.dimension_count").value_or(head);
  keys.flag("rope.scaling.finetuned");
  if (!rope.turns) {
    keys.number("rope.freq_base");
    return;
  }
  const double theta = keys.number("rope.freq_base").value_or(10000);
  expect(theta > 1, "{}: '{}' is {}, expected more than 1", keys.path(),
         keys.named("rope.freq_base"), theta);
  expect(dims % 2 == 0 && dims > 0 && dims <= head,
         "{}: '{}' is {}, expected an even number of the {} channels of a head", keys.path(),
         keys.named("rope.dimension_count"), dims, head);
  if (dims_key == "rotary_dim") {
    config[dims_key] = dims;
  } else if (!latent) {
    config["partial_rotary_factor"] = static_cast<double>(dims) / static_cast<double>(head);
  }
  config["rope_theta"] = theta;
  // Null where there is none: a family may have one of its own where nothing is said (gpt-oss).
  const Json scaling = read_scaling(keys, rope, theta, dims / 2);
  config["rope_scaling"] = scaling;
  const char* temperature = "attention.temperature_scale";
  expect(!keys.gguf().metadata().contains(keys.named(temperature)) ||
             (scaling.is_object() && scaling.at("rope_type") == "yarn"),
         "{}: '{}' counts original lengths and is expected beside YaRN", keys.path(),
         keys.named(temperature));
}

void write_gguf_rope(const ModelSpec& spec, const GgufRope& row, GgufHead& head) {
  const RopeConfig& rope = spec.rope;
  head.size("rope.dimension_count", rope.dim);
  if (!row.turns) {
    return;
  }
  head.number("rope.freq_base", rope.theta);
  const auto scaling = [&](const char* kind) {
    head.text("rope.scaling.type", kind);
    head.number("rope.scaling.factor", rope.factor);
    head.size("rope.scaling.original_context_length", rope.original_length);
  };
  switch (rope.scaling) {
    case RopeScaling::kNone:
      break;
    case RopeScaling::kLinear:
      scaling("linear");
      break;
    case RopeScaling::kLlama3:
      head.tensors["rope_freqs.weight"] = rope_divisors(rope);
      break;
    case RopeScaling::kYarn: {
      scaling("yarn");
      const double given = yarn_scale(rope.factor, 1);
      if (row.scales_scores) {
        const Options& o = spec.layers.front().mixer()->options;
        const double plain =
            1 / std::sqrt(static_cast<double>(o.integer("latent_attention", "nope_dim") +
                                              o.integer("latent_attention", "rope_dim")));
        const double root = std::sqrt(o.real("latent_attention", "scale", plain) / plain);
        expect(root > 1,
               "a {} model with YaRN and no mscale_all_dim cannot be written as GGUF: llama.cpp "
               "scales the scores of latent attention by it",
               spec.family);
        head.number("rope.scaling.yarn_log_multiplier", (root - 1) / std::log(rope.factor));
      } else if (std::abs(rope.attention_factor / given - 1) > 1e-6) {
        head.number("rope.scaling.attn_factor", rope.attention_factor / given);
      }
      head.number("rope.scaling.yarn_beta_fast", rope.beta_fast);
      head.number("rope.scaling.yarn_beta_slow", rope.beta_slow);
      if (rope.query_beta > 0) {
        head.number("attention.temperature_scale", rope.query_beta);
      }
      break;
    }
    case RopeScaling::kLongRope:
      // Without the factor, which llama.cpp would divide frequencies by besides.
      head.text("rope.scaling.type", "longrope");
      head.size("rope.scaling.original_context_length", rope.original_length);
      head.number("rope.scaling.attn_factor", rope.attention_factor);
      head.tensors["rope_factors_long.weight"] = narrowed(rope.long_factors);
      head.tensors["rope_factors_short.weight"] = narrowed(rope.short_factors);
      break;
    case RopeScaling::kDynamic:
      fail(
          "rotations that go by the length of the text so far (dynamic) cannot be written as GGUF");
  }
}

bool same_rotation(const RopeConfig& a, const RopeConfig& b) {
  const auto near = [](double x, double y) {
    return std::abs(x - y) <= 1e-5 * std::max(std::abs(x), std::abs(y));
  };
  const auto same = [&](int64_t length) {
    const std::vector<float> x = rope_frequencies(a, length);
    const std::vector<float> y = rope_frequencies(b, length);
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), near);
  };
  const auto is_long = [](const RopeConfig& rope) {
    return rope.scaling == RopeScaling::kLongRope;
  };
  return a.dim == b.dim && a.interleaved == b.interleaved && near(a.query_beta, b.query_beta) &&
         is_long(a) == is_long(b) && near(a.attention_factor, b.attention_factor) && same(1) &&
         (!is_long(a) || (a.original_length == b.original_length && same(a.original_length + 1)));
}

double llama3_divisor(const Llama3Rope& parameters, double theta, int64_t i, int64_t count) {
  const double cycles = parameters.original_length * turns(theta, i, count);
  if (cycles < parameters.low_freq_factor) {
    return parameters.factor;
  }
  if (cycles > parameters.high_freq_factor) {
    return 1;
  }
  const double smooth = (cycles - parameters.low_freq_factor) /
                        (parameters.high_freq_factor - parameters.low_freq_factor);
  return 1 / ((1 - smooth) / parameters.factor + smooth);
}

// Between its two thresholds llama3 scaling divides frequency f by d with
//   1/d = (1 - s)/factor + s,   s = (L f - low) / (high - low) = A f - B     (f in turns per
//   token).
// So s follows from d, and A and B from a line through the points (f, s). L, low and high appear
// only as A = L / (high - low) and B = low / (high - low): one of them is free.
std::optional<Llama3Rope> recover_llama3_rope(std::span<const float> divisors, double theta) {
  for (const float divisor : divisors) {
    expect(std::isfinite(divisor) && divisor > 0, "{} is no divisor of a frequency", divisor);
  }
  const auto close = [](double a, double b) { return std::abs(a - b) <= kTolerance * b; };
  Llama3Rope parameters;
  parameters.factor = divisors.empty() ? 1 : *std::max_element(divisors.begin(), divisors.end());
  if (close(parameters.factor, 1)) {
    return std::nullopt;
  }
  parameters.factor = rounded_if_near(parameters.factor);

  double n = 0, sum_f = 0, sum_s = 0, sum_ff = 0, sum_fs = 0;
  double below = 0, above = 0;  // the largest f that is all divided, the smallest that is not
  const auto count = static_cast<int64_t>(divisors.size());
  for (int64_t i = 0; i < count; ++i) {
    const double divisor = divisors[static_cast<size_t>(i)];
    const double f = turns(theta, i, count);
    if (close(divisor, 1)) {
      above = f;
      continue;
    }
    if (close(divisor, parameters.factor)) {
      below = std::max(below, f);
      continue;
    }
    const double s = (1 / divisor - 1 / parameters.factor) / (1 - 1 / parameters.factor);
    n += 1;
    sum_f += f;
    sum_s += s;
    sum_ff += f * f;
    sum_fs += f * s;
  }
  if (n >= 2) {
    const double a = (n * sum_fs - sum_f * sum_s) / (n * sum_ff - sum_f * sum_f);
    const double b = (a * sum_f - sum_s) / n;
    const double width = parameters.original_length / a;
    parameters.low_freq_factor = rounded_if_near(b * width);
    parameters.high_freq_factor = rounded_if_near(b * width + width);
  }
  if (n < 2) {
    // Too few points for a line: thresholds that leave the others where they are.
    above = above > 0 ? above : 16 * std::max(below, sum_f);
    double low = below > 0 ? below * std::cbrt(above / below) : above / 4;
    double high = below > 0 ? above / std::cbrt(above / below) : above / 2;
    if (n == 1) {
      low = below;
      do {
        low = (low + sum_f) / 2;
        high = low + (sum_f - low) / sum_s;
      } while (high >= above && low < sum_f * (1 - 1e-9));
    }
    parameters.low_freq_factor = low * parameters.original_length;
    parameters.high_freq_factor = high * parameters.original_length;
  }
  expect(
      gives(parameters, divisors, theta),
      "these divisors of the rotary frequencies are not of Llama 3's kind, and no other kind can "
      "be imported");
  return parameters;
}

}  // namespace cambium
