#include "base/text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace cambium {
namespace {

/// Letters that people confuse are made equal.
std::string folded(std::string_view name) {
  std::string out(name);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') {
      c = static_cast<char>(c - 'A' + 'a');
    }
    if (c == '_') {
      c = '-';
    }
  }
  return out;
}

}  // namespace

size_t edit_distance(std::string_view a, std::string_view b) {
  // Three rows of the table: two letters back (for swaps), one back, this one.
  std::vector<size_t> before(b.size() + 1);
  std::vector<size_t> last(b.size() + 1);
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) {
    row[j] = j;
  }
  for (size_t i = 1; i <= a.size(); ++i) {
    std::swap(before, last);
    std::swap(last, row);
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = last[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, replaced});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        row[j] = std::min(row[j], before[j - 2] + 1);
      }
    }
  }
  return row[b.size()];
}

std::optional<std::string> nearest_name(std::string_view unknown,
                                        std::span<const std::string> candidates) {
  const std::string wanted = folded(unknown);
  size_t allowed = std::max<size_t>(1, wanted.size() / 3);
  std::optional<std::string> best;
  for (const std::string& candidate : candidates) {
    const size_t distance = edit_distance(wanted, folded(candidate));
    // A name with nothing in common with the candidate is no typo of it.
    if (distance > allowed || distance >= candidate.size()) {
      continue;
    }
    if (best && distance == allowed) {
      continue;
    }
    best = candidate;
    allowed = distance;
  }
  return best;
}

std::string did_you_mean(std::string_view unknown, std::span<const std::string> candidates) {
  const std::optional<std::string> nearest = nearest_name(unknown, candidates);
  return nearest ? fmt::format("; did you mean '{}'?", *nearest) : "";
}

std::string human_bytes(uint64_t bytes) {
  if (bytes < 1024) {
    return fmt::format("{} B", bytes);
  }
  constexpr std::array<std::string_view, 6> kUnits{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1023.5 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return value < 99.95 ? fmt::format("{:.1f} {}", value, kUnits[unit])
                       : fmt::format("{:.0f} {}", value, kUnits[unit]);
}

std::string human_count(double count) {
  if (std::abs(count) < 999.5) {
    return std::floor(count) == count || std::abs(count) >= 99.95 ? fmt::format("{:.0f}", count)
                                                                  : fmt::format("{:.1f}", count);
  }
  constexpr std::array<std::string_view, 4> kUnits{"K", "M", "B", "T"};
  double value = count / 1000;
  size_t unit = 0;
  while (std::abs(value) >= 999.5 && unit + 1 < kUnits.size()) {
    value /= 1000;
    ++unit;
  }
  return std::abs(value) < 99.95 ? fmt::format("{:.1f}{}", value, kUnits[unit])
                                 : fmt::format("{:.0f}{}", value, kUnits[unit]);
}

std::string human_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) {
    return "?";
  }
  if (seconds < 9.95) {
    return fmt::format("{:.1f}s", seconds);
  }
  // Far beyond any run; keeps the conversion to integers defined.
  if (seconds > 1e12) {
    return "?";
  }
  const auto whole = static_cast<uint64_t>(std::llround(seconds));
  if (whole < 60) {
    return fmt::format("{}s", whole);
  }
  if (whole < 3600) {
    return fmt::format("{}m {:02}s", whole / 60, whole % 60);
  }
  const uint64_t minutes = (whole + 30) / 60;
  if (minutes < 24 * 60) {
    return fmt::format("{}h {:02}m", minutes / 60, minutes % 60);
  }
  const uint64_t hours = (minutes + 30) / 60;
  return fmt::format("{}d {:02}h", hours / 24, hours % 24);
}

std::string shortened(std::string_view text, size_t most) {
  if (text.size() <= most) {
    return std::string(text);
  }
  // Not within a character of several bytes.
  const auto begins = [&](size_t i) {
    return (static_cast<unsigned char>(text[i]) & 0xC0U) != 0x80U;
  };
  size_t head = most * 2 / 3;
  size_t tail = text.size() - most / 3;
  while (head > 0 && !begins(head)) {
    --head;
  }
  while (tail < text.size() && !begins(tail)) {
    ++tail;
  }
  return fmt::format("{}[... {} bytes ...]{}", text.substr(0, head), tail - head,
                     text.substr(tail));
}

std::string printable(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  const auto continues = [&](size_t i, size_t n) {
    for (size_t k = i + 1; k <= i + n; ++k) {
      if (k >= text.size() || (static_cast<unsigned char>(text[k]) & 0xC0U) != 0x80U) {
        return false;
      }
    }
    return true;
  };
  for (size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    size_t more = 0;
    bool good = c == '\n' || c == '\t' || (c >= 0x20 && c < 0x7F);
    if (c >= 0xC2 && c < 0xF5) {
      more = c < 0xE0 ? 1 : (c < 0xF0 ? 2 : 3);
      // U+0080 to U+009F are control characters too: a terminal may take U+009B for an escape.
      good = continues(i, more) && !(c == 0xC2 && static_cast<unsigned char>(text[i + 1]) < 0xA0);
    }
    if (good) {
      out.append(text.substr(i, more + 1));
      i += more + 1;
    } else {
      out += fmt::format("\\x{:02x}", c);
      ++i;
    }
  }
  return out;
}

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string join(std::span<const std::string> parts, std::string_view separator) {
  std::string out;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) {
      out += separator;
    }
    out += parts[i];
  }
  return out;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  for (;;) {
    const size_t at = text.find(separator);
    parts.emplace_back(text.substr(0, at));
    if (at == std::string_view::npos) {
      return parts;
    }
    text.remove_prefix(at + 1);
  }
}

}  // namespace cambium
