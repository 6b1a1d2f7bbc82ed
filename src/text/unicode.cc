#include "text/unicode.h"

#include <utf8proc.h>

#include <cstdint>
#include <cstdlib>

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
