// The dialect, as the reference implementation of Jinja renders it with trim_blocks and
// lstrip_blocks.
#include "text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "base/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

constexpr const char* kMessages =
    R"([{"role":"system","content":"S"},{"role":"user","content":"Q"},{"role":"assistant","content":"A"}])";
constexpr const char* kVariables =
    R"({"n":5,"s":"Hello, World","l":[3,1,2],"d":{"b":1,"a":2},"nul":null,
  "objs":[{"n":"x","v":2},{"n":"y","v":1,"k":{"z":1}}],"u":"日本é"})";

std::string render(const std::string& source) {
  return ChatTemplate(source).render({{"bos_token", "<s>"}}, kMessages, "", true, kVariables);
}

struct Row {
  std::string source;
  std::string expected;
};

const std::vector<Row> kExpressions = {
    {"{{ 1+2*3 }}", "7"},
    {"{{ -7//2 }}", "-4"},
    {"{{ -7%3 }}", "2"},
    {"{{ 7/2 }}", "3.5"},
    {"{{ 2**3**2 }}", "64"},
    {"{{ -2**2 }}", "4"},
    {"{{ 'a'~1~none~true~2.5 }}", "a1NoneTrue2.5"},
    {"{{ 'ab'*2 }}", "abab"},
    {"{{ [1]+[2] }}", "[1, 2]"},
    {"{{ 1<2<3 }}", "True"},
    {"{{ 1 == 1.0 }}", "True"},
    {"{{ '1' == 1 }}", "False"},
    {"{{ not 1 in l }}", "False"},
    {"{{ 'a' if nul else 'b' }}", "b"},
    {"{{ 'a' if nul }}", ""},
    {"{{ 0 or none or 'x' }}", "x"},
    {"{{ 1 and 0 }}", "0"},
    {"{{ s[0] }}", "H"},
    {"{{ s[-1] }}", "d"},
    {"{{ s[1:4] }}", "ell"},
    {"{{ u[::-1] }}", "é本日"},
    {"{{ l[::-1] }}", "[2, 1, 3]"},
    {"{{ l[9] }}", ""},
    {"{{ messages[-1].role }}", "assistant"},
    {"{{ messages.0.role }}", "system"},
    {"{{ {'a':{'b':[10]}}.a.b[0] }}", "10"},
    {"{{ 0x1F }}", "31"},
    {"{{ 1_000 }}", "1000"},
    {"{{ 1.5e3 }}", "1500.0"},
    {"{{ 1e16 }}", "1e+16"},
    {"{{ 0.1+0.2 }}", "0.30000000000000004"},
    {"{{ '\\u00e9\\n' 'b' }}", "é\nb"},
    {"{{ n|abs * 2 }}", "10"},
    {"{{ not n is odd }}", "False"},
    {"{{ (1,) }}", "(1,)"},
    {"{{ range(5,0,-2)|list }}", "[5, 3, 1]"},
    {"{{ namespace(a=1).a }}", "1"},
    {"{{ d.items()|list }}", "[('b', 1), ('a', 2)]"},
    {"{{ nul.foo }}", ""},
};

const std::vector<Row> kUndefined = {
    {"{{ missing }}", ""},
    {"{{ missing is defined }}", "False"},
    {"{{ missing|default('D') }}", "D"},
    {"{{ missing|length }}", "0"},
    {"{{ missing|list }}", "[]"},
    {"{{ missing == missing }}", "True"},
    {"{{ 'x' in missing }}", "False"},
    {"{{ missing~'x' }}", "x"},
};

const std::vector<Row> kFilters = {
    {"{{ objs|tojson }}",
     "[{\"n\": \"x\", \"v\": 2}, {\"n\": \"y\", \"v\": 1, \"k\": {\"z\": 1}}]"},
    {"{{ {'b':[1.0,none,'é\"'],'a':{}}|tojson(indent=2) }}",
     "{\n  \"b\": [\n    1.0,\n    null,\n    \"é\\\"\"\n  ],\n  \"a\": {}\n}"},
    {"{{ d|tojson(sort_keys=true,separators=(',',':')) }}", "{\"a\":2,\"b\":1}"},
    {"{{ 'é'|tojson(ensure_ascii=true) }}", "\"\\u00e9\""},
    {"{{ d|dictsort }}", "[('a', 2), ('b', 1)]"},
    {"{{ d|items|list }}", "[('b', 1), ('a', 2)]"},
    {"{{ l|sort(reverse=true) }}", "[3, 2, 1]"},
    {"{{ ['b','A']|sort }}", "['A', 'b']"},
    {"{{ objs|sort(attribute='v')|map(attribute='n')|join(',') }}", "y,x"},
    {"{{ objs|map(attribute='k.z',default='-')|list }}", "['-', 1]"},
    {"{{ objs|sum(attribute='v') }}", "3"},
    {"{{ objs|selectattr('v','equalto',2)|list }}", "[{'n': 'x', 'v': 2}]"},
    {"{{ objs|rejectattr('k','defined')|map(attribute='n')|first }}", "x"},
    {"{{ l|select('odd')|list }}", "[3, 1]"},
    {"{{ l|reject('odd')|list }}", "[2]"},
    {"{{ ['a','A','b']|unique|list }}", "['a', 'b']"},
    {"{{ l|last }}", "2"},
    {"{{ l|reverse|list }}", "[2, 1, 3]"},
    {"{{ s|reverse }}", "dlroW ,olleH"},
    {"{{ [1,2,3]|batch(2,'-')|list }}", "[[1, 2], [3, '-']]"},
    {"{{ [1,2,3]|slice(2)|list }}", "[[1, 2], [3]]"},
    {"{{ l|min }}", "1"},
    {"{{ l|max }}", "3"},
    {"{{ 2.5|round }}", "2.0"},
    {"{{ 7|round }}", "7"},
    {"{{ '4x'|int(7) }}", "7"},
    {"{{ 'ff'|int(base=16) }}", "255"},
    {"{{ '2.5'|float }}", "2.5"},
    {"{{ ' x '|trim }}", "x"},
    {"{{ 'xax'|trim('x') }}", "a"},
    {"{{ \"they're 2nd-hand\"|title }}", "They're 2nd-Hand"},
    {"{{ 'aBC d'|capitalize }}", "Abc d"},
    {"{{ 'a\\nb\\n\\nc'|indent(2) }}", "a\n  b\n\n  c"},
    {"{{ '<a>&'|e }}", "&lt;a&gt;&amp;"},
    {"{{ 'a b/é'|urlencode }}", "a%20b/%C3%A9"},
    {"{{ 'foo bar baz qux'|truncate(11) }}", "foo bar baz qux"},
    {"{{ s|wordcount }}", "2"},
    {"{{ '%s %05d %.2f'|format('a',42,2.5) }}", "a 00042 2.50"},
    {"{{ ll|default([])|length }}", "0"},
    {"{{ objs|groupby('v')|map('first')|list }}", "[1, 2]"},
    {"{{ nul|string }}", "None"},
    {"{{ s|replace('l','L',1) }}", "HeLlo, World"},
    {"{{ s|upper|lower }}", "hello, world"},
};

const std::vector<Row> kMethods = {
    {"{{ s.split(', ') }}", "['Hello', 'World']"},
    {"{{ 'a b  c'.split(None,1) }}", "['a', 'b  c']"},
    {"{{ 'a,b,c'.rsplit(',',1) }}", "['a,b', 'c']"},
    {"{{ 'xaxx'.strip('x') }}", "a"},
    {"{{ '  a '.lstrip()~'|' }}", "a |"},
    {"{{ s.startswith('He') }}", "True"},
    {"{{ s.endswith(('x','ld')) }}", "True"},
    {"{{ s.find('o') }}", "4"},
    {"{{ u.find('é') }}", "2"},
    {"{{ 'aaa'.replace('a','b',2) }}", "bba"},
    {"{{ 'abc'.replace('','-') }}", "-a-b-c-"},
    {"{{ ', '.join(['a','b']) }}", "a, b"},
    {"{{ 'foobar'.removeprefix('foo') }}", "bar"},
    {"{{ 'a=b=c'.partition('=') }}", "('a', '=', 'b=c')"},
    {"{{ 'x1y 2nd'.title() }}", "X1Y 2Nd"},
    {"{{ 'ab'.center(7,'*') }}", "***ab**"},
    {"{{ '-42'.zfill(5) }}", "-0042"},
    {"{{ '{0}-{k:>3}|{1:.1f}'.format('a',2.55,k='z') }}", "a-  z|2.5"},
    {"{{ '%s=%d' % ('a',3) }}", "a=3"},
    {"{{ 'a\\r\\nb'.splitlines() }}", "['a', 'b']"},
    {"{{ 'aB'.swapcase() }}", "Ab"},
    {"{{ '12'.isdigit() }}", "True"},
    {"{{ d.get('zz','q') }}", "q"},
    {"{{ d.keys()|list }}", "['b', 'a']"},
    {"{{ l.index(1) }}", "1"},
    {"{{ l.count(3) }}", "1"},
};

const std::vector<Row> kTests = {
    {"{{ n is number }}", "True"},         {"{{ true is integer }}", "False"},
    {"{{ s is sequence }}", "True"},       {"{{ d is mapping }}", "True"},
    {"{{ missing is iterable }}", "True"}, {"{{ 6 is divisibleby 3 }}", "True"},
    {"{{ n is in [4,5] }}", "True"},       {"{{ 'x' is lower }}", "True"},
    {"{{ nul is not none }}", "False"},    {"{{ range is callable }}", "True"},
    {"{{ 1 is sameas true }}", "False"},   {"{{ 'upper' is filter }}", "True"},
};

const std::vector<Row> kStatements = {
    {"{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.revindex0 }}{{ "
     "m.role }}{{ loop.cycle('a','b') }};{% else %}none{% endfor %}",
     "1TrueFalse2systema;2FalseFalse1userb;3FalseTrue0assistanta;"},
    {"{% for m in messages if m.role=='zz' %}{{ m }}{% else %}no{% endfor %}", "no"},
    {"{% for k, v in {'a':1,'b':2}.items() %}{{k}}={{v}},{% endfor %}", "a=1,b=2,"},
    {"{% for a,(b,c) in [(1,(2,3))] %}{{a+b+c}}{% endfor %}", "6"},
    {"{% for i in range(10) %}{% if i==2 %}{% continue %}{% endif %}{% if i==5 %}{% break %}{% "
     "endif %}{{i}}{% endfor %}",
     "0134"},
    {"{% set x=1 %}{% for i in range(3) %}{% set x=x+1 %}{{x}}{% endfor %}{{x}}", "2221"},
    {"{% set x=1 %}{% if true %}{% set x=2 %}{% endif %}{{x}}", "2"},
    {"{% set ns=namespace(x=1) %}{% for i in range(3) %}{% set ns.x=ns.x+i %}{% endfor %}{{ns.x}}",
     "4"},
    {"{% set a,b=1,2 %}{{a}}{{b}}", "12"},
    {"{% set x | upper | trim %} hello {% endset %}[{{x}}]", "[HELLO]"},
    {"{% macro f(a,b=2,c='x') %}{{a}}-{{b}}-{{c}}{% endmacro %}{{f(1)}} {{f(1,c='z')}} "
     "{{f(b=5,a=4)}} {{f()}}",
     "1-2-x 1-2-z 4-5-x -2-x"},
    {"{% macro f(a) %}{{a}}{{varargs}}{{kwargs}}{% endmacro %}{{f(1,2,3,x=4)}}", "1(2, 3){'x': 4}"},
    {"{% macro f() %}{{g}}{% endmacro %}{% set g=6 %}{{f()}}", "6"},
    {"{% macro f(n) %}{% if n>0 %}{{n}}{{f(n-1)}}{% endif %}{% endmacro %}{{f(5)}}", "54321"},
    {"{% macro f() %}[{{caller(1,2)}}]{% endmacro %}{% call(a,b) f() %}{{a+b}}{% endcall %}",
     "[3]"},
    {"{% filter replace('a','b')|upper %}abc{% endfilter %}", "BBC"},
    {"{% set a=5 %}{% with a=1,b=a %}{{a}}{{b}}{% endwith %}{{a}}", "155"},
    {"  {% generation %}\n x{{ messages[0].content }}\n  {% endgeneration %}\n", " xS\n"},
    {"{% if false %}S{% elif true %}E{% else %}L{% endif %}", "E"},
    {"{{ bos_token }}{{ unk_token }}{{ tools }}{{ add_generation_prompt }}", "<s>NoneTrue"},
};

const std::vector<Row> kWhitespace = {
    {"a\n{% if true %}\nb\n{% endif %}\nc\n", "a\nb\nc"},
    {"  {% if true %}  \n  x\n  {% endif %}  y", "  \n  x\n  y"},
    {"  {%- if true -%}  \n  x\n  {%- endif -%}  y  ", "xy  "},
    {"  {%+ if true +%}\n  x\n  {%+ endif %}\n y  ", "  \n  x\n   y  "},
    {"a {{ 1 }} \n b {{- 2 -}} \n c", "a 1 \n b2c"},
    {"a\n  {# comment #}\nb {# c2 #} c\n  {#- c3 -#}\n d", "a\nb  cd"},
    {"  {% raw %}\n a {{b}}\n  {% endraw %}\n c", "\n a {{b}}\n c"},
    {"  {%- raw -%}\n a {{b}}\n  {%- endraw -%}\n c", "a {{b}}c"},
    {"x\n\n", "x\n"},
    {"\r\na\r\n{% if true %}\r\nb{% endif %}\rc", "\na\nbc"},
    {"{{ '}}' }} {{ {'a':{'b':1}}['a']['b'] }}", "}} 1"},
};

void check(const std::vector<Row>& rows) {
  for (const auto& [source, expected] : rows) {
    std::string got;
    try {
      got = render(source);
    } catch (const Error& e) {
      got = e.what();
    }
    EXPECT_EQ(got, expected) << source;
  }
}

TEST(ChatTemplate, Expressions) {
  check(kExpressions);
}
TEST(ChatTemplate, Undefined) {
  check(kUndefined);
}
TEST(ChatTemplate, Filters) {
  check(kFilters);
}
TEST(ChatTemplate, Methods) {
  check(kMethods);
}
TEST(ChatTemplate, Tests) {
  check(kTests);
}
TEST(ChatTemplate, Statements) {
  check(kStatements);
}
TEST(ChatTemplate, Whitespace) {
  check(kWhitespace);
}

TEST(ChatTemplate, RefusesWhatIsWrong) {
  const std::vector<Row> rows = {
      {"{{", "line 1: expected }} to end the tag"},
      {"a\n{% if true %}", "line 2: expected {% endif %} for the block of line 2"},
      {"{% endif %}", "unexpected block \"endif\""},
      {"{% include 'x' %}", "unexpected block \"include\""},
      {"{{ a b }}", "expected }} after the expression, got b"},
      {"{{ (1 }}", "unexpected }, expected )"},
      {"{{ 'a }}", "expected ' to end the string"},
      {"{{ a $ b }}", "unexpected character"},
      {"{# x", "to end the comment"},
      {"{% raw %}x", "endraw"},
      {"{% break %}", "break outside of a loop"},
      {"{% set true = 1 %}", "cannot assign to true"},
      {"{% for m in messages recursive %}{% endfor %}", "recursive loops are not supported"},
      {"\n\n{{ missing.x }}", "line 3: missing is undefined"},
      {"{{ missing() }}", "missing is undefined"},
      {"{{ 'a' + 1 }}", "cannot add a string and a int"},
      {"{{ 1 // 0 }}", "division by zero"},
      {"{{ n | nothing }}", "there is no filter \"nothing\""},
      {"{{ n is nothing }}", "there is no test \"nothing\""},
      {"{{ n.x.y }}", "is undefined"},
      {"{{ s.upper(1) }}", "takes at most 0 arguments, got 1"},
      {"{{ l.append(1) }}", "must not change a list"},
      {"{{ d.update({}) }}", "must not change a mapping"},
      {"{{ s.__class__.x }}", "is undefined"},
      {"{{ namespace() | tojson }}", "tojson cannot write a namespace"},
      {"{% set x = 1 %}{% set x.y = 2 %}", "expected a namespace, got a int"},
      {"{% set a, b = [1, 2, 3] %}", "expected 2 values to unpack, got 3"},
      {"{% for i in 1 %}{% endfor %}", "a int cannot be iterated"},
      {"{% macro f(a) %}{% endmacro %}{{ f(1, 2) }}", "takes at most 1 arguments, got 2"},
      {"{% macro f(a) %}{% endmacro %}{{ f(b=1) }}", "has no parameter \"b\""},
      {"{{ ['b', 1] | sort }}", "have no order"},
      {"{{ raise_exception('roles must alternate') }}", "line 1: roles must alternate"},
      {"{{ 9223372036854775807 + 1 }}", "too large"},
  };
  for (const Row& row : rows) {
    const std::string message = testing::error_of([&] { render(row.source); });
    EXPECT_THAT(message, HasSubstr(row.expected)) << row.source;
  }
}

/// Templates that would take for ever, fill the memory or overflow the stack.
TEST(ChatTemplate, IsBounded) {
  const auto repeated = [](const std::string& s, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) {
      out += s;
    }
    return out;
  };
  const std::string loops =
      repeated("{% for i in range(100000) %}", 3) + repeated("{% endfor %}", 3);
  const std::string doubling =
      "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(100) %}"
      "{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
  const std::string lists =
      "{% set ns = namespace(s=[1]) %}{% for i in range(100000) %}"
      "{% set ns.s = [ns.s, ns.s] %}{% endfor %}";
  const std::string macros = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
  const std::string scopes =
      "{% set ns = namespace() %}{% macro f() %}{% macro g() %}{{ ns.f() }}{% endmacro %}"
      "{% set ns.f = g %}{% endmacro %}{{ f() }}{{ ns.f() }}";
  const std::vector<std::string> sources = {
      loops,
      doubling,
      lists,
      macros,
      scopes,
      "{{ 'a' * 10 ** 12 }}",
      "{{ range(10 ** 9) }}",
      "{{ [0] * 10 ** 12 }}",
      "{{ 'x'.center(10 ** 9) }}",
      "{% for i in range(100000) %}" + repeated("x", 2000) + "{% endfor %}",
      "{{ " + repeated("(", 10000) + "1" + repeated(")", 10000) + " }}",
      "{{ " + repeated("-", 10000) + "1 }}",
      "{{ " + repeated("not ", 10000) + "1 }}",
      "{{ " + repeated("[", 10000) + repeated("]", 10000) + " }}",
      "{{ 1" + repeated("+1", 10000) + " }}",
      "{{ l" + repeated("[0]", 10000) + " }}",
      repeated("{% if 1 %}", 10000) + repeated("{% endif %}", 10000),
  };
  for (const std::string& source : sources) {
    EXPECT_THROW(render(source), Error) << source.substr(0, 80);
  }
  // A namespace may hold itself and macros outlive their scope without leaking.
  EXPECT_EQ(render("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns.me.me.me is defined }}"),
            "True");
}

TEST(ChatTemplate, ChecksItsInput) {
  const ChatTemplate plain("{{ messages[0].a.b }}");
  const auto with = [&](const char* messages, const char* tools, const char* kwargs) {
    try {
      return plain.render({}, messages, tools, true, kwargs);
    } catch (const Error& e) {
      return std::string(e.what());
    }
  };
  EXPECT_EQ(with(R"([{"a":{"b":"x"}}])", "", ""), "x");
  EXPECT_THAT(with("[", "", ""), HasSubstr("expected JSON in messages"));
  EXPECT_THAT(with("{}", "", ""), HasSubstr("expected messages as an array"));
  EXPECT_THAT(with("[]", "{}", ""), HasSubstr("expected tools as an array"));
  EXPECT_THAT(with("[]", "", "[]"), HasSubstr("expected chat_template_kwargs as an object"));
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  EXPECT_THAT(with(deep.c_str(), "", ""), HasSubstr("nested more than"));
}

TEST(ChatTemplates, FiltersOfAnythingFalseGiveNothing) {
  for (const char* empty : {"none", "false", "''", "0", "[]"}) {
    for (const char* filter : {"selectattr('type', 'equalto', 'x')", "rejectattr('type')",
                               "select('odd')", "reject", "map(attribute='a')", "map('upper')"}) {
      EXPECT_EQ(render(std::string("{{ ") + empty + " | " + filter + " | list }}"), "[]")
          << empty << " " << filter;
    }
  }
}

TEST(ChatTemplates, TextJoinsWhatGeneratorsGive) {
  EXPECT_EQ(render("{{ ', '.join(['b', 'a'] | map('upper')) }}"), "B, A");
  EXPECT_EQ(render("{{ '|'.join(['b', 'a', 'b'] | unique) }}"), "b|a");
  EXPECT_EQ(render("{{ ''.join(['b', 'a'] | reverse) }}"), "ab");
  EXPECT_EQ(render("{{ '-'.join(['b', 'a'] | select('eq', 'a')) }}"), "a");
}

TEST(ChatTemplates, WholeNumbersOfAnySizeStayWhole) {
  const auto with = [](const char* messages, const char* source) {
    return ChatTemplate(source).render({}, messages, "", false, "");
  };
  for (const char* number : {"12345678901234567890", "-9223372036854775809",
                             "123456789012345678901234567890", "9223372036854775807"}) {
    const std::string messages = std::string(R"([{"id": )") + number + "}]";
    EXPECT_EQ(with(messages.c_str(), "{{ messages[0] | tojson }}"),
              std::string(R"({"id": )") + number + "}");
    EXPECT_EQ(with(messages.c_str(), "{{ messages[0].id }}"), number);
    EXPECT_EQ(with(messages.c_str(), "{{ messages[0].id == messages[0].id }}"), "True");
  }
  EXPECT_EQ(with("[1e30]", "{{ messages[0] | tojson }}"), "1e+30");
  const char* big = "[12345678901234567890]";
  EXPECT_EQ(with(big, "{{ messages[0] is number }} {{ messages[0] is integer }}"), "True True");
  EXPECT_EQ(with(big, "{{ messages[0] | int }}"), "12345678901234567890");
  EXPECT_EQ(with(big, "{{ messages[0] | float }}"), "1.2345678901234567e+19");
  EXPECT_THROW(with(big, "{{ messages[0] + 1 }}"), Error);  // not computed with
  EXPECT_THROW(with(R"(["12345678901234567890"])", "{{ messages[0] | int }}"), Error);
}

// Each of these did in one step what the budget of steps should bound.
TEST(ChatTemplates, LongSearchesAndGrowingMappingsEnd) {
  EXPECT_EQ(render("{% set s = 'a' * 300000 %}{% set t = 'a' * 150000 ~ 'b' %}"
                   "{{ s.find(t) }} {{ s.rfind(t) }} {{ t in s }} {{ s.count(t) }} "
                   "{{ s.split(t) | length }} {{ s.replace(t, '') | length }}"),
            "-1 -1 False 0 1 300000");
  EXPECT_THAT(
      [] {
        render(
            "{% set n = namespace(d={}) %}{% for i in range(20000) %}"
            "{% set n.d = dict(n.d, **{'k' ~ i: i}) %}{% endfor %}");
      },
      ThrowsMessage<Error>(HasSubstr("more than 5000000 steps")));
}

}  // namespace
}  // namespace cambium
