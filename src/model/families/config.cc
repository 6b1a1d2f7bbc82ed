#include "model/families/config.h"

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "base/checked.h"
#include "base/json.h"
#include "base/text.h"

namespace cambium::config {

namespace {

/// Nesting that no configuration comes near; deeper files are refused before they cost stack.
constexpr int kMaxDepth = 64;
constexpr double kMaxReal = 1e30;

/// JSON as Python writes it: Infinity, -Infinity and NaN outside strings, which the parser does not
/// know, become null. A key whose number is needed then says what it expected.
std::string without_infinities(const std::string& text) {
  std::string result;
  result.reserve(text.size());
  bool inside = false;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (inside && c == '\\' && i + 1 < text.size()) {
      result.append(text, i, 2);
      i += 2;
      continue;
    }
    inside = inside != (c == '"');
    bool found = false;
    for (const std::string_view word : {"-Infinity", "Infinity", "NaN"}) {
      if (!inside && text.compare(i, word.size(), word) == 0) {
        result += "null";
        i += word.size();
        found = true;
        break;
      }
    }
    if (!found) {
      result += c;
      ++i;
    }
  }
  return result;
}

std::string shown(const Json& value) {
  return shortened(value.dump());
}

/// Where a class of transformers differs from the others.
struct Absent {
  const char* model_type;
  double rope_theta, rms_norm_eps;
};
constexpr Absent kUsual{"", 1e4, 1e-6};
constexpr Absent kAbsent[] = {
    {"mixtral", 1e6, 1e-5},
    {"gemma3_text", 1e6, 1e-6},
    {"phi3", 1e4, 1e-5},
    {"olmo2", 1e4, 1e-5},
    {"olmo3", 5e5, 1e-5},
    {"smollm3", 2e6, 1e-6},
    {"bamba", 1e4, 1e-5},
    {"lfm2", 1e6, 1e-5},
    {"lfm2_moe", 1e6, 1e-5},
    {"falcon_h1", 1e4, 1e-5},
    {"minimax", 1e6, 1e-5},
    {"minimax_m1", 1e6, 1e-5},
    {"minimax_m2", 5e6, 1e-6},
    {"gpt_oss", 1.5e5, 1e-5},
    {"bailing_hybrid", 6e6, 1e-6},
    {"apertus", 1.2e7, 1e-5},
    {"ministral3", 1e4, 1e-5},
    {"kimi_linear", 1e4, 1e-5},
    {"minimax_m3_vl_text", 5e6, 1e-6},
};

const Absent& absent_of(const Json& config) {
  const auto type = config.find("model_type");
  const auto* row = std::find_if(std::begin(kAbsent), std::end(kAbsent), [&](const Absent& one) {
    return type != config.end() && *type == one.model_type;
  });
  return row == std::end(kAbsent) ? kUsual : *row;
}

}  // namespace

Json parse(const std::string& text, const std::string& where) {
  auto json =
      parse_json<Json>(without_infinities(text), where,
                       {.depth = kMaxDepth,
                        .too_deep = "; no configuration has so many levels of lists and objects"});
  expect(json.is_object(), "{}: expected a JSON object", where);
  return json;
}

double absent_rope_theta(const Json& config) {
  return absent_of(config).rope_theta;
}

double absent_rms_norm_eps(const Json& config) {
  return absent_of(config).rms_norm_eps;
}

bool has(const Json& config, const char* key) {
  const auto it = config.find(key);
  return it != config.end() && !it->is_null();
}

int64_t integer(const Json& config, const char* key, int64_t low, int64_t high,
                const std::string& where) {
  const auto it = config.find(key);
  expect(it != config.end(), "{}: expected the key '{}', which is missing", where, key);
  expect(it->is_number_integer(), "{}: expected '{}' to be a whole number, got {}", where, key,
         shown(*it));
  // Beyond 2^63 the parser's number is unsigned.
  expect(!it->is_number_unsigned() || it->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX),
         "{}: expected '{}' to be a whole number from {} to {}, got {}", where, key, low, high,
         shown(*it));
  return in_range(where, key, it->get<int64_t>(), low, high);
}

int64_t integer_or(const Json& config, const char* key, int64_t fallback, int64_t low, int64_t high,
                   const std::string& where) {
  return has(config, key) ? integer(config, key, low, high, where) : fallback;
}

double real_or(const Json& config, const char* key, double fallback, const std::string& where) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) {
    return fallback;
  }
  expect(it->is_number(), "{}: expected '{}' to be a number, got {}", where, key, shown(*it));
  return in_range(where, key, it->get<double>(), -kMaxReal, kMaxReal);
}

bool flag_or(const Json& config, const char* key, bool fallback, const std::string& where) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) {
    return fallback;
  }
  expect(it->is_boolean(), "{}: expected '{}' to be true or false, got {}", where, key, shown(*it));
  return it->get<bool>();
}

std::string text_or(const Json& config, const char* key, const char* fallback,
                    const std::string& where) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) {
    return fallback;
  }
  expect(it->is_string(), "{}: expected '{}' to be a string, got {}", where, key, shown(*it));
  return it->get<std::string>();
}

std::vector<std::string> texts(const Json& config, const char* key, size_t count,
                               const std::string& where) {
  const auto it = config.find(key);
  expect(it != config.end() && it->is_array() && it->size() == count,
         "{}: expected the list '{}' of {} strings, one a layer", where, key, count);
  std::vector<std::string> list;
  for (const Json& entry : *it) {
    expect(entry.is_string(), "{}: expected '{}' to hold strings, got {}", where, key,
           shown(entry));
    list.push_back(entry.get<std::string>());
  }
  return list;
}

void refuse_quantised(const Json& config, const std::string& where) {
  const auto it = config.find("quantization_config");
  if (it == config.end() || it->is_null()) {
    return;
  }
  expect(it->is_object(), "{}: expected 'quantization_config' to be an object", where);
  const std::string inside = where + ": quantization_config";
  const std::string method = text_or(*it, "quant_method", "unknown", inside);
  if (method == "fp8") {
    const std::string format = text_or(*it, "fmt", "e4m3", inside);
    const Json block = it->value("weight_block_size", Json());
    expect(format == "e4m3" && block == Json::array({128, 128}),
           "{}: expected fp8 weights of fmt e4m3 with weight_block_size [128, 128], got {} and {}",
           inside, format, block.dump());
    return;
  }
  const std::string format = text_or(*it, "format", "", inside);
  if (method == "mxfp4" ||
      (method == "modelopt" && text_or(*it, "quant_algo", "", inside) == "NVFP4") ||
      (method == "compressed-tensors" && format == "nvfp4-pack-quantized")) {
    return;
  }
  const std::string bits =
      has(*it, "bits") ? fmt::format(", {} bits", integer(*it, "bits", 0, 64, inside)) : "";
  fail(
      "{}: the checkpoint is quantised ({}{}), and its weights cannot be read; use the original "
      "checkpoint, or a GGUF file with `cambium import`",
      where, method, bits);
}

}  // namespace cambium::config
