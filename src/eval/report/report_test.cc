#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "eval/csv.h"
#include "eval/report/curve.h"
#include "eval/report/png.h"
#include "eval/report/summary.h"
#include "eval/report/svg.h"

namespace cambium {
namespace {

RunSummary example() {
  RunSummary run;
  run.name = "demo <one>";
  run.plan = "name = \"demo\"";
  for (int i = 0; i < 3; ++i) {
    ModelSummary m;
    m.name = i == 0 ? "teacher" : "stage " + std::to_string(i);
    m.map = i == 0 ? "AAAA" : (i == 1 ? "AGAA" : "AGG2");
    m.converted = i;
    m.mixers = {{"attention", 4 - i}};
    m.accuracy = {90 - i, 100, {0.9 - 0.01 * i, 0.82, 0.95}};
    m.retrieval = {10, 10, {1.0, 0.72, 1.0}};
    m.reverse_kl = 0.01 * i;
    m.speed = {{512, 1, {1000, 900, 1100}, {100.0 + i, 90, 120}},
               {4096, 1, {800, 700, 900}, {40.0 + 20 * i, 30, 90}}};
    m.retrieval_at = {{"retrieval of 600 characters", {9, 10, {0.9, 0.6, 0.98}}},
                      {"passkey of 4096 tokens", {i, 30, {i / 30.0, 0.0, 0.2}}}};
    m.sticky = {1, 10, {0.1, 0.02, 0.4}};
    m.answer_tokens = 25.0 * (1 + i);
    m.cached_kl = 1e-8;
    m.gate = {i != 2, 1, "held-out KL 0.01 is at most 0.02"};
    m.cache_bytes_per_token = 400 - 100 * i;
    run.models.push_back(m);
  }
  run.importance = {{"stage 1",
                     "leave-mixer-out",
                     "reverse KL",
                     {0.5, NAN, 0.1, 2.0},
                     {false, false, true, false}}};
  run.curves = {{"stage 1", "distill", {1, 2, 3}, {3.0, 2.0, NAN}, {0.3, 0.2, NAN}}};
  return run;
}

TEST(Summary, RoundTrips) {
  const TestFolder folder;
  const std::filesystem::path path = std::filesystem::path(folder.path()) / "summary.json";
  const RunSummary run = example();
  write_summary(run, path);
  const RunSummary back = read_summary(path);
  ASSERT_EQ(back.models.size(), 3U);
  EXPECT_EQ(back.models[2].map, "AGG2");
  EXPECT_EQ(back.models[1].gate.reason, run.models[1].gate.reason);
  EXPECT_DOUBLE_EQ(back.models[2].speed[1].decode.value, 80.0);
  EXPECT_TRUE(std::isnan(back.importance[0].scores[1]));
  EXPECT_EQ(back.curves[0].reverse_kl[1], 0.2);
  ASSERT_NE(find_retrieval(back.models[1], "retrieval of 600 characters"), nullptr);
  EXPECT_EQ(find_retrieval(back.models[1], "retrieval of 600 characters")->correct, 9);
  EXPECT_EQ(find_retrieval(back.models[2], "passkey of 4096 tokens")->correct, 2);
  EXPECT_EQ(find_retrieval(back.models[1], "passkey of 8192 tokens"), nullptr);
  EXPECT_EQ(back.models[1].sticky.total, 10);
  EXPECT_EQ(back.models[1].cached_kl, 1e-8);
  EXPECT_EQ(render_report(back), render_report(run));
}

TEST(Summary, AMapHasTheMixersOfEachLayer) {
  const std::pair<const char*, std::vector<std::string>> rows[] = {
      {"", {}},
      {"AG-", {"A", "G", "-"}},
      {"(A2)G(W2)", {"A2", "G", "W2"}},
      {"A(G", {"A", "G"}},  // of a file that somebody changed
      {"()", {""}}};
  for (const auto& [map, layers] : rows) {
    EXPECT_EQ(layers_of_map(map), layers) << map;
  }
  RunSummary run = example();
  run.models[1].map = "A(G2)AA";
  const std::string page = render_report(run);
  EXPECT_NE(page.find("<title>layer 1: gdn beside mamba2</title>"), std::string::npos);
  EXPECT_NE(page.find("<td>1/4</td>"), std::string::npos);
}

TEST(Summary, AnotherFileIsNamed) {
  const TestFolder folder;
  const std::string path = folder.path() + "/summary.json";
  write_file_atomically(path, "{\"models\": 3}");
  const std::string message = testing::error_of([&] { read_summary(path); });
  EXPECT_NE(message.find(path), std::string::npos);
}

// Every value of a summary replaced by others: named, or drawn.
TEST(Summary, OddValuesAreNamedOrDrawn) {
  const auto good = nlohmann::json::parse(summary_json(example()));
  const auto values = good.flatten();
  int named = 0;
  for (const auto& [pointer, value] : values.items()) {
    for (const nlohmann::json& odd :
         {nlohmann::json(1.5), nlohmann::json(1e300), nlohmann::json(-1),
          nlohmann::json(UINT64_MAX), nlohmann::json("text"), nlohmann::json(),
          nlohmann::json::array(), nlohmann::json::object(), nlohmann::json(true)}) {
      nlohmann::json changed = good;
      changed[nlohmann::json::json_pointer(pointer)] = odd;
      try {
        const RunSummary run = parse_summary(changed.dump(), "summary.json");
        EXPECT_FALSE(render_report(run).empty());
      } catch (const Error& e) {
        EXPECT_TRUE(std::string(e.what()).starts_with("summary.json: ")) << e.what();
        ++named;
      }
    }
  }
  EXPECT_GT(named, 500);
  // Curves of unequal lengths would be drawn from what is not there.
  nlohmann::json longer = good;
  longer["curves"][0]["tokens"].push_back(4);
  EXPECT_THROW(parse_summary(longer.dump(), "summary.json"), Error);
  EXPECT_THROW(parse_summary(std::string(300000, '['), "summary.json"), Error);
}

TEST(Curve, TakesTheStepsOfALogWhateverElseItHolds) {
  const TestFolder folder;
  write_file_atomically(
      folder.at("log.jsonl"),
      "{\"event\": \"step\"}\n{\"event\": 3, \"loss\": 1}\n[]\n" + std::string(300000, '[') +
          "\n{\"event\": \"step\", \"loss\": \"x\"}\n{\"event\": \"step\", \"loss\": 2, "
          "\"tokens\": \"x\", \"reverse_kl\": []}\n{\"event\": \"step\", \"loss\": 4, "
          "\"tokens\": 8, \"reverse_kl\": 0.5}\n{\"event\": \"step\", \"lo");
  const CurveSummary curve = read_curve("a", "sft", {folder.at("log.jsonl")});
  EXPECT_EQ(curve.loss, (std::vector<double>{2, 4}));
  EXPECT_EQ(curve.tokens, (std::vector<double>{0, 8}));
  EXPECT_EQ(curve.reverse_kl, (std::vector<double>{0, 0.5}));
}

TEST(Report, IsSelfContainedAndEscaped) {
  const std::string page = render_report(example());
  EXPECT_EQ(page.find("http"), std::string::npos);
  EXPECT_EQ(page.find("<one>"), std::string::npos);
  EXPECT_NE(page.find("demo &lt;one&gt;"), std::string::npos);
  EXPECT_EQ(page.find("nan"), std::string::npos);
  // Kept and won are those of the furthest hybrid that shipped.
  EXPECT_NE(page.find("layers converted (stage 2)"), std::string::npos);
}

TEST(Summary, ReadsLengthsThatWereWrittenAsCharactersAlone) {
  std::string text = summary_json(example());
  const std::string now = "\"what\": \"retrieval of 600 characters\"";
  for (size_t at = text.find(now); at != std::string::npos; at = text.find(now)) {
    text.replace(at, now.size(), "\"characters\": 600");
  }
  const ModelSummary back = parse_summary(text, "old").models[1];
  ASSERT_NE(find_retrieval(back, "retrieval of 600 characters"), nullptr);
  EXPECT_EQ(find_retrieval(back, "retrieval of 600 characters")->correct, 9);
}

TEST(Summary, RetrievalInAllIsThePlansOwnOrThatOfAllLengths) {
  ModelSummary m = example().models[1];
  EXPECT_EQ(overall_retrieval(m).accuracy.value, 1.0);
  m.retrieval = {};
  EXPECT_EQ(overall_retrieval(m).total, 40);
  EXPECT_EQ(overall_retrieval(m).accuracy.value, 0.25);  // 9 of 10 and 1 of 30
  m.retrieval_at.clear();
  EXPECT_EQ(overall_retrieval(m).total, 0);
}

// Of a kind in which the teacher finds nothing there is nothing to keep.
TEST(Summary, WhatIsKeptLeastOfRetrievalIsAShareOfTheTeachers) {
  RunSummary run = example();
  ModelSummary& teacher = run.models[0];
  ModelSummary& model = run.models[1];
  EXPECT_EQ(least_retrieval_kept(model, teacher)->value, 1.0);  // more than all is all
  model.retrieval_at[0].found = {6, 10, {0.6, 0.3, 0.95}};
  teacher.retrieval_at[1].found = {20, 30, {2.0 / 3, 0.5, 0.8}};
  const Measured kept = *least_retrieval_kept(model, teacher);
  EXPECT_DOUBLE_EQ(kept.value, 0.05);
  EXPECT_DOUBLE_EQ(kept.high, 0.3);
  model.retrieval_at.pop_back();
  EXPECT_DOUBLE_EQ(least_retrieval_kept(model, teacher)->value, 0.6 / 0.9);
  EXPECT_EQ(least_retrieval_kept(model, teacher)->high, 1.0);
  teacher.retrieval = {0, 10, {0.0, 0.0, 0.3}};
  teacher.retrieval_at.clear();
  EXPECT_FALSE(least_retrieval_kept(model, teacher));
}

// A chart of its own, in the page and in the file, where it was asked.
TEST(Report, ShowsWhatIsKeptOfRetrieval) {
  RunSummary run = example();
  const std::string what = "least kept of the teacher";
  const auto count = [&](const std::string& text) {
    size_t n = 0;
    for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
      ++n;
    }
    return n;
  };
  EXPECT_EQ(count(render_report(run)), 1U);
  EXPECT_EQ(count(render_frontiers({&run, 1})), 1U);
  EXPECT_NE(render_frontiers({&run, 1}).find("viewBox=\"0 0 720 720\""), std::string::npos);
  for (ModelSummary& model : run.models) {
    model.retrieval = {};
    model.retrieval_at.clear();
  }
  EXPECT_EQ(count(render_report(run)), 0U);
  EXPECT_NE(render_frontiers({&run, 1}).find("viewBox=\"0 0 720 360\""), std::string::npos);
  EXPECT_EQ(parse_csv(frontier_csv({&run, 1}), "csv")[1].fields.back(), "");
  // What is neither trained nor shipped is apart.
  const auto has_hollow = [&] {
    return render_frontiers({&run, 1}).find("class=\"point hollow\"") != std::string::npos;
  };
  EXPECT_FALSE(has_hollow());
  run.models[2].shipped = false;
  EXPECT_TRUE(has_hollow());
  run.models[2].tokens_trained = 1;
  EXPECT_FALSE(has_hollow());
}

// A model that answers at twice the length gets half as much done at the same speed.
TEST(Report, CountsRightAnswersASecond) {
  RunSummary run = example();
  EXPECT_DOUBLE_EQ(right_answers_per_second(run.models[0]), 0.9 * 40 / 25);
  EXPECT_DOUBLE_EQ(right_answers_per_second(run.models[1]), 0.89 * 60 / 50);
  EXPECT_NE(render_report(run).find("of 600 characters"), std::string::npos);
  EXPECT_NE(render_report(run).find("<th>passkey of 4096 tokens</th>"), std::string::npos);
  run.models[0].answer_tokens = 0.0;
  EXPECT_EQ(right_answers_per_second(run.models[0]), 0.0);
  run.models[0].retrieval_at.clear();
  EXPECT_EQ(render_report(run).find("of 600 characters"), std::string::npos);
}

TEST(Report, ThePictureStandsAlone) {
  RunSummary run = example();
  const std::string picture = render_frontiers({&run, 1});
  EXPECT_TRUE(picture.starts_with("<svg xmlns="));
  EXPECT_NE(picture.find("<style>"), std::string::npos);
  EXPECT_NE(picture.find("at 4096 tokens"), std::string::npos);
  EXPECT_EQ(picture.find("at 512 tokens"), std::string::npos);
  const TestFolder folder;
  write_report(run, folder.path());
  EXPECT_EQ(read_text_file(folder.at("frontier.svg")), picture);
  EXPECT_EQ(read_text_file(folder.at("report.html")), render_report(run));
  EXPECT_EQ(read_text_file(folder.at("frontier.csv")), frontier_csv({&run, 1}));
  run.models[0].speed.clear();
  std::filesystem::remove(folder.at("frontier.svg"));
  write_report(run, folder.path());
  EXPECT_FALSE(std::filesystem::exists(folder.at("frontier.svg")));
}

// rsvg-convert as one that copies, one that fails, and none.
TEST(Report, APngIsWholeOrAbsent) {
  const TestFolder folder;
  write_file_atomically(folder.at("a.svg"), "<svg/>");
  const std::string path = std::getenv("PATH");
  const auto with = [&](std::string_view script) {
    write_file_atomically(folder.at("rsvg-convert"), "#!/bin/sh\n" + std::string(script));
    std::filesystem::permissions(folder.at("rsvg-convert"), std::filesystem::perms::owner_all);
    setenv("PATH", (std::string(folder.path()) + ":" + path).c_str(), 1);
  };
  with(
      "for a; do case $a in --output=*) out=${a#--output=};; *.svg) svg=$a;; esac; done\n"
      "cp \"$svg\" \"$out\"\n");
  write_png(folder.at("a.svg"), folder.at("a.png"));
  EXPECT_EQ(read_text_file(folder.at("a.png")), "<svg/>");
  with("exit 3\n");
  EXPECT_NE(testing::error_of([&] {
              write_png(folder.at("a.svg"), folder.at("b.png"));
            }).find("exit status 3"),
            std::string::npos);
  setenv("PATH", folder.at("nothing").c_str(), 1);
  EXPECT_NE(testing::error_of([&] {
              write_png(folder.at("a.svg"), folder.at("b.png"));
            }).find("librsvg2-bin"),
            std::string::npos);
  setenv("PATH", path.c_str(), 1);
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    ++files;
  }
  EXPECT_EQ(files, 3) << "a.svg, a.png, rsvg-convert";
}

// Several runs in one picture: only where all were measured alike.
TEST(Report, SeveralRunsShareAPicture) {
  const RunSummary run = example();
  RunSummary other = run;
  other.name = "=second, \"quoted\"";
  const std::string picture = render_frontiers(std::array{run, other});
  EXPECT_NE(picture.find("at 4096 tokens"), std::string::npos);
  size_t lines = 0;
  for (size_t at = picture.find("class=\"frontier\""); at != std::string::npos;
       at = picture.find("class=\"frontier\"", at + 1)) {
    ++lines;
  }
  EXPECT_EQ(lines, 4U) << "two runs in two charts";
  EXPECT_NE(picture.find("demo &lt;one&gt;: "), std::string::npos);
  for (ModelSummary& model : other.models) {
    for (SpeedSummary& speed : model.speed) {
      speed.batch += 1;
    }
  }
  EXPECT_NE(testing::message_of([&] {
              render_frontiers(std::array{run, other});
            }).find("share no context and batch"),
            std::string::npos);
  const std::vector<CsvRow> rows = parse_csv(frontier_csv(std::array{run, other}), "frontier.csv");
  size_t places = 0;
  for (const ModelSummary& model : run.models) {
    places += model.speed.size();
  }
  ASSERT_EQ(rows.size(), 1 + 2 * places);
  EXPECT_EQ(rows[1].fields[0], run.name);
  EXPECT_EQ(rows.back().fields[0], "'=second, \"quoted\"");
}

TEST(Scatter, LabelsOfOnePlaceStandApart) {
  const std::vector<svg::Point> points(
      3, {.x = 1, .x_low = 1, .x_high = 1, .y = 1, .y_low = 1, .y_high = 1, .label = "stage"});
  const std::string chart = svg::scatter(points, {}, {});
  std::set<std::string> places;
  for (size_t at = chart.find("<circle"); at != std::string::npos;
       at = chart.find("<circle", at + 1)) {
    const size_t text = chart.find("<text ", at);
    places.insert(chart.substr(text, chart.find('>', text) - text));
  }
  EXPECT_EQ(places.size(), points.size());
}

TEST(Ticks, AreRoundAndInside) {
  EXPECT_EQ(svg::ticks(0.0, 10.0, 5), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(svg::ticks(0.93, 0.97, 4).size(), 5U);
  EXPECT_TRUE(svg::ticks(1.0, 1.0, 4).empty());
  // Beside 1e18 a step of 50 is below what a double tells apart.
  EXPECT_LE(svg::ticks(1e18, 1e18 + 256, 8).size(), 160U);
  EXPECT_LE(svg::ticks(-1e300, 1e300, 8).size(), 160U);
  for (const double tick : svg::ticks(-3.7, 123.4, 7)) {
    EXPECT_GE(tick, -3.7);
    EXPECT_LE(tick, 123.4);
  }
}

}  // namespace
}  // namespace cambium
