#include "cli/answer_settings.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/error.h"
#include "base/json_fields.h"
#include "base/text.h"
#include "ops/sampling/sampling_config.h"

namespace cambium {
namespace {

using Json = nlohmann::json;

const std::vector<std::string>& known_keys() {
  static const std::vector<std::string> keys = {"temperature",
                                                "top_k",
                                                "top_p",
                                                "min_p",
                                                "seed",
                                                "repetition_penalty",
                                                "presence_penalty",
                                                "frequency_penalty",
                                                "max_new_tokens",
                                                "logprobs",
                                                "stop"};
  return keys;
}

std::vector<std::string> stops_of(const Json& json, const std::string& where) {
  std::vector<std::string> stops;
  for (const Json& stop : json.is_array() ? json : Json::array({json})) {
    expect(stop.is_string() && !stop.get_ref<const std::string&>().empty(),
           "{}: expected 'stop' to be a text or a list of texts, got {}", where,
           shortened(json.dump(-1, ' ', false, Json::error_handler_t::replace)));
    stops.push_back(stop.get<std::string>());
  }
  return stops;
}

}  // namespace

AnswerSettings settings_of_line(const Json& json, const std::string& where,
                                AnswerSettings settings) {
  const JsonFields fields(json, where);
  for (const auto& [key, value] : json.items()) {
    const auto& known = known_keys();
    expect(std::find(known.begin(), known.end(), key) != known.end(), "{}: unknown key '{}'{}",
           where, printable(shortened(key)), did_you_mean(key, known));
  }
  const auto real = [&](const char* key, double& value) {
    value = fields.has(key) ? fields.real(key) : value;
  };
  const auto whole = [&](const char* key, int64_t& value, int64_t low, int64_t high) {
    value = fields.has(key) ? fields.whole(key, low, high) : value;
  };
  SamplingOptions& sampling = settings.sampling;
  real("temperature", sampling.temperature);
  real("top_p", sampling.top_p);
  real("min_p", sampling.min_p);
  real("repetition_penalty", sampling.repetition);
  real("presence_penalty", sampling.presence);
  real("frequency_penalty", sampling.frequency);
  whole("top_k", sampling.top_k, 0, kMaxVocab);
  whole("seed", sampling.seed, INT64_MIN, INT64_MAX);
  whole("max_new_tokens", settings.max_new_tokens, 1, kMaxPositions);
  whole("logprobs", settings.logprobs, 0, kMostRanked);
  if (fields.has("stop")) {
    settings.stop = stops_of(json["stop"], where);
  }
  try {
    static_cast<void>(sampling.config());
  } catch (const Error& error) {
    fail("{}: {}", where, error.what());
  }
  return settings;
}

}  // namespace cambium
