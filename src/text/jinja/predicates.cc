// What may stand behind `is`, and the names that select and reject know.
#include <algorithm>
#include <array>

#include "base/error.h"
#include "text/jinja/runtime.h"
#include "text/unicode.h"

namespace cambium::jinja {
namespace {

const Value& operand(const Args& args, const char* test) {
  return Bound(test, args, {"other"}).required(0);
}

template <bool (*Predicate)(const Value&)>
bool simple(Runtime&, const Value& value, const Args& args) {
  const Bound none("a test", args, {});
  return Predicate(value);
}

bool defined(const Value& v) {
  return !v.is_undefined();
}
bool undefined(const Value& v) {
  return v.is_undefined();
}
bool none(const Value& v) {
  return v.is_none();
}
bool boolean(const Value& v) {
  return v.is_bool();
}
bool is_true(const Value& v) {
  return v.is_bool() && v.truth();
}
bool is_false(const Value& v) {
  return v.is_bool() && !v.truth();
}
bool integer(const Value& v) {
  return v.is_int() || v.big_integer() != nullptr;
}
bool real(const Value& v) {
  return v.is_float();
}
bool number(const Value& v) {
  return v.is_number() || v.big_integer() != nullptr;
}
bool string(const Value& v) {
  return v.is_string();
}
bool mapping(const Value& v) {
  return v.is_dict();
}
bool callable(const Value& v) {
  return v.get_if<const Callable>() != nullptr;
}
bool iterable(const Value& v) {
  return v.is_string() || v.is_list() || v.is_dict() || v.is_undefined();
}
bool sequence(const Value& v) {
  return iterable(v) && !(v.is_list() && v.as_list().kind > List::Kind::kTuple);
}
bool never(const Value&) {
  return false;
}
bool odd(const Value& v) {
  return expect_integer(v, "odd") % 2 != 0;
}
bool even(const Value& v) {
  return expect_integer(v, "even") % 2 == 0;
}

bool has_case(const std::string& s, bool upper) {
  const std::string changed = upper ? text::to_upper(s) : text::to_lower(s);
  return changed == s && (upper ? text::to_lower(s) : text::to_upper(s)) != s;
}

bool lower(Runtime& runtime, const Value& v, const Args&) {
  return has_case(runtime.str(v), false);
}
bool upper(Runtime& runtime, const Value& v, const Args&) {
  return has_case(runtime.str(v), true);
}

bool divisible_by(Runtime&, const Value& v, const Args& args) {
  const int64_t by = expect_integer(operand(args, "divisibleby"), "divisibleby");
  expect(by != 0, "division by zero");
  return by == -1 || expect_integer(v, "divisibleby") % by == 0;
}

bool eq(Runtime& r, const Value& v, const Args& args) {
  return equal(v, operand(args, "eq"), r.budget);
}
bool ne(Runtime& r, const Value& v, const Args& args) {
  return !eq(r, v, args);
}
bool lt(Runtime& r, const Value& v, const Args& args) {
  return less(v, operand(args, "lt"), r.budget);
}
bool gt(Runtime& r, const Value& v, const Args& args) {
  return less(operand(args, "gt"), v, r.budget);
}
bool le(Runtime& r, const Value& v, const Args& args) {
  return !gt(r, v, args);
}
bool ge(Runtime& r, const Value& v, const Args& args) {
  return !lt(r, v, args);
}
bool in(Runtime& r, const Value& v, const Args& args) {
  return r.contains(operand(args, "in"), v);
}
bool same_as(Runtime& r, const Value& v, const Args& args) {
  const Value& other = operand(args, "sameas");
  return v.data().index() == other.data().index() && equal(v, other, r.budget);
}
bool is_filter(Runtime&, const Value& v, const Args&) {
  return v.is_string() && find_filter(v.as_string()) != nullptr;
}
bool is_test(Runtime&, const Value& v, const Args&) {
  return v.is_string() && find_test(v.as_string()) != nullptr;
}

constexpr std::array<std::pair<std::string_view, Test>, 39> kTests = {{
    {"defined", simple<defined>},
    {"undefined", simple<undefined>},
    {"none", simple<none>},
    {"boolean", simple<boolean>},
    {"true", simple<is_true>},
    {"false", simple<is_false>},
    {"integer", simple<integer>},
    {"float", simple<real>},
    {"number", simple<number>},
    {"string", simple<string>},
    {"mapping", simple<mapping>},
    {"callable", simple<callable>},
    {"iterable", simple<iterable>},
    {"sequence", simple<sequence>},
    {"escaped", simple<never>},
    {"odd", simple<odd>},
    {"even", simple<even>},
    {"lower", lower},
    {"upper", upper},
    {"divisibleby", divisible_by},
    {"eq", eq},
    {"equalto", eq},
    {"==", eq},
    {"ne", ne},
    {"!=", ne},
    {"lt", lt},
    {"lessthan", lt},
    {"<", lt},
    {"gt", gt},
    {"greaterthan", gt},
    {">", gt},
    {"le", le},
    {"<=", le},
    {"ge", ge},
    {">=", ge},
    {"in", in},
    {"sameas", same_as},
    {"filter", is_filter},
    {"test", is_test},
}};

}  // namespace

Test find_test(std::string_view name) {
  const auto found = std::find_if(kTests.begin(), kTests.end(),
                                  [&](const auto& row) { return row.first == name; });
  return found == kTests.end() ? nullptr : found->second;
}

}  // namespace cambium::jinja
