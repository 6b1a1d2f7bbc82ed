// Charts as SVG text: no dependency, the same bytes for the same data, readable without a network.
#pragma once

#include <string>
#include <vector>

namespace cambium::svg {

/// Numbers at which an axis from low to high carries a label: 1, 2 or 5 times a power of ten apart,
/// about `count` of them, all within [low, high].
std::vector<double> ticks(double low, double high, int count);

/// "1.2k", "0.031", "95": short, for labels.
std::string number(double value);

/// A point with an interval on both axes.
struct Point {
  double x, x_low, x_high;
  double y, y_low, y_high;
  std::string label;
  bool reference = false;  // the teacher: drawn apart
  int series = 0;          // points of one series are joined
  bool hollow = false;
};

struct Axis {
  std::string title;
  bool percent = false;  // values are fractions, shown as per cent
  bool log = false;
  bool zero = false;  // starts at 0
};

/// Points, those of a series joined in order of x, with error bars and labels beside them.
std::string scatter(const std::vector<Point>& points, const Axis& x, const Axis& y);

/// Charts below each other as a file of its own: the page's colours, on white.
std::string standalone(const std::vector<std::string>& charts);

struct Series {
  std::string name;
  std::vector<double> x, y;
};

/// Lines with a legend; series keep their colour by their place in the list.
std::string lines(const std::vector<Series>& series, const Axis& x, const Axis& y);

/// One bar for each value, labelled by its index; `marked` ones stand out.
std::string bars(const std::vector<double>& values, const std::vector<bool>& marked, const Axis& x,
                 const Axis& y);

/// One row of cells for each name: a cell a layer, coloured by the first of its letters.
std::string layer_maps(const std::vector<std::pair<std::string, std::vector<std::string>>>& rows);

/// The colour class of a layer letter, shared with the legend the page shows.
std::string letter_class(char letter);

}  // namespace cambium::svg
