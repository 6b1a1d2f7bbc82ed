// UTF-8 and the few character classes that tokenizers need.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

namespace cambium::text {

constexpr char32_t kReplacement = 0xFFFD;

/// One step of reading UTF-8.
struct Decoded {
  char32_t code_point;  // kReplacement when ill-formed
  size_t length;        // bytes taken, at least 1; an ill-formed part is taken maximally
  bool valid;
  bool truncated;  // ill-formed only because the text ends here
};

/// Reads the character at `at`, which must be < text.size(). Ill-formed input is cut into "maximal
/// subparts" as Unicode (chapter 3, U+FFFD substitution) recommends.
Decoded decode_utf8(std::string_view text, size_t at);

void append_utf8(std::string& out, char32_t code_point);

/// Length of the leading part that is well-formed.
size_t valid_utf8_prefix(std::string_view text);
inline bool is_valid_utf8(std::string_view text) {
  return valid_utf8_prefix(text) == text.size();
}

/// Replaces every ill-formed part by U+FFFD.
std::string to_valid_utf8(std::string_view text);

/// Length of the end of `text` that may still become a character when more bytes follow.
size_t incomplete_utf8_suffix(std::string_view text);

/// The code points of well-formed text (ill-formed parts as U+FFFD).
std::u32string to_code_points(std::string_view text);
std::string to_utf8(std::u32string_view code_points);
/// Number of code points.
size_t utf8_length(std::string_view text);

/// Bytes of the extended grapheme cluster (UAX #29) that begins at `at` < text.size().
size_t grapheme_length(std::string_view text, size_t at);

/// Unicode White_Space.
bool is_white_space(char32_t c);
/// What regular expressions call \w: letters, marks, digits, connectors, joiners.
bool is_word(char32_t c);

/// Normalisation form C.
std::string to_nfc(std::string_view text);
std::string to_nfd(std::string_view text);
std::string to_nfkc(std::string_view text);
std::string to_nfkd(std::string_view text);
std::string to_lower(std::string_view text);
std::string to_upper(std::string_view text);

/// The byte alphabet of byte-level vocabularies: each byte has a printable character.
char32_t byte_to_char(unsigned char byte);
/// The byte for a character of the alphabet, or -1.
int char_to_byte(char32_t c);

/// Every byte as its character.
std::string bytes_to_alphabet(std::string_view bytes);
/// The inverse; false (and `out` unspecified) when a character is outside the alphabet.
bool alphabet_to_bytes(std::string_view text, std::string& out);

}  // namespace cambium::text
