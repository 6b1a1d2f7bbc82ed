#include "eval/report/curve.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "base/file.h"
#include "base/json.h"
#include "base/text.h"

namespace cambium {
namespace {

// Means of neighbours, so that at most `most` values are left.
std::vector<double> thin(const std::vector<double>& values, size_t most = 120) {
  const size_t width = std::max<size_t>(1, (values.size() + most - 1) / most);
  std::vector<double> means;
  for (size_t i = 0; i + width <= values.size(); i += width) {
    means.push_back(std::accumulate(values.begin() + static_cast<ptrdiff_t>(i),
                                    values.begin() + static_cast<ptrdiff_t>(i + width), 0.0) /
                    static_cast<double>(width));
  }
  return means;
}

std::optional<double> number_in(const nlohmann::json& line, const char* key) {
  const auto it = line.find(key);
  return it != line.end() && it->is_number() ? std::optional(it->get<double>()) : std::nullopt;
}

}  // namespace

CurveSummary read_curve(const std::string& stage, const std::string& phase,
                        const std::vector<std::filesystem::path>& logs) {
  CurveSummary curve{stage, phase, {}, {}, {}};
  double sum = 0.0;
  for (const std::filesystem::path& log : logs) {
    if (!std::filesystem::exists(log)) {
      continue;
    }
    for (const std::string& line : split(read_text_file(log.string()), '\n')) {
      // The last line of a run that was killed may be cut off; it and what is no step is no point.
      const auto json = try_json<nlohmann::json>(line);
      if (json.is_object() && json.contains("event") && json["event"] == "step" &&
          number_in(json, "loss")) {
        sum += number_in(json, "tokens").value_or(0.0);
        curve.loss.push_back(*number_in(json, "loss"));
        curve.reverse_kl.push_back(number_in(json, "reverse_kl").value_or(0.0));
        curve.tokens.push_back(sum);
      }
    }
  }
  curve.tokens = thin(curve.tokens);
  curve.loss = thin(curve.loss);
  curve.reverse_kl = thin(curve.reverse_kl);
  return curve;
}

}  // namespace cambium
