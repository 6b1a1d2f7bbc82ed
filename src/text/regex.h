// Regular expressions as Hugging Face tokenizers write them: Oniguruma's dialect, run by PCRE2.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace cambium::text {

/// Rewrites an Oniguruma (Ruby dialect) pattern as PCRE2 understands it. Differences met: \h is a
/// hex digit, \s \w \b and POSIX-like properties follow today's Unicode, [a&&b] intersects and
/// [a[b]] unites classes, {,n} and {n,m}+ mean repeats, (?m) lets the dot match a newline.
std::string translate_oniguruma(std::string_view pattern);

class Regex {
 public:
  /// `pattern` in Oniguruma's dialect; an Error names what is wrong with it.
  explicit Regex(std::string_view pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  /// The first match at or after `from` in `subject`, which must be valid UTF-8 (look-behind sees
  /// what lies before `from`). Thread-safe. Throws Error when the search takes too many steps.
  bool find(std::string_view subject, size_t from, size_t& begin, size_t& end) const;

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

}  // namespace cambium::text
