// Small text helpers for messages that people read.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cambium {

/// Least number of insertions, deletions, replacements and swaps of neighbours from `a` to `b`
/// (optimal string alignment), over bytes.
size_t edit_distance(std::string_view a, std::string_view b);

/// The candidate most likely meant by `unknown`, or nothing when none is near: at most a third of
/// its letters may differ (but one typo is always allowed). '-' and '_' count as the same letter,
/// case does not matter.
std::optional<std::string> nearest_name(std::string_view unknown,
                                        std::span<const std::string> candidates);

/// "; did you mean 'rate'?" or "" — to end an error message with.
std::string did_you_mean(std::string_view unknown, std::span<const std::string> candidates);

/// 1536 -> "1.5 KiB"
std::string human_bytes(uint64_t bytes);
/// 1500000 -> "1.5M"; below a thousand as it is.
std::string human_count(double count);
/// 125 -> "2m 05s", 3725 -> "1h 02m", 0.5 -> "0.5s"
std::string human_duration(double seconds);

/// Text from a file as a message shows it: at most `most` bytes, the middle left out of longer
/// ones.
std::string shortened(std::string_view text, size_t most = 200);
/// Safe to print on a terminal: control characters other than new lines and tabs, and bytes that
/// are no UTF-8, as \\xNN.
std::string printable(std::string_view text);

/// &, <, > and both quotes as entities: safe in HTML, SVG and their attributes.
std::string escape_html(std::string_view text);

std::string join(std::span<const std::string> parts, std::string_view separator);
std::vector<std::string> split(std::string_view text, char separator);

}  // namespace cambium
