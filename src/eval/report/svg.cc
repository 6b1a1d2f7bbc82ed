#include "eval/report/svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "base/error.h"
#include "base/text.h"

namespace cambium::svg {
namespace {

constexpr double kWidth = 720;
constexpr double kHeight = 360;
constexpr double kLeft = 64;
constexpr double kRight = 20;
constexpr double kTop = 16;
constexpr double kBottom = 48;
constexpr int kSeriesColours = 8;

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void add(double v) {
    if (std::isfinite(v)) {
      low = std::min(low, v);
      high = std::max(high, v);
    }
  }
};

// A value axis mapped to pixels, with a margin around the data.
class Scale {
 public:
  Scale(Range range, const Axis& axis, double from, double to)
      : log_(axis.log), percent_(axis.percent), from_(from), to_(to) {
    if (range.low > range.high) {
      range = {0.0, 1.0};
    }
    low_ = map(range.low);
    high_ = map(range.high);
    if (axis.zero) {
      low_ = std::min(low_, 0.0);
    }
    const double room = high_ > low_ ? (high_ - low_) * 0.08 : std::max(std::abs(high_), 1.0) * 0.1;
    low_ = axis.zero && low_ >= 0.0 ? 0.0 : low_ - room;
    high_ += room;
    if (percent_) {
      low_ = std::max(low_, 0.0);
      high_ = std::min(std::max(high_, low_ + 1e-3), 1.02);
    }
  }
  double at(double v) const { return from_ + (map(v) - low_) / (high_ - low_) * (to_ - from_); }
  std::vector<double> labels(int count) const {
    if (!log_) {
      return ticks(low_, high_, count);
    }
    std::vector<double> out;
    const double decades = high_ - low_;
    for (int e = static_cast<int>(std::floor(low_)); e <= static_cast<int>(std::ceil(high_)); ++e) {
      for (const double m : {1.0, 2.0, 5.0}) {
        const double at = e + std::log10(m);
        if (at >= low_ && at <= high_ && (m == 1.0 || decades < 2.5)) {
          out.push_back(std::pow(10.0, at));
        }
      }
    }
    return out;
  }
  std::string text(double v) const {
    return percent_ ? fmt::format("{:.4g} %", v * 100.0) : number(v);
  }

 private:
  double map(double v) const { return log_ ? std::log10(std::max(v, 1e-12)) : v; }
  bool log_, percent_;
  double from_, to_;
  double low_ = 0.0, high_ = 1.0;
};

std::string open() {
  return fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\">\n", kWidth, kHeight);
}

std::string frame(const Scale& sx, const Scale& sy, const Axis& x, const Axis& y) {
  std::string s;
  const double bottom = kHeight - kBottom;
  for (const double v : sy.labels(6)) {
    const double at = sy.at(v);
    s += fmt::format("<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>",
                     kLeft, kWidth - kRight, at, at);
    s += fmt::format("<text class=\"tick\" x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n",
                     kLeft - 8, at + 4, sy.text(v));
  }
  for (const double v : sx.labels(8)) {
    s +=
        fmt::format("<text class=\"tick\" x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                    sx.at(v), bottom + 18, sx.text(v));
  }
  s += fmt::format("<line class=\"axis\" x1=\"{}\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>\n", kLeft,
                   kWidth - kRight, bottom, bottom);
  s += fmt::format("<text class=\"title\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                   (kLeft + kWidth - kRight) / 2, kHeight - 8, escape_html(x.title));
  s += fmt::format(
      "<text class=\"title\" transform=\"translate(14 {}) rotate(-90)\" "
      "text-anchor=\"middle\">{}</text>\n",
      (kTop + bottom) / 2, escape_html(y.title));
  return s;
}

struct Label {
  double x, y;
  bool left;  // of the point
};

/// Where labels stand beside their points: none over another, where there is room.
class Labels {
 public:
  Label place(double x, double y, const std::string& text) {
    const double width = kLetter * static_cast<double>(text.size());
    const auto at = [&](bool left, bool below) {
      return Label{x + (left ? -10 : 10), y + (below ? 20 : -10), left};
    };
    const auto box = [&](const Label& label) {
      const double from = label.left ? label.x - width : label.x;
      return Box{from, from + width, label.y - kLine, label.y};
    };
    const bool left = x > kWidth * 0.8;
    Label chosen = at(left, false);
    for (const Label& label :
         {at(left, false), at(left, true), at(!left, false), at(!left, true)}) {
      const Box b = box(label);
      const bool inside = b.left >= 0 && b.right <= kWidth;
      if (inside && std::none_of(taken_.begin(), taken_.end(),
                                 [&](const Box& other) { return b.meets(other); })) {
        chosen = label;
        break;
      }
    }
    taken_.push_back(box(chosen));
    return chosen;
  }

 private:
  static constexpr double kLetter = 7;  // of 13 pixels of text
  static constexpr double kLine = 14;
  struct Box {
    double left, right, top, bottom;
    bool meets(const Box& b) const {
      return left < b.right && b.left < right && top < b.bottom && b.top < bottom;
    }
  };
  std::vector<Box> taken_;
};

Scale horizontal(const Range& range, const Axis& axis) {
  return Scale(range, axis, kLeft, kWidth - kRight);
}
Scale vertical(const Range& range, const Axis& axis) {
  return Scale(range, axis, kHeight - kBottom, kTop);
}

}  // namespace

std::vector<double> ticks(double low, double high, int count) {
  std::vector<double> out;
  if (!(high > low) || !std::isfinite(high - low)) {
    return out;
  }
  const double raw = (high - low) / std::max(count, 1);
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  double step = 10.0 * power;
  for (const double m : {1.0, 2.0, 5.0}) {
    if (raw <= m * power) {
      step = m * power;
      break;
    }
  }
  // Counted from the first: values so close to each other that adding 1 is lost give no endless
  // row of ticks.
  const double first = std::ceil(low / step);
  for (int i = 0; i < 20 * std::max(count, 1); ++i) {
    const double at = (first + i) * step;
    if (!(at <= high) || (!out.empty() && at <= out.back())) {
      break;
    }
    out.push_back(at == 0.0 ? 0.0 : at);
  }
  return out;
}

std::string number(double value) {
  const double size = std::abs(value);
  if (size >= 1e9) {
    return fmt::format("{:.3g}B", value / 1e9);
  }
  if (size >= 1e6) {
    return fmt::format("{:.3g}M", value / 1e6);
  }
  if (size >= 1e4) {
    return fmt::format("{:.3g}k", value / 1e3);
  }
  return size >= 1e3 ? fmt::format("{:.0f}", value) : fmt::format("{:.3g}", value);
}

std::string scatter(const std::vector<Point>& points, const Axis& x, const Axis& y) {
  Range rx;
  Range ry;
  for (const Point& p : points) {
    for (const double v : {p.x, p.x_low, p.x_high}) {
      rx.add(v);
    }
    for (const double v : {p.y, p.y_low, p.y_high}) {
      ry.add(v);
    }
  }
  const Scale sx = horizontal(rx, x);
  const Scale sy = vertical(ry, y);
  std::vector<Point> sorted = points;
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const Point& a, const Point& b) { return a.x < b.x; });
  std::string s = open() + frame(sx, sy, x, y);
  std::map<int, std::string> paths;
  for (const Point& p : sorted) {
    std::string& path = paths[p.series];
    path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : " L", sx.at(p.x), sy.at(p.y));
  }
  for (const auto& [series, path] : paths) {
    s += fmt::format("<path class=\"frontier\" d=\"{}\"/>\n", path);
  }
  Labels labels;
  for (const Point& p : sorted) {
    const double cx = sx.at(p.x);
    const double cy = sy.at(p.y);
    const char* kind = p.reference ? "reference" : p.hollow ? "point hollow" : "point";
    s += fmt::format("<g class=\"{}\"><title>{}: {} ({} to {}), {} ({} to {})</title>", kind,
                     escape_html(p.label), sx.text(p.x), sx.text(p.x_low), sx.text(p.x_high),
                     sy.text(p.y), sy.text(p.y_low), sy.text(p.y_high));
    s += fmt::format(
        "<line x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1:.1f}\" y2=\"{2:.1f}\"/>"
        "<line x1=\"{3:.1f}\" x2=\"{4:.1f}\" y1=\"{5:.1f}\" y2=\"{5:.1f}\"/>",
        cx, sy.at(p.y_low), sy.at(p.y_high), sx.at(p.x_low), sx.at(p.x_high), cy);
    s += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"6\"/>", cx, cy);
    const Label label = labels.place(cx, cy, p.label);
    s += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text></g>\n", label.x,
                     label.y, label.left ? "end" : "start", escape_html(p.label));
  }
  return s + "</svg>\n";
}

std::string standalone(const std::vector<std::string>& charts) {
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" role=\"img\">"
      "<style>text{{fill:#1c2430;font:13px sans-serif}}.tick{{fill:#5d6b7c;font-size:12px}}"
      ".grid{{stroke:#dfe5ec}}.axis{{stroke:#5d6b7c}}"
      ".frontier{{fill:none;stroke:#3b6fb6;stroke-width:1.5;stroke-dasharray:4 4}}"
      ".point circle{{fill:#3b6fb6}}.point line{{stroke:#3b6fb6}}"
      ".point.hollow circle{{fill:#fff;stroke:#3b6fb6;stroke-width:1.5}}"
      ".reference circle{{fill:#c2571a}}.reference line{{stroke:#c2571a}}</style>"
      "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
      kWidth, kHeight * static_cast<double>(charts.size()));
  const std::string open = "<svg ";
  for (size_t i = 0; i < charts.size(); ++i) {
    CAMBIUM_CHECK(charts[i].starts_with(open));
    out += fmt::format("<svg y=\"{}\" width=\"{}\" height=\"{}\" ",
                       kHeight * static_cast<double>(i), kWidth, kHeight) +
           charts[i].substr(open.size());
  }
  return out + "</svg>\n";
}

std::string lines(const std::vector<Series>& series, const Axis& x, const Axis& y) {
  Range rx;
  Range ry;
  for (const Series& one : series) {
    for (const double v : one.x) {
      rx.add(v);
    }
    for (const double v : one.y) {
      ry.add(v);
    }
  }
  const Scale sx = horizontal(rx, x);
  const Scale sy = vertical(ry, y);
  std::string s = open() + frame(sx, sy, x, y);
  double legend = kTop + 12;
  for (size_t i = 0; i < series.size(); ++i) {
    const int colour = static_cast<int>(i) % kSeriesColours;
    std::string path;
    for (size_t j = 0; j < series[i].x.size(); ++j) {
      if (std::isfinite(series[i].y[j])) {
        path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : " L", sx.at(series[i].x[j]),
                            sy.at(series[i].y[j]));
      }
    }
    s += fmt::format("<path class=\"line s{}\" d=\"{}\"><title>{}</title></path>\n", colour, path,
                     escape_html(series[i].name));
    s += fmt::format(
        "<line class=\"line s{0}\" x1=\"{1}\" x2=\"{2}\" y1=\"{3}\" y2=\"{3}\"/>"
        "<text class=\"tick\" x=\"{4}\" y=\"{5}\">{6}</text>\n",
        colour, kWidth - kRight - 180, kWidth - kRight - 160, legend, kWidth - kRight - 154,
        legend + 4, escape_html(series[i].name));
    legend += 18;
  }
  return s + "</svg>\n";
}

std::string bars(const std::vector<double>& values, const std::vector<bool>& marked, const Axis& x,
                 const Axis& y) {
  Range ry;
  ry.add(0.0);
  for (const double v : values) {
    ry.add(v);
  }
  const Scale sy = vertical(ry, y);
  const auto n = static_cast<double>(std::max<size_t>(values.size(), 1));
  const double step = (kWidth - kRight - kLeft) / n;
  std::string s = open();
  for (const double v : sy.labels(6)) {
    s += fmt::format(
        "<line class=\"grid\" x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/>"
        "<text class=\"tick\" x=\"{3}\" y=\"{4:.1f}\" text-anchor=\"end\">{5}</text>\n",
        kLeft, kWidth - kRight, sy.at(v), kLeft - 8, sy.at(v) + 4, sy.text(v));
  }
  for (size_t i = 0; i < values.size(); ++i) {
    const double left = kLeft + static_cast<double>(i) * step;
    const double top = std::min(sy.at(values[i]), sy.at(0.0));
    const double height = std::abs(sy.at(values[i]) - sy.at(0.0));
    s += fmt::format(
        "<rect class=\"bar{}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" "
        "rx=\"2\"><title>layer {}: {}</title></rect>",
        marked[i] ? " marked" : "", left + step * 0.14, top, step * 0.72, std::max(height, 0.5), i,
        number(values[i]));
    s +=
        fmt::format("<text class=\"tick\" x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                    left + step / 2, kHeight - kBottom + 18, i);
  }
  s += fmt::format("<text class=\"title\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                   (kLeft + kWidth - kRight) / 2, kHeight - 8, escape_html(x.title));
  s += fmt::format(
      "<text class=\"title\" transform=\"translate(14 {}) rotate(-90)\" "
      "text-anchor=\"middle\">{}</text>\n",
      (kTop + kHeight - kBottom) / 2, escape_html(y.title));
  return s + "</svg>\n";
}

std::string letter_class(char letter) {
  switch (letter) {
    case 'A':
      return "attention";
    case 'W':
      return "window";
    case 'M':
      return "mamba";
    case '2':
      return "mamba2";
    case 'G':
      return "gdn";
    default:
      return "other";
  }
}

std::string layer_maps(const std::vector<std::pair<std::string, std::vector<std::string>>>& rows) {
  size_t most = 1;
  for (const auto& [name, layers] : rows) {
    most = std::max(most, layers.size());
  }
  const double left = 110;
  const double cell = std::min(26.0, (kWidth - left - kRight) / static_cast<double>(most));
  const double row = 26;
  const double height = row * static_cast<double>(rows.size()) + 24;
  std::string s = fmt::format("<svg viewBox=\"0 0 {} {:.0f}\" role=\"img\">\n", kWidth, height);
  for (size_t r = 0; r < rows.size(); ++r) {
    const double y = static_cast<double>(r) * row;
    s += fmt::format("<text class=\"tick\" x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>",
                     left - 10, y + row * 0.62, escape_html(rows[r].first));
    for (size_t i = 0; i < rows[r].second.size(); ++i) {
      std::vector<std::string> mixers;
      for (const char letter : rows[r].second[i]) {
        mixers.push_back(letter_class(letter));
      }
      s += fmt::format(
          "<rect class=\"cell {}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" "
          "rx=\"3\"><title>layer {}: {}</title></rect>",
          mixers.empty() ? "other" : mixers.front(), left + static_cast<double>(i) * cell, y + 2,
          cell - 2, row - 5, i, join(mixers, " beside "));
    }
    s += "\n";
  }
  for (size_t i = 0; i<most; i += most> 30 ? 5 : 1) {
    s += fmt::format(
        "<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>",
        left + (static_cast<double>(i) + 0.5) * cell - 1, height - 6, i);
  }
  return s + "</svg>\n";
}

}  // namespace cambium::svg
