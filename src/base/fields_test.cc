// One declaration of fields, and what reads, checks, names and lists them.
#include "base/fields.h"
#include "base/testing.h"

#include <gmock/gmock.h>

#include <cmath>

namespace cambium {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

enum class Colour { kRed, kDarkBlue };

struct Inner {
  double share = 0.5;
  float weight = 0.1F;
};

struct Sample {
  int small = 3;
  uint64_t seed = 1;
  int64_t big = 5;
  bool fast = false;
  std::string name = "x";
  std::string method = "list";
  Colour colour = Colour::kRed;
  std::vector<int64_t> layers = {1, 2};
  std::vector<std::string> files;
  Inner inner;
};

void visit_fields(Sample& s, FieldVisitor& visit) {
  visit({"small", "a little"}, s.small);
  visit({"seed"}, s.seed);
  visit({"big", "", nullptr, false}, s.big, ints_from(1, 100));
  visit({"fast"}, s.fast);
  visit({"name"}, s.name);
  visit({"method"}, s.method, {"list", "uniform"});
  visit({"colour"}, s.colour, {{"red", Colour::kRed}, {"dark_blue", Colour::kDarkBlue}});
  visit({"layers"}, s.layers, ints_from(0));
  visit({"files"}, s.files);
  visit.table({"inner"}, [&] {
    visit({"share", "", "part"}, s.inner.share, reals_within(0.0, 1.0));
    visit({"weight", "", ""}, s.inner.weight, reals_above(0.0));
  });
}

std::string error_of(const std::string& plan) {
  return testing::message_of([&] {
    Sample s;
    read_fields(s, PlanTable::parse(plan, "p.toml"));
  });
}

TEST(Fields, AreReadAndTheRestStays) {
  Sample s;
  const PlanTable plan = PlanTable::parse(
      "small = -7\nseed = 9223372036854775807\nfast = true\nmethod = \"uniform\"\n"
      "colour = \"dark_blue\"\nlayers = []\nfiles = [\"a\"]\n[inner]\nshare = 0\n",
      "p.toml");
  read_fields(s, plan);
  EXPECT_EQ(s.small, -7);
  EXPECT_EQ(s.seed, 9223372036854775807U);
  EXPECT_EQ(s.big, 5);
  EXPECT_TRUE(s.fast);
  EXPECT_EQ(s.name, "x");
  EXPECT_EQ(s.method, "uniform");
  EXPECT_EQ(s.colour, Colour::kDarkBlue);
  EXPECT_TRUE(s.layers.empty());
  EXPECT_THAT(s.files, ElementsAre("a"));
  EXPECT_EQ(s.inner.share, 0.0);
  EXPECT_EQ(s.inner.weight, 0.1F);
  plan.expect_all_used();
}

TEST(Fields, OutsideTheirRangeAreErrorsThatSayIt) {
  const struct {
    const char* plan;
    const char* expected;
  } rows[] = {
      // No narrowing: an int holds no 99999999999, a seed no -1.
      {"small = 99999999999",
       "p.toml:1: small must be a whole number from -2147483648 to 2147483647, got 99999999999"},
      {"seed = -1", "p.toml:1: seed must be a whole number from 0, got -1"},
      {"\nbig = 0", "p.toml:2: big must be a whole number from 1 to 100, got 0"},
      {"big = 101", "got 101"},
      {"big = 1.5", "big must be a whole number, got 1.5"},
      {"fast = 1", "fast must be true or false, got 1"},
      {"method = \"unifrom\"", "expected one of list, uniform; did you mean 'uniform'?"},
      {"colour = \"green\"", "p.toml:1: colour = \"green\" is not known; expected one of red, "},
      {"layers = [3, -1]", "layers must be a list, each a whole number from 0, got -1"},
      {"layers = 3", "layers must be a list of whole numbers, got 3"},
      {"[inner]\nshare = 1", "p.toml:2: inner.share must be a number from 0 below 1, got 1"},
      {"[inner]\nshare = inf", "inner.share must be a finite number, got inf"},
      {"[inner]\nshare = nan", "inner.share must be a finite number, got nan"},
      {"[inner]\nweight = 0", "inner.weight must be a number above 0, got 0"},
      {"[inner]\nweight = 1e39", "inner.weight must be a number above 0, got 1e+39"},
      {"inner = 3", "inner must be a table, got 3"},
  };
  for (const auto& row : rows) {
    EXPECT_THAT(error_of(row.plan), HasSubstr(row.expected)) << row.plan;
  }
}

TEST(Fields, BuiltInCodeAreCheckedAlike) {
  const auto error = [](auto&& change) -> std::string {
    Sample s;
    change(s);
    return testing::message_of([&] { check_fields(s, "score"); });
  };
  EXPECT_EQ(error([](Sample&) {}), "no error");
  EXPECT_EQ(error([](Sample& s) { s.big = 0; }),
            "score: big must be a whole number from 1 to 100, got 0");
  EXPECT_THAT(error([](Sample& s) { s.layers = {4, -2}; }), HasSubstr("layers must be"));
  EXPECT_THAT(error([](Sample& s) { s.inner.share = NAN; }),
              HasSubstr("score: inner.share must be a number from 0 below 1, got nan"));
  EXPECT_THAT(error([](Sample& s) { s.inner.weight = INFINITY; }), HasSubstr("inner.weight"));
}

TEST(Fields, MakeAFingerprintOfWhatDecides) {
  Sample s;
  s.colour = Colour::kDarkBlue;
  EXPECT_THAT(fingerprint_fields(s),
              UnorderedElementsAre(Pair("small", "3"), Pair("seed", "1"), Pair("fast", "no"),
                                   Pair("name", "x"), Pair("method", "list"),
                                   Pair("colour", "dark blue"), Pair("layers", "1,2"),
                                   Pair("files", ""), Pair("inner", "part 0.5 0.1")));
}

TEST(Fields, AreListedForPeople) {
  const std::vector<FieldRow> rows = list_fields<Sample>();
  const std::string table = fields_table(rows);
  EXPECT_THAT(table, HasSubstr("| big | a whole number from 1 to 100 | 5 |  |\n"));
  EXPECT_THAT(table, HasSubstr("| colour | red or dark_blue | red |"));
  EXPECT_THAT(table, HasSubstr("| [inner] share | a number from 0 below 1 | 0.5 |"));
  EXPECT_THAT(fields_help(rows, "train."), HasSubstr("  train.inner.weight: a number above 0\n"));
}

}  // namespace
}  // namespace cambium
