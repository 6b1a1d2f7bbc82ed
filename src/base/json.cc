#include "base/json.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <vector>

#include "base/error.h"
#include "base/text.h"

namespace cambium {
namespace {

int64_t line_of(std::string_view text, size_t at) {
  return 1 + std::count(text.begin(), text.begin() + static_cast<ptrdiff_t>(at), '\n');
}

/// One pass over the text, without recursion: where strings and nesting are. What is not JSON is
/// left for the parser to name.
class Scan {
 public:
  Scan(std::string_view text, const std::string& where, const JsonRules& rules)
      : text_(text), where_(where), rules_(rules) {}

  /// The text to parse: the same, or with Python's numbers put in quotes.
  std::string_view run() {
    for (size_t i = 0; i < text_.size();) {
      const char c = text_[i];
      if (c == '"') {
        i = string(i);
        continue;
      }
      if (c == '{' || c == '[') {
        if (static_cast<int>(open_.size()) >= rules_.depth) {  // the line is counted only here
          fail("{}:{}: JSON nested more than {} deep{}", where_, line_of(text_, i), rules_.depth,
               rules_.too_deep);
        }
        open_.push_back({c == '{', c == '{', {}});
      } else if ((c == '}' || c == ']') && !open_.empty()) {
        open_.pop_back();
      } else if (c == ',' && !open_.empty()) {
        open_.back().key_next = open_.back().object;
      } else if (rules_.python && (c == 'I' || c == 'N' || c == '-')) {
        i = number_word(i);
        continue;
      }
      ++i;
    }
    if (copied_ == 0) {
      return text_;
    }
    changed_.append(text_.substr(copied_));
    return changed_;
  }

 private:
  struct Open {
    bool object;
    bool key_next;  // the next string is a key
    std::unordered_set<std::string> keys;
  };

  /// Past the string that begins at i.
  size_t string(size_t i) {
    size_t end = i + 1;
    bool escaped = false;
    while (end < text_.size() && text_[end] != '"') {
      escaped = escaped || text_[end] == '\\';
      end += text_[end] == '\\' ? 2 : 1;
    }
    end = std::min(end + 1, text_.size());
    if (open_.empty() || !open_.back().key_next) {
      return end;
    }
    open_.back().key_next = false;
    if (rules_.unique_keys) {
      std::string key(text_.substr(i + 1, end - i - std::min<size_t>(end - i, 2)));
      if (escaped) {
        const auto parsed = nlohmann::json::parse(text_.substr(i, end - i), nullptr, false);
        key = parsed.is_string() ? parsed.get<std::string>() : key;
      }
      if (!open_.back().keys.insert(key).second) {
        fail("{}:{}: the key '{}' stands twice", where_, line_of(text_, i), shortened(key));
      }
    }
    return end;
  }

  size_t number_word(size_t i) {
    for (const std::string_view word : {"-Infinity", "Infinity", "NaN"}) {
      if (text_.substr(i, word.size()) == word) {
        changed_.append(text_.substr(copied_, i - copied_));
        changed_ += '"';
        changed_ += word;
        changed_ += '"';
        copied_ = i + word.size();
        return copied_;
      }
    }
    return i + 1;
  }

  std::string_view text_;
  const std::string& where_;
  const JsonRules& rules_;
  std::vector<Open> open_;
  std::string changed_;
  size_t copied_ = 0;  // of text_, into changed_
};

}  // namespace

std::string json_problem(const std::exception& error) {
  // "[json.exception.parse_error.101] parse error at line 1, column 3: syntax error ..."
  const std::string_view what = error.what();
  const size_t begin = what.find("] ");
  return shortened(begin == std::string_view::npos ? what : what.substr(begin + 2));
}

template <class Json>
Json parse_json(std::string_view text, const std::string& where, const JsonRules& rules) {
  Scan scan(text, where, rules);
  const std::string_view checked = scan.run();
  try {
    return Json::parse(checked);
  } catch (const nlohmann::json::exception& error) {
    fail("{} is not valid JSON: {}", where, json_problem(error));
  }
}

template <class Json>
Json try_json(std::string_view text, const JsonRules& rules) {
  try {
    return parse_json<Json>(text, "", rules);
  } catch (const Error&) {
    return Json(Json::value_t::discarded);
  }
}

template nlohmann::json try_json(std::string_view, const JsonRules&);
template nlohmann::ordered_json try_json(std::string_view, const JsonRules&);
template nlohmann::json parse_json(std::string_view, const std::string&, const JsonRules&);
template nlohmann::ordered_json parse_json(std::string_view, const std::string&, const JsonRules&);

}  // namespace cambium
