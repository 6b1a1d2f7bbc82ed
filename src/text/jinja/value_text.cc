// Values as text: Python's str, repr and json.dumps; and JSON back.
#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "text/jinja/value.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

bool printable(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return false;
    case UTF8PROC_CATEGORY_ZS:
      return c == ' ';
    default:
      return true;
  }
}

std::string quote_python(const std::string& s) {
  const bool twice = s.find('\'') != std::string::npos && s.find('"') == std::string::npos;
  const char quote = twice ? '"' : '\'';
  std::string out(1, quote);
  for (const char32_t c : text::to_code_points(s)) {
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (printable(c)) {
      text::append_utf8(out, c);
    } else if (c < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c));
    } else if (c < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<uint32_t>(c));
    }
  }
  return out + quote;
}

void quote_json(const std::string& s, bool ascii, std::string& out) {
  out += '"';
  for (size_t at = 0; at < s.size();) {
    const unsigned char c = static_cast<unsigned char>(s[at]);
    if (c >= 0x7F && ascii) {
      const text::Decoded d = text::decode_utf8(s, at);
      at += d.length;
      if (d.code_point < 0x10000) {
        out += fmt::format("\\u{:04x}", static_cast<uint32_t>(d.code_point));
      } else {
        const uint32_t v = d.code_point - 0x10000;
        out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (v >> 10), 0xDC00 + (v & 0x3FF));
      }
      continue;
    }
    ++at;
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (c < 0x20) {
          out += fmt::format("\\u{:04x}", c);
        } else {
          out += static_cast<char>(c);
        }
    }
  }
  out += '"';
}

void repr(const Value& value, std::string& out, Budget& budget);

void repr_list(const List& list, std::string& out, Budget& budget) {
  const bool tuple = list.kind == List::Kind::kTuple;
  out += tuple ? '(' : '[';
  for (size_t i = 0; i < list.items.size(); ++i) {
    out += i == 0 ? "" : ", ";
    repr(list.items[i], out, budget);
  }
  out += tuple ? (list.items.size() == 1 ? ",)" : ")") : "]";
}

void repr(const Value& value, std::string& out, Budget& budget) {
  budget.step();
  const size_t before = out.size();
  if (value.is_string()) {
    out += quote_python(value.as_string());
  } else if (value.is_list()) {
    const List& list = value.as_list();
    if (list.kind == List::Kind::kGenerator) {
      fail("a generator cannot be printed; expected | list or | join after the filter");
    }
    repr_list(list, out, budget);
    return;
  } else if (value.is_dict()) {
    out += '{';
    bool first = true;
    for (const auto& [key, item] : value.as_dict().items()) {
      out += first ? "" : ", ";
      first = false;
      repr(key, out, budget);
      out += ": ";
      repr(item, out, budget);
    }
    out += '}';
    return;
  } else if (value.is_undefined()) {
    out += "Undefined";
  } else if (value.is_none()) {
    out += "None";
  } else if (value.is_bool()) {
    out += value.truth() ? "True" : "False";
  } else if (value.is_int()) {
    out += std::to_string(value.as_int());
  } else if (value.is_float()) {
    out += float_repr(value.as_double());
  } else if (const std::string* digits = value.big_integer()) {
    out += *digits;
  } else {
    out += "<" + value.type_name() + ">";
  }
  budget.bytes(out.size() - before);
}

std::string json_key(const Value& key) {
  if (key.is_string()) {
    return key.as_string();
  }
  if (key.is_bool()) {
    return key.truth() ? "true" : "false";
  }
  if (key.is_int()) {
    return std::to_string(key.as_int());
  }
  return key.is_float() ? float_repr(key.as_double()) : "null";
}

class JsonWriter {
 public:
  JsonWriter(const JsonStyle& style, Budget& budget) : style_(style), budget_(budget) {}

  void write(const Value& value, int level) {
    budget_.step();
    const size_t before = out_.size();
    if (value.is_string()) {
      quote_json(value.as_string(), style_.ensure_ascii, out_);
    } else if (value.is_list() && value.as_list().kind <= List::Kind::kTuple) {
      write_list(value.as_list(), level);
      return;
    } else if (value.is_dict()) {
      write_dict(value.as_dict(), level);
      return;
    } else if (value.is_none()) {
      out_ += "null";
    } else if (value.is_bool()) {
      out_ += value.truth() ? "true" : "false";
    } else if (value.is_int()) {
      out_ += std::to_string(value.as_int());
    } else if (value.is_float()) {
      const double d = value.as_double();
      out_ += std::isnan(d)   ? "NaN"
              : std::isinf(d) ? (d > 0 ? "Infinity" : "-Infinity")
                              : float_repr(d);
    } else if (const std::string* digits = value.big_integer()) {
      out_ += *digits;
    } else {
      fail("tojson cannot write a {}", value.type_name());
    }
    budget_.bytes(out_.size() - before);
  }

  std::string take() { return std::move(out_); }

 private:
  void line(int level) {
    if (style_.multiline) {
      out_ += '\n';
      for (int i = 0; i < level; ++i) {
        out_ += style_.indent;
      }
      budget_.bytes(1 + static_cast<size_t>(level) * style_.indent.size());
    }
  }

  void write_list(const List& list, int level) {
    if (list.items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[';
    for (size_t i = 0; i < list.items.size(); ++i) {
      out_ += i == 0 ? "" : style_.item_separator;
      line(level + 1);
      write(list.items[i], level + 1);
    }
    line(level);
    out_ += ']';
  }

  void write_dict(const Dict& dict, int level) {
    if (dict.size() == 0) {
      out_ += "{}";
      return;
    }
    std::vector<std::pair<Value, Value>> items = dict.items();
    if (style_.sort_keys) {
      std::stable_sort(items.begin(), items.end(), [&](const auto& a, const auto& b) {
        return less(a.first, b.first, budget_);
      });
    }
    out_ += '{';
    bool first = true;
    for (const auto& [key, item] : items) {
      out_ += first ? "" : style_.item_separator;
      first = false;
      line(level + 1);
      quote_json(json_key(key), style_.ensure_ascii, out_);
      out_ += style_.key_separator;
      write(item, level + 1);
    }
    line(level);
    out_ += '}';
  }

  const JsonStyle& style_;
  Budget& budget_;
  std::string out_;
};

/// Builds values while the JSON text is read, so that keys keep their order.
class JsonReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return add(Value::none()); }
  bool boolean(bool b) override { return add(b); }
  bool number_integer(number_integer_t i) override { return add(static_cast<int64_t>(i)); }
  bool number_unsigned(number_unsigned_t u) override {
    return add(u <= INT64_MAX ? Value(static_cast<int64_t>(u)) : big(std::to_string(u)));
  }
  bool number_float(number_float_t d, const string_t& token) override {
    const bool whole = token.find_first_of(".eE") == std::string::npos;
    return add(whole ? big(token) : Value(d));
  }
  bool string(string_t& s) override { return add(std::move(s)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return open(true); }
  bool start_array(size_t) override { return open(false); }
  bool key(string_t& k) override {
    open_.back().key = std::move(k);
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool parse_error(size_t at, const std::string&,
                   const nlohmann::json::exception& problem) override {
    error = fmt::format("at byte {}: {}", at, problem.what());
    return false;
  }

  static Value big(std::string digits) {
    return Value::Data(std::make_shared<const BigInteger>(BigInteger{std::move(digits)}));
  }

  Value result;
  std::string error;

 private:
  struct Open {
    bool object;
    std::string key;
    std::vector<Value> items;
    Dict dict;
  };

  bool open(bool object) {
    if (open_.size() >= static_cast<size_t>(Budget::kValueDepth) - 1) {
      error = fmt::format("nested more than {} deep", Budget::kValueDepth - 1);
      return false;
    }
    open_.push_back({object, {}, {}, {}});
    return true;
  }

  bool close() {
    Open done = std::move(open_.back());
    open_.pop_back();
    return add(done.object ? Value::dict(std::move(done.dict))
                           : Value::list(std::move(done.items)));
  }

  bool add(Value value) {
    if (open_.empty()) {
      result = std::move(value);
    } else if (open_.back().object) {
      open_.back().dict.set(std::exchange(open_.back().key, {}), std::move(value));
    } else {
      open_.back().items.push_back(std::move(value));
    }
    return true;
  }

  std::vector<Open> open_;
};

}  // namespace

std::string float_repr(double value) {
  if (std::isnan(value)) {
    return "nan";
  }
  if (std::isinf(value)) {
    return value > 0 ? "inf" : "-inf";
  }
  char buffer[64];
  const auto scientific =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string digits(buffer, scientific.ptr);
  const size_t e = digits.find('e');
  const int exponent = std::stoi(digits.substr(e + 1));
  if (value != 0 && (exponent < -4 || exponent >= 16)) {
    return fmt::format("{}e{}{:02}", digits.substr(0, e), exponent < 0 ? '-' : '+',
                       std::abs(exponent));
  }
  const auto fixed =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed);
  std::string out(buffer, fixed.ptr);
  if (out.find('.') == std::string::npos) {
    out += ".0";
  }
  return out;
}

std::string to_str(const Value& value, Budget& budget) {
  if (value.is_string()) {
    return value.as_string();
  }
  return value.is_undefined() ? std::string() : to_repr(value, budget);
}

std::string to_repr(const Value& value, Budget& budget) {
  std::string out;
  repr(value, out, budget);
  return out;
}

std::string to_json(const Value& value, const JsonStyle& style, Budget& budget) {
  JsonWriter writer(style, budget);
  writer.write(value, 0);
  return writer.take();
}

Value from_json(std::string_view text, std::string_view what) {
  JsonReader reader;
  if (!nlohmann::json::sax_parse(text, &reader)) {
    fail("[chat_template] expected JSON in {}: {}", what, reader.error);
  }
  return std::move(reader.result);
}

}  // namespace cambium::jinja
