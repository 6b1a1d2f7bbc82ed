// Whether two formulas are the same function: both are read into a tree and computed at a few
// points, in complex numbers. That decides what algebra would, for everything school mathematics
// writes, without algebra.
#pragma once

#include <complex>
#include <optional>
#include <string>
#include <string_view>

namespace cambium {

/// What a formula in LaTeX or plain text ("\frac{x+1}{2}", "2\sqrt{3}", "x^2-1", "3!", "\pi r^2",
/// "1.5e3", "\binom{5}{2}", "\sin x") is where every letter has a value that its name alone
/// decides, a different one for each `point`. Nothing for what is not one formula: text, relations,
/// lists, matrices. `e`, `i` and \pi are the constants.
std::optional<std::complex<double>> value_at(std::string_view latex, int point);

/// Equal at every point, up to rounding; false where either is no formula.
bool same_expression(std::string_view a, std::string_view b);

}  // namespace cambium
