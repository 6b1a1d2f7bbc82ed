// Small steps of reading answers, shared by the graders.
#pragma once

#include <string>
#include <string_view>

namespace cambium {

inline bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
inline bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}
/// Of a name: a letter, a digit or an underscore.
inline bool is_word(char c) {
  return is_letter(c) || is_digit(c) || c == '_';
}

/// Without spaces and ends of lines around it.
inline std::string_view trim(std::string_view text) {
  constexpr std::string_view kSpaces = " \t\r\n\f\v";
  const size_t begin = text.find_first_not_of(kSpaces);
  return begin == std::string_view::npos
             ? std::string_view{}
             : text.substr(begin, text.find_last_not_of(kSpaces) - begin + 1);
}

/// The text with every `from` replaced, from the left; what is put in is not searched.
inline std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  for (size_t at = text.find(from); at != std::string_view::npos; at = text.find(from)) {
    out.append(text.substr(0, at)).append(to);
    text.remove_prefix(at + from.size());
  }
  return out.append(text);
}

inline void replace_all(std::string& text, std::string_view from, std::string_view to) {
  text = replaced(text, from, to);
}

}  // namespace cambium
