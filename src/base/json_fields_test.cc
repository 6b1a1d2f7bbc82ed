#include "base/json_fields.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace cambium {
namespace {

TEST(JsonFields, GiveTheValuesOfTheirTypes) {
  const auto json = nlohmann::json::parse(
      R"({"n": -3, "u": 18446744073709551615, "x": 0.5, "i": 2, "b": true, "t": "text", "nothing": null,
          "o": {"n": 4}, "l": [{"n": 5}, {"n": 6}], "wholes": [1, 2], "reals": [1, null, 2.5],
          "flags": [true, false], "names": {"a": "b"}, "counts": {"a": 1}})");
  const JsonFields fields(json, "f.json");
  EXPECT_EQ(fields.whole("n", -5), -3);
  EXPECT_EQ(fields.unsigned_whole("u"), UINT64_MAX);
  EXPECT_EQ(fields.real("x"), 0.5);
  EXPECT_EQ(fields.real("i"), 2.0);
  EXPECT_TRUE(fields.flag("b"));
  EXPECT_EQ(fields.text("t"), "text");
  EXPECT_FALSE(fields.has("nothing"));
  EXPECT_FALSE(fields.has("none"));
  EXPECT_EQ(fields.object("o").whole("n"), 4);
  EXPECT_EQ(fields.objects("l").at(1).whole("n"), 6);
  EXPECT_EQ(fields.wholes("wholes"), (std::vector<int64_t>{1, 2}));
  EXPECT_TRUE(std::isnan(fields.reals("reals").at(1)));
  EXPECT_EQ(fields.flags("flags"), (std::vector<bool>{true, false}));
  EXPECT_EQ(fields.texts_by_name("names").at("a"), "b");
  EXPECT_EQ(fields.wholes_by_name("counts").at("a"), 1);
}

// A number of the wrong kind is never rounded, wrapped or taken as nothing.
TEST(JsonFields, NameWhatIsWrong) {
  const auto json = nlohmann::json::parse(
      R"({"half": 1.5, "huge": 1e300, "u": 18446744073709551615, "n": -3, "t": "text", "nothing": null,
          "o": {"n": "x"}, "l": [{}, 7], "wholes": [1, 2.5], "names": {"a": 1}, "flags": [1]})");
  const JsonFields f(json, "f.json");
  const struct {
    std::function<void()> read;
    const char* text;
  } rows[] = {
      {[&] { f.whole("none"); }, "f.json: expected the key 'none', which is missing"},
      {[&] { f.whole("half"); }, "f.json: expected 'half' to be a whole number from 0, got 1.5"},
      {[&] { f.whole("huge"); }, "'huge'"},
      {[&] { f.whole("u"); }, "'u' to be a whole number from 0, got 18446744073709551615"},
      {[&] { f.whole("n"); }, "'n' to be a whole number from 0, got -3"},
      {[&] { f.whole("n", -9, -4); }, "'n' to be a whole number from -9 to -4, got -3"},
      {[&] { f.whole("nothing"); }, "got null"},
      {[&] { f.unsigned_whole("n"); }, "'n'"},
      {[&] { f.real("t"); }, "f.json: expected 't' to be a number, got \"text\""},
      {[&] { f.flag("n"); }, "true or false"},
      {[&] { f.text("n"); }, "a string"},
      {[&] { f.object("l"); }, "f.json: l: expected an object"},
      {[&] { f.object("o").whole("n"); }, "f.json: o: expected 'n' to be a whole number"},
      {[&] { f.objects("l"); }, "f.json: l[1]: expected an object, got 7"},
      {[&] { f.objects("o"); }, "a list"},
      {[&] { f.wholes("wholes"); }, "'wholes[1]'"},
      {[&] { f.reals("l"); }, "'l[0]'"},
      {[&] { f.flags("flags"); }, "'flags[0]'"},
      {[&] { f.texts_by_name("names"); }, "f.json: names: expected 'a' to be a string, got 1"},
      {[&] { f.wholes_by_name("o"); }, "f.json: o: expected 'n'"},
  };
  for (const auto& row : rows) {
    EXPECT_THAT(row.read, ::testing::ThrowsMessage<Error>(::testing::HasSubstr(row.text)));
  }
  EXPECT_THAT([&] { JsonFields(nlohmann::json(std::string(5000, 'x')), "f.json"); },
              ::testing::ThrowsMessage<Error>(::testing::SizeIs(::testing::Lt(400))));
}

}  // namespace
}  // namespace cambium
