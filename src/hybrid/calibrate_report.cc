// What a calibration found, for people and for files.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "hybrid/calibrate.h"

namespace cambium {

std::string describe_calibration(const std::vector<LayerCalibration>& layers,
                                 const std::vector<MixerAgreement>& fitted) {
  std::string s =
      "layer  look back, median of its heads  half-lives  concentration    R^2 and cosine as "
      "started, calibrated";
  s += fitted.empty() ? "\n" : ", fitted\n";
  const auto pair = [](const MixerAgreement& a) {
    return fmt::format("  {:7.3f} {:6.3f}", a.explained, a.cosine);
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerCalibration& l = layers[i];
    std::vector<double> back;
    double concentration = 0.0;
    for (const HeadStatistics& head : l.heads) {
      back.push_back(head.look_back);
      concentration += head.concentration / static_cast<double>(l.heads.size());
    }
    std::sort(back.begin(), back.end());
    const auto [least, most] = std::minmax_element(l.half_lives.begin(), l.half_lives.end());
    s += fmt::format(
        "{:5}  {:31.1f}  {:>10}  {:13.2f}  ", l.layer, back[back.size() / 2],
        l.half_lives.empty() ? "as it was" : fmt::format("{:.1f}-{:.1f}", *least, *most),
        concentration);
    s += pair(l.start) + (l.half_lives.empty() ? "  nothing to calibrate" : pair(l.calibrated));
    s += fitted.empty() ? "\n" : pair(fitted[i]) + "\n";
  }
  return s;
}

std::string calibration_json(const std::vector<LayerCalibration>& layers,
                             const std::vector<MixerAgreement>& fitted) {
  using Json = nlohmann::ordered_json;
  const auto agreement_json = [](const MixerAgreement& a) {
    return Json{{"explained", a.explained}, {"cosine", a.cosine}, {"error", a.error}};
  };
  Json list = Json::array();
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerCalibration& l = layers[i];
    Json entry = {{"layer", l.layer}};
    for (const HeadStatistics& head : l.heads) {
      entry["look_back"].push_back(head.look_back);
      entry["half_distance"].push_back(head.half_distance);
      entry["concentration"].push_back(head.concentration);
    }
    entry["half_lives"] = l.half_lives;
    entry["start"] = agreement_json(l.start);
    entry["calibrated"] = agreement_json(l.calibrated);
    if (!fitted.empty()) {
      entry["fitted"] = agreement_json(fitted[i]);
    }
    list.push_back(std::move(entry));
  }
  return Json{{"layers", list}}.dump(1) + "\n";
}

}  // namespace cambium
