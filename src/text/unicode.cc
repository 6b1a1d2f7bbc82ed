#include "text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <span>
#include <utility>

#include "base/error.h"

namespace cambium::text {
namespace {

constexpr int kAlphabetSize = 256 + 68;  // 188 bytes stand for themselves, 68 get 256 + n

struct Alphabet {
  std::array<char32_t, 256> to_char{};
  std::array<int16_t, kAlphabetSize> to_byte{};
  std::array<std::string, 256> utf8;

  Alphabet() {
    to_byte.fill(-1);
    char32_t next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) ||
                             (byte >= 0xAE && byte <= 0xFF);
      to_char[byte] = printable ? static_cast<char32_t>(byte) : next++;
      to_byte[to_char[byte]] = static_cast<int16_t>(byte);
      append_utf8(utf8[byte], to_char[byte]);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

std::string normalise(std::string_view text, int options) {
  // Nothing below U+0300 changes under composition, and nothing in ASCII under any form.
  const bool compose_only = options == UTF8PROC_COMPOSE;
  bool plain = true;
  for (const unsigned char c : text) {
    plain = plain && c < (compose_only ? 0xCC : 0x80);
  }
  if (plain) {
    return std::string(text);
  }
  utf8proc_uint8_t* mapped = nullptr;
  const auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                   static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | options));
  if (length < 0) {
    fail("[unicode] cannot normalise {} bytes of text: {}", text.size(), utf8proc_errmsg(length));
  }
  std::string out(reinterpret_cast<const char*>(mapped), static_cast<size_t>(length));
  std::free(mapped);  // utf8proc allocates with malloc
  return out;
}

}  // namespace

Decoded decode_utf8(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(at);
  if (lead < 0x80) {
    return {lead, 1, true, false};
  }
  int rest = 0;
  unsigned char low = 0x80;   // the range of the second byte excludes overlong forms,
  unsigned char high = 0xBF;  // surrogates and what lies above U+10FFFF
  char32_t c = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    rest = 1;
    c = lead & 0x1F;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    rest = 2;
    c = lead & 0x0F;
    low = lead == 0xE0 ? 0xA0 : 0x80;
    high = lead == 0xED ? 0x9F : 0xBF;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    rest = 3;
    c = lead & 0x07;
    low = lead == 0xF0 ? 0x90 : 0x80;
    high = lead == 0xF4 ? 0x8F : 0xBF;
  } else {
    return {kReplacement, 1, false, false};
  }
  size_t length = 1;
  for (int i = 0; i < rest; ++i, ++length) {
    if (at + length >= text.size()) {
      return {kReplacement, length, false, true};
    }
    const unsigned char next = byte(at + length);
    if (next < low || next > high) {
      return {kReplacement, length, false, false};
    }
    c = (c << 6) | (next & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {c, length, true, false};
}

void append_utf8(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | (c >> 6));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | (c >> 12));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (c >> 18));
    out += static_cast<char>(0x80 | ((c >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  }
}

size_t valid_utf8_prefix(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    const Decoded d = decode_utf8(text, at);
    if (!d.valid) {
      break;
    }
    at += d.length;
  }
  return at;
}

std::string to_valid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  size_t at = 0;
  while (at < text.size()) {
    const size_t good = valid_utf8_prefix(text.substr(at));
    out.append(text, at, good);
    at += good;
    if (at < text.size()) {
      append_utf8(out, kReplacement);
      at += decode_utf8(text, at).length;
    }
  }
  return out;
}

size_t incomplete_utf8_suffix(std::string_view text) {
  for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const Decoded d = decode_utf8(text, text.size() - back);
    if (d.truncated && d.length == back) {
      return back;
    }
  }
  return 0;
}

std::u32string to_code_points(std::string_view text) {
  std::u32string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Decoded d = decode_utf8(text, at);
    out += d.code_point;
    at += d.length;
  }
  return out;
}

std::string to_utf8(std::u32string_view code_points) {
  std::string out;
  out.reserve(code_points.size());
  for (const char32_t c : code_points) {
    append_utf8(out, c);
  }
  return out;
}

size_t utf8_length(std::string_view text) {
  size_t count = 0;
  for (const unsigned char c : text) {
    count += (c & 0xC0) != 0x80;
  }
  return count;
}

namespace {

using Range = std::pair<char32_t, char32_t>;  // first and last

bool is_in(std::span<const Range> ranges, char32_t c) {
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), c,
                       [](char32_t x, const Range& range) { return x < range.first; });
  return after != ranges.begin() && c <= std::prev(after)->second;
}

// Marks that extend a character since Unicode 15.1 to 17: newer than the library's tables.
constexpr Range kNewMarks[] = {
    {0x897, 0x897},     {0xCC0, 0xCC0},     {0xCC7, 0xCC8},     {0xCCA, 0xCCB},
    {0x1715, 0x1715},   {0x1734, 0x1734},   {0x1ACF, 0x1ADD},   {0x1AE0, 0x1AEB},
    {0x1B3B, 0x1B3B},   {0x1B3D, 0x1B3D},   {0x1B43, 0x1B44},   {0x1BAA, 0x1BAA},
    {0x1BF2, 0x1BF3},   {0xA953, 0xA953},   {0xA9C0, 0xA9C0},   {0x10D69, 0x10D6D},
    {0x10EFA, 0x10EFC}, {0x111C0, 0x111C0}, {0x11235, 0x11235}, {0x1134D, 0x1134D},
    {0x113B8, 0x113B8}, {0x113BB, 0x113C0}, {0x113C2, 0x113C2}, {0x113C5, 0x113C5},
    {0x113C7, 0x113C9}, {0x113CE, 0x113D0}, {0x113D2, 0x113D2}, {0x113E1, 0x113E2},
    {0x116B6, 0x116B6}, {0x1193D, 0x1193D}, {0x11B60, 0x11B60}, {0x11B62, 0x11B64},
    {0x11B66, 0x11B66}, {0x11F41, 0x11F41}, {0x11F5A, 0x11F5A}, {0x1611E, 0x16129},
    {0x1612D, 0x1612F}, {0x16FF0, 0x16FF1}, {0x1D166, 0x1D166}, {0x1D16D, 0x1D16D},
    {0x1E5EE, 0x1E5EF}, {0x1E6E3, 0x1E6E3}, {0x1E6E6, 0x1E6E6}, {0x1E6EE, 0x1E6EF},
    {0x1E6F5, 0x1E6F5}};
// Likewise, marks that stand beside it.
constexpr Range kNewSpacingMarks[] = {{0x113B9, 0x113BA}, {0x113CA, 0x113CA}, {0x113CC, 0x113CD},
                                      {0x1171E, 0x1171E}, {0x11B61, 0x11B61}, {0x11B65, 0x11B65},
                                      {0x11B67, 0x11B67}, {0x1612A, 0x1612C}};
// Characters with Indic_Conjunct_Break: consonants, and what links them.
constexpr Range kConsonants[] = {
    {0x915, 0x939},     {0x958, 0x95F},     {0x978, 0x97F},     {0x995, 0x9A8},
    {0x9AA, 0x9B0},     {0x9B2, 0x9B2},     {0x9B6, 0x9B9},     {0x9DC, 0x9DD},
    {0x9DF, 0x9DF},     {0x9F0, 0x9F1},     {0xA95, 0xAA8},     {0xAAA, 0xAB0},
    {0xAB2, 0xAB3},     {0xAB5, 0xAB9},     {0xAF9, 0xAF9},     {0xB15, 0xB28},
    {0xB2A, 0xB30},     {0xB32, 0xB33},     {0xB35, 0xB39},     {0xB5C, 0xB5D},
    {0xB5F, 0xB5F},     {0xB71, 0xB71},     {0xC15, 0xC28},     {0xC2A, 0xC39},
    {0xC58, 0xC5A},     {0xD15, 0xD3A},     {0x1000, 0x102A},   {0x103F, 0x103F},
    {0x1050, 0x1055},   {0x105A, 0x105D},   {0x1061, 0x1061},   {0x1065, 0x1066},
    {0x106E, 0x1070},   {0x1075, 0x1081},   {0x108E, 0x108E},   {0x1780, 0x17B3},
    {0x1A20, 0x1A54},   {0x1B0B, 0x1B0C},   {0x1B13, 0x1B33},   {0x1B45, 0x1B4C},
    {0x1B83, 0x1BA0},   {0x1BAE, 0x1BAF},   {0x1BBB, 0x1BBD},   {0xA989, 0xA98B},
    {0xA98F, 0xA9B2},   {0xA9E0, 0xA9E4},   {0xA9E7, 0xA9EF},   {0xA9FA, 0xA9FE},
    {0xAA60, 0xAA6F},   {0xAA71, 0xAA73},   {0xAA7A, 0xAA7A},   {0xAA7E, 0xAA7F},
    {0xAAE0, 0xAAEA},   {0xABC0, 0xABDA},   {0x10A00, 0x10A00}, {0x10A10, 0x10A13},
    {0x10A15, 0x10A17}, {0x10A19, 0x10A35}, {0x11103, 0x11126}, {0x11144, 0x11144},
    {0x11147, 0x11147}, {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E},
    {0x11390, 0x113B5}, {0x11900, 0x11906}, {0x11909, 0x11909}, {0x1190C, 0x11913},
    {0x11915, 0x11916}, {0x11918, 0x1192F}, {0x11A00, 0x11A00}, {0x11A0B, 0x11A32},
    {0x11A50, 0x11A50}, {0x11A5C, 0x11A83}, {0x11F04, 0x11F10}, {0x11F12, 0x11F33}};
constexpr char32_t kLinkers[] = {0x94D,   0x9CD,   0xACD,   0xB4D,   0xC4D,   0xD4D,  0x1039,
                                 0x17D2,  0x1A60,  0x1B44,  0x1BAB,  0xA9C0,  0xAAF6, 0x10A3F,
                                 0x11133, 0x113D0, 0x1193E, 0x11A47, 0x11A99, 0x11F42};

/// A character that the library knows and that breaks clusters alike.
utf8proc_int32_t as_known(char32_t c) {
  constexpr utf8proc_int32_t kSomeMark = 0x300;
  constexpr utf8proc_int32_t kSomeSpacingMark = 0x903;
  return is_in(kNewMarks, c)          ? kSomeMark
         : is_in(kNewSpacingMarks, c) ? kSomeSpacingMark
                                      : static_cast<utf8proc_int32_t>(c);
}

/// Rule GB9c: consonants that a linker (a virama) joins are one cluster. The library's tables are
/// older than the rule.
class IndicConjunct {
 public:
  /// Whether `c` stays in the cluster of the characters before.
  bool joins(char32_t c) {
    const bool consonant = is_in(kConsonants, c);
    const bool joined = linked_ && consonant;
    if (consonant) {
      open_ = true;
      linked_ = false;
    } else if (std::binary_search(std::begin(kLinkers), std::end(kLinkers), c)) {
      linked_ = open_;
    } else if (!extends(c)) {
      open_ = linked_ = false;
    }
    return joined;
  }

 private:
  static bool extends(char32_t c) {
    constexpr char32_t kNonJoiner = 0x200C;
    const auto kind = utf8proc_get_property(as_known(c))->boundclass;
    return c != kNonJoiner &&
           (kind == UTF8PROC_BOUNDCLASS_EXTEND || kind == UTF8PROC_BOUNDCLASS_ZWJ);
  }

  bool open_ = false;    // a consonant, then only what extends it
  bool linked_ = false;  // and a virama among that
};

}  // namespace

size_t grapheme_length(std::string_view text, size_t at) {
  Decoded before = decode_utf8(text, at);
  size_t end = at + before.length;
  utf8proc_int32_t state = 0;
  IndicConjunct conjunct;
  conjunct.joins(before.code_point);
  while (end < text.size()) {
    const Decoded next = decode_utf8(text, end);
    const bool breaks = utf8proc_grapheme_break_stateful(as_known(before.code_point),
                                                         as_known(next.code_point), &state) != 0;
    if (!conjunct.joins(next.code_point) && breaks) {
      break;
    }
    end += next.length;
    before = next;
  }
  return end - at;
}

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_word(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:  // circled and squared letters count as alphabetic; joiners stand inside words
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
             (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189) || c == 0x200C ||
             c == 0x200D;
  }
}

// A character below U+0300 never changes by itself and never joins what stands before it. So only
// runs of other characters need work, each with the character in front that it may join.
std::string to_nfc(std::string_view text) {
  const auto low = [&](size_t at) { return static_cast<unsigned char>(text[at]) < 0xCC; };
  std::string out;
  out.reserve(text.size());
  size_t before = 0;  // the character in front of `at`
  for (size_t at = 0; at < text.size();) {
    if (low(at)) {
      const size_t length =
          static_cast<unsigned char>(text[at]) < 0x80 ? 1 : decode_utf8(text, at).length;
      out.append(text, at, length);
      before = at;
      at += length;
      continue;
    }
    size_t end = at;
    while (end < text.size() && !low(end)) {
      end += decode_utf8(text, end).length;
    }
    out.resize(out.size() - (at - before));
    out += normalise(text.substr(before, end - before), UTF8PROC_COMPOSE);
    before = at = end;
  }
  return out;
}
std::string to_nfd(std::string_view text) {
  return normalise(text, UTF8PROC_DECOMPOSE);
}
std::string to_nfkc(std::string_view text) {
  return normalise(text, UTF8PROC_COMPOSE | UTF8PROC_COMPAT);
}
std::string to_nfkd(std::string_view text) {
  return normalise(text, UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT);
}

std::string to_lower(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char32_t c : to_code_points(text)) {
    if (c == 0x130) {  // the one character whose full lower case is two code points
      append_utf8(out, 'i');
      append_utf8(out, 0x307);
    } else {
      append_utf8(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
    }
  }
  return out;
}

std::string to_upper(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char32_t c : to_code_points(text)) {
    if (c == 0xDF) {  // sharp s has no single capital in full case mapping
      out += "SS";
    } else {
      append_utf8(out, static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c))));
    }
  }
  return out;
}

char32_t byte_to_char(unsigned char byte) {
  return alphabet().to_char[byte];
}

int char_to_byte(char32_t c) {
  return c < alphabet().to_byte.size() ? alphabet().to_byte[c] : -1;
}

std::string bytes_to_alphabet(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size() * 2);
  for (const unsigned char byte : bytes) {
    out += alphabet().utf8[byte];
  }
  return out;
}

bool alphabet_to_bytes(std::string_view text, std::string& out) {
  out.clear();
  for (size_t at = 0; at < text.size();) {
    const Decoded d = decode_utf8(text, at);
    const int byte = d.valid ? char_to_byte(d.code_point) : -1;
    if (byte < 0) {
      return false;
    }
    out += static_cast<char>(byte);
    at += d.length;
  }
  return true;
}

}  // namespace cambium::text
