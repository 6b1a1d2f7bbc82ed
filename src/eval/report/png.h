// Pictures for those who cannot show SVG.
#pragma once

#include <filesystem>

namespace cambium {

/// Draws the SVG file `svg` as the PNG file `png`, two pixels a unit, through the program
/// rsvg-convert of librsvg, found on the PATH. The file appears whole or not at all. Errors: no
/// such program (names the package that has it); it fails (its own words are on standard error).
void write_png(const std::filesystem::path& svg, const std::filesystem::path& png);

}  // namespace cambium
