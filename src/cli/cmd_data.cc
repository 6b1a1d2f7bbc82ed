#include <cstdio>

#include "base/file.h"
#include "base/progress.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "eval/problem_source.h"
#include "eval/problems/problems.h"

namespace cambium {
namespace {

struct DataArgs {
  std::string kind = "problems";
  std::string split = "train";
  std::string output;
  std::string format = "qa";
  std::vector<std::string> set;
  int64_t count = 1000;
  int64_t seed = 1;
};

int run(const DataArgs& args) {
  PlanTable table = PlanTable::parse("", "--set");
  table.set_all(args.set);
  ProblemSpec spec = read_problem_spec(table);
  table.expect_all_used();
  if (args.kind != "mixed") {
    spec.retrieval_share = args.kind == "retrieval" ? 1.0 : 0.0;
  }
  const ProblemFormat format =
      args.format == "qa" ? ProblemFormat::kQuestionAnswer : ProblemFormat::kMessages;
  const Split split = parse_split(args.split);
  const auto line = [&](int64_t i) {
    return problem_json(make_problem(spec, split, static_cast<uint64_t>(args.seed),
                                     static_cast<uint64_t>(i)),
                        format) +
           "\n";
  };
  const StopAnywhere stop(args.output.empty() ? "what is written so far is whole lines"
                                              : "nothing is written");
  if (args.output.empty()) {
    for (int64_t i = 0; i < args.count; ++i) {
      stop_point();
      expect(std::fputs(line(i).c_str(), stdout) >= 0, "cannot write standard output");
    }
    return 0;
  }
  AtomicFile file(args.output);
  Progress progress("writing " + args.output, static_cast<uint64_t>(args.count));
  for (int64_t i = 0; i < args.count; ++i) {
    stop_point();
    file.write(line(i));
    progress.advance(1);
  }
  file.commit();
  progress.finish();
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<DataArgs>();
  args.positional_choice("kind", "", {"problems", "retrieval", "mixed"}, &a->kind, false);
  args.choice("split", "a problem belongs to one for ever", {"train", "valid", "test"}, &a->split);
  args.option("count,n", "problems", &a->count, {1});
  args.option("seed", "seed of the sequence of problems", &a->seed);
  args.choice("format", "qa is {question, answer}", {"qa", "messages"}, &a->format);
  args.option("output,o", "file to write (standard output otherwise)", &a->output);
  args.option("set", "key=value: word.max_steps=6, retrieval.max_chars=20000, ...", &a->set);
  return [a] { return run(*a); };
}

}  // namespace

Command data_command() {
  return {
      "data", "writes generated word problems or retrieval problems, without end",
      "  cambium data problems --split train -n 5\n"
      "  cambium data problems -n 10000 --set word.min_steps=4 --set word.max_steps=10 -o t.jsonl\n"
      "  cambium data retrieval --split test -n 100 --set retrieval.max_chars=20000",
      declare};
}

}  // namespace cambium
