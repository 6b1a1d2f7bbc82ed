// A supernet from the command line: made, trained, placed, and its presets used.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_folder.h"
#include "program.h"

namespace cambium {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

/// What the command prints; a failure where its status is another.
std::string done(const std::string& command, int status = 0) {
  const Outcome outcome = cambium(command);
  EXPECT_EQ(outcome.status, status) << command << "\n" << outcome.text;
  return outcome.text;
}

/// The text that a model goes on with, without how fast it was.
std::string told(const std::string& model) {
  const std::string text =
      done("generate " + model + " -n 8 --temperature 0 -p 'Tom has 7 books.'");
  return text.substr(0, text.find("prompt tokens"));
}

/// A supernet whose presets are the teacher, "exact", and eight layers of another mixer, "fast".
std::string with_two_presets(const TestFolder& folder) {
  done("convert " + teacher() + " -o " + folder.at("s") +
       " --layers 1,2,3,4,5,6,7,8 --supernet --mixer gated_delta_net"
       " --add-preset exact=attention --add-preset fast=gated_delta_net");
  return folder.at("s");
}

// Super Apriel's own layout has no presets: with some it becomes ours.
TEST(Supernets, AReleasedOneTakesAnyPlacement) {
  const TestFolder folder;
  const std::string model = fixture("apriel2");
  const std::string reference = " --reference " + model + "/reference.safetensors";
  done("convert " + model + " -o " + folder.at("placed") +
       " --add-preset main=123 --add-preset near=sliding_window");
  EXPECT_THAT(done("inspect " + folder.at("placed")),
              AllOf(HasSubstr("placed: cambium,"), HasSubstr("AWGKMK"), HasSubstr("AWWWMK")));
  done("verify " + folder.at("placed") + reference + " --preset main");
  done("verify " + folder.at("placed") + reference + " --preset near", 1);
  done("convert " + folder.at("placed") + " -o " + folder.at("main") + " --preset main");
  done("verify " + folder.at("main") + reference);
  EXPECT_THAT(done("convert " + model + " -o " + folder.at("more") + " --add-mixer fast=mamba2"),
              HasSubstr("choose among attention, sliding_window, gdn, kda, fast"));
  done("verify " + folder.at("more") + reference);
}

TEST(Supernets, FromTheTeacherToAPlainHybrid) {
  const TestFolder folder;
  const std::string start = folder.at("start");
  EXPECT_THAT(done("convert " + teacher() + " -o " + start +
                   " --layers 3,5 --supernet --mixer gated_delta_net,sliding_window --window 24"
                   " --add-preset fast=gated_delta_net --add-preset mixed=21"),
              HasSubstr("2 layers choose among attention, gated_delta_net, sliding_window, 2 pre"));

  const std::string distill = "distill " + start + " -t " + teacher() + " --sequence 640";
  EXPECT_THAT(done(distill + " -o " + folder.at("none") + " --steps 1", 1),
              HasSubstr("the student is a supernet: expected supernet.sampling"));
  done(distill + " -o " + folder.at("run") +
       " --steps 2 --supernet --mixers-only --set train.supernet.sampling=composition");
  const std::string log = read_text_file(folder.at("run") + "/log.jsonl");
  EXPECT_THAT(log, HasSubstr(R"("placement":")"));
  const std::string super = folder.at("run") + "/model";

  EXPECT_THAT(done("inspect " + super), AllOf(HasSubstr("2 layers choose among attention, gated_d"),
                                              HasSubstr("preset mixed"), HasSubstr("AAAWAG")));
  EXPECT_THAT(done("inspect " + super + " --preset fast"),
              AllOf(HasSubstr("AAAGAG"), Not(HasSubstr("choose among"))));
  EXPECT_THAT(done("inspect " + super + " --preset fsat", 1), HasSubstr("did you mean 'fast'"));

  done("convert " + super + " -o " + folder.at("fast") + " --preset fast");
  EXPECT_EQ(told(folder.at("fast")), told(super + " --preset fast"));
  EXPECT_THAT(done("convert " + super + " -o " + folder.at("thin") + " --thin --drop-preset mixed"),
              HasSubstr("1 presets"));
  EXPECT_EQ(told(folder.at("thin") + " --preset fast"), told(folder.at("fast")));
  EXPECT_THAT(done("verify " + folder.at("thin")), HasSubstr("the folder is what was written"));

  EXPECT_THAT(done("report " + super + " --teacher " + teacher() + " -o " + folder.at("page") +
                   " --set evaluate.problems=2 --set evaluate.held_out_documents=2"
                   " --set evaluate.contexts=[8] --set evaluate.speed_repeats=1"),
              AllOf(HasSubstr("fast"), HasSubstr("mixed"), HasSubstr("report.html")));
  const auto summary = nlohmann::json::parse(read_text_file(folder.at("page") + "/summary.json"));
  EXPECT_EQ(summary["models"].size(), 3U);
  EXPECT_THAT(read_text_file(folder.at("page") + "/frontier.csv"), HasSubstr("mixed"));
  EXPECT_THAT(done("report " + super + " --teacher " + teacher() + " -o " + folder.at("two") +
                   " --preset fast --set evaluate.problems=2 --set evaluate.held_out_documents=2"
                   " --set evaluate.contexts=[8] --set evaluate.speed_repeats=1"),
              AllOf(HasSubstr("fast"), Not(HasSubstr("mixed"))));
  EXPECT_THAT(
      done("report " + super + " --teacher " + teacher() + " --preset fsat -o " + folder.at("no"),
           1),
      HasSubstr("did you mean 'fast'"));
  EXPECT_THAT(done("report " + super + " --preset fast", 1), HasSubstr("belongs to --teacher"));
  EXPECT_THAT(done("report " + super, 1), HasSubstr("expected the folder of a run"));

  const std::string placement = folder.at("placement.json");
  done("place " + super + " --method search --cost cache --context 512 --budget 0.97 -o " +
       placement + " --evaluations 6 --documents 2 --max-tokens 64 --beam 0");
  done("convert " + super + " -o " + folder.at("kept") + " --add-preset found=" + placement);
  EXPECT_THAT(done("inspect " + folder.at("kept") + " --json"), HasSubstr(R"("found")"));
}

// One mixer more: golden prompts of old and new presets are kept, and a thin one loses the others.
TEST(Supernets, AMixerJoins) {
  const TestFolder folder;
  const std::string start = folder.at("start");
  done("convert " + teacher() + " -o " + start +
       " --layers 3,5 --supernet --mixer gated_delta_net --add-preset fast=gated_delta_net");
  const std::string more = folder.at("more");
  EXPECT_THAT(done("convert " + start + " -o " + more +
                   " --add-mixer near=sliding_window --window 24 --fit 1 --add-preset near=near"),
              HasSubstr("near joins in 2 layers, which choose among attention, gated_delta_net, "
                        "near; 2 presets"));
  EXPECT_EQ(told(more + " --preset fast"), told(start + " --preset fast"));
  EXPECT_THAT(done("inspect " + more + " --preset near"), HasSubstr("AAAWAW"));
  EXPECT_FALSE(std::filesystem::exists(more + ".fit-near"));
  const std::string thin = folder.at("thin");
  done("convert " + more + " -o " + thin + " --thin --drop-preset fast");
  EXPECT_EQ(told(thin + " --preset near"), told(more + " --preset near"));
  EXPECT_THAT(done("verify " + thin), HasSubstr("the folder is what was written"));
  const struct {
    std::string arguments;
    const char* text;
  } rows[] = {
      {start + " --add-mixer gated_delta_net", "has a mixer 'gated_delta_net' already"},
      {start + " --add-mixer mamba3", "mamba2"},
      {start + " --add-mixer a/b=mamba2", "got 'a/b'"},
      {start + " --add-mixer mamba2 --layers 4", "layer 4 has no choice with attention"},
      {start + " --add-mixer mamba2 --thin", "expected no --mixer, --scores"},
      {start + " --add-mixer mamba2 --supernet", "--add-mixer changes a supernet"},
      {teacher() + " --add-mixer mamba2", "is no supernet, which a mixer could join"},
      {thin + " --add-mixer mamba2", "has its attention any more"},
  };
  for (const auto& row : rows) {
    EXPECT_THAT(done("convert " + row.arguments + " -o " + folder.at("no"), 1), HasSubstr(row.text))
        << row.arguments;
  }
  EXPECT_FALSE(std::filesystem::exists(folder.at("no")));
}

// A conversation goes on as another preset: what it says is what that preset says of the same
// turns, and nothing stays behind of the one before.
TEST(Supernets, AChatSwitchesPresets) {
  const TestFolder folder;
  const std::string super = with_two_presets(folder);
  const auto says = [&](const std::string& options, const std::string& lines, int status = 0) {
    write_file_atomically(folder.at("lines"), lines);
    const Outcome outcome = cambium(
        "chat " + super + " --device cpu -n 12 --temperature 0 " + options, folder.at("lines"));
    EXPECT_EQ(outcome.status, status) << outcome.text;
    return outcome.text;
  };
  const std::string question = "Tom has 7 books. Ida has 3 books fewer than Tom.\n";
  const std::string exact = says("--preset exact", question);
  const std::string fast = says("--preset fast", question);
  EXPECT_NE(exact, fast);
  EXPECT_EQ(says("", question), exact);  // attention is active
  EXPECT_EQ(says("", "/preset fast\n" + question), fast);
  EXPECT_EQ(says("--preset fast", question + "/reset\n/preset exact\n" + question +
                                      "/reset\n/preset fast\n" + question),
            fast + exact + fast);
  // A conversation that began with one goes on with the other over all of its turns.
  const std::string two = says("--preset exact", question + "/preset fast\n" + question);
  EXPECT_THAT(two, testing::StartsWith(exact));
  EXPECT_NE(two, exact + fast);
  EXPECT_THAT(says("--preset fast", "/presets\n"),
              AllOf(HasSubstr("  exact            AAAA"), HasSubstr("* fast             AGGG")));
  EXPECT_THAT(says("", "/preset fsat\n", 1), HasSubstr("did you mean 'fast'"));
  write_file_atomically(folder.at("lines"), "/presets\n");
  EXPECT_THAT(cambium("chat " + teacher(), folder.at("lines")).text,
              HasSubstr("is no supernet and has no presets"));
}

// Lines of a file may name presets: each is answered as if there were no others.
TEST(Supernets, AFileOfPromptsSwitchesPresets) {
  const TestFolder folder;
  const std::string super = with_two_presets(folder);
  const auto answers = [&](const std::string& options, const std::vector<const char*>& presets,
                           int status = 0) {
    std::string lines;
    for (const char* preset : presets) {
      nlohmann::json line = {{"prompt", "Tom has 7 books. Ida has 3 books fewer than Tom.\n"}};
      if (*preset != 0) {
        line["preset"] = preset;
      }
      lines += line.dump() + "\n";
    }
    write_file_atomically(folder.at("prompts"), lines);
    done("generate " + super + " -i " + folder.at("prompts") + " -o " + folder.at("answers") +
             " -n 12 --temperature 0.8 --seed 3 --samples 2 " + options,
         status);
    std::vector<std::string> out;
    for (const nlohmann::json& row : rows_of(folder.at("answers"))) {
      out.push_back(row.contains("error") ? row["error"].get<std::string>()
                                          : row["completion"].get<std::string>());
    }
    return out;
  };
  const std::vector<std::string> exact = answers("--preset exact", {"", "", ""});
  const std::vector<std::string> fast = answers("--preset fast", {"", "", ""});
  EXPECT_NE(exact, fast);
  const std::vector<std::string> mixed = {fast[0], fast[1], exact[2], exact[3], fast[4], fast[5]};
  EXPECT_EQ(answers("", {"fast", "exact", "fast"}), mixed);
  EXPECT_EQ(answers("--preset fast", {"", "exact", ""}), mixed);
  const std::vector<std::string> some = answers("", {"fast", "fsat", "fast"});
  ASSERT_EQ(some.size(), 5U);
  EXPECT_EQ(some[1], fast[1]);
  EXPECT_THAT(some[2], HasSubstr("did you mean 'fast'"));
  EXPECT_EQ(some[3], fast[4]);
  EXPECT_THAT(answers("", {"fsat"}, 1).front(), HasSubstr("did you mean 'fast'"));
}

TEST(Supernets, WrongUseIsNamed) {
  const struct {
    const char* arguments;
    const char* text;
  } rows[] = {
      {"-l 1 --mixer mamba,mamba2", "--mixer: expected one mixer, got 2"},
      {"-l 1 --supernet --mixer mamba --faithful", "--supernet has Cambium's own layout"},
      {"-l 1 --supernet --thin", "--supernet makes a supernet"},
      {"-l 1 --supernet --mixer mamba,mamba", "given twice"},
      {"-l 1 --supernet --add-preset fast", "expected NAME=PLACEMENT, got 'fast'"},
      {"-l 1 --supernet --add-preset fast=012", "expected a kind for each of 1 layers"},
      {"-l 1 --supernet --add-preset fast=7", "expected kinds from 0 to 1"},
      {"-l 1 --supernet --add-preset fast=atention", "did you mean 'attention'"},
      {"-l 1 --supernet --add-preset a/b=mamba", "got 'a/b'"},
      {"--preset fast", "is no supernet and has no presets"},
      {"--thin", "is no supernet, which has presets"},
      {"--preset fast --thin", "--preset writes one hybrid"},
      {"--preset fast --layers 3", "take a supernet as it is"},
  };
  const TestFolder folder;
  for (const auto& row : rows) {
    const std::string text =
        done("convert " + teacher() + " -o " + folder.at("s") + " " + row.arguments, 1);
    EXPECT_THAT(text, HasSubstr(row.text)) << row.arguments;
  }
  EXPECT_FALSE(std::filesystem::exists(folder.at("s")));
  EXPECT_THAT(done("generate " + teacher() + " --preset fast -p x", 1),
              HasSubstr("is no supernet and has no presets, so no preset 'fast'"));
}

}  // namespace
}  // namespace cambium
