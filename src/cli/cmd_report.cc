// report: the pages and pictures that show what runs gave.
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/problem_source.h"
#include "eval/report/png.h"
#include "eval/report/summary.h"
#include "hybrid/plan.h"
#include "hybrid/preset_report.h"

namespace cambium {
namespace {

struct ReportArgs {
  std::vector<std::string> runs;
  std::string output, teacher;
  std::vector<std::string> set, presets;
  int64_t seed = 1;
  DeviceOption device;
  bool png = false;
};

void draw_png(const std::filesystem::path& folder) {
  const std::filesystem::path svg = folder / "frontier.svg";
  expect(exists(svg), "report: --png: the run has no models measured yet, so there is no picture");
  write_png(svg, folder / "frontier.png");
  fmt::print("{}\n", (folder / "frontier.png").string());
}

// The presets of a supernet, measured now.
int run_presets(const ReportArgs& args) {
  expect(args.runs.size() == 1 && !args.output.empty(),
         "report: with --teacher expected one supernet and --output, the folder of its page");
  PlanTable table = PlanTable::parse("", "--set");
  table.set_all(args.set);
  PresetReportOptions options;
  read_fields(options.evaluate, table.table("evaluate"));
  expect(options.evaluate.baseline_window == 0,
         "--set evaluate.baseline_window belongs to the stages of a plan");
  DataPlan files;
  const PlanTable data_table = table.table("data");
  files.problems = read_problem_spec(data_table.table("problems"));
  table.expect_all_used();
  const std::string supernet_dir = args.runs.front();
  options.name = supernet_dir;
  options.teacher = args.teacher;
  options.presets = args.presets;
  options.command =
      fmt::format("cambium report {} --teacher {} -o {}", supernet_dir, args.teacher, args.output);
  for (const std::string& name : args.presets) {
    options.command += " --preset " + name;
  }
  for (const std::string& word : args.set) {
    options.command += " --set " + word;
  }
  if (args.seed != ReportArgs{}.seed) {
    options.command += fmt::format(" --seed {}", args.seed);
  }
  make_folder(args.output);
  LoadOptions load{.storage = MatrixStorage::kStored, .device = args.device.device()};
  LoadedModel teacher = load_model(args.teacher, load);
  load.share = &teacher;
  LoadedModel supernet = load_model(supernet_dir, load);
  const RunData data(files, options.evaluate, static_cast<uint64_t>(args.seed),
                     Tokenizer::load(supernet_dir));
  const RunSummary summary = measure_presets(supernet, teacher, data, options);
  const std::filesystem::path folder = args.output;
  write_summary(summary, folder / "summary.json");
  write_report(summary, folder);
  fmt::print("{:<16} {:>10} {:>12} {:>12} {:>16}\n", "preset", "accuracy", "reverse KL",
             "agreement", "cache / token");
  for (const ModelSummary& model : summary.models) {
    fmt::print("{:<16} {:>8.1f} % {:>12.5f} {:>10.1f} % {:>16}  {}\n", model.name,
               100 * model.accuracy.accuracy.value, model.reverse_kl, 100 * model.agreement,
               human_bytes(static_cast<uint64_t>(model.cache_bytes_per_token)), model.map);
  }
  fmt::print("{}\n", (folder / "report.html").string());
  if (args.png) {
    draw_png(folder);
  }
  return 0;
}

// What a run's accuracy is of: the first words of what it says of its data.
std::string asked_of(const RunSummary& run) {
  return run.task.substr(0, std::min(run.task.find(';'), run.task.find(". ")));
}

int run_report(const ReportArgs& a) {
  if (!a.teacher.empty()) {
    return run_presets(a);
  }
  expect(a.presets.empty(), "--preset belongs to --teacher, beside which presets are measured");
  expect(a.set.empty(), "--set belongs to --teacher: a run's numbers are there already");
  std::vector<RunSummary> summaries;
  for (const std::string& run : a.runs) {
    const std::filesystem::path path = std::filesystem::path(run) / "summary.json";
    expect(exists(path),
           "{}: expected the folder of a run of `cambium hybridize`, which has a summary.json; the "
           "presets of a supernet are reported with --teacher",
           run);
    summaries.push_back(read_summary(path));
  }
  const bool several = summaries.size() > 1;
  expect(!several || !a.output.empty(),
         "report: expected --output, the folder of the picture of {} runs", summaries.size());
  const std::filesystem::path folder = a.output.empty() ? a.runs.front() : a.output;
  if (!several) {
    make_folder(folder);
    write_report(summaries.front(), folder);
    fmt::print("{}\n", (folder / "report.html").string());
    if (a.png) {
      draw_png(folder);
    }
    return 0;
  }
  for (const RunSummary& run : summaries) {
    if (asked_of(run) != asked_of(summaries.front())) {
      note(
          "the runs did not ask the same, so that heights in their picture do not compare: {}: {}; "
          "{}: {}",
          summaries.front().name, asked_of(summaries.front()), run.name, asked_of(run));
      break;
    }
  }
  const std::string picture = render_frontiers(summaries);
  make_folder(folder);
  write_file_atomically(folder / "frontier.svg", picture);
  write_file_atomically(folder / "frontier.csv", frontier_csv(summaries));
  fmt::print("{}\n{}\n", (folder / "frontier.svg").string(), (folder / "frontier.csv").string());
  if (a.png) {
    draw_png(folder);
  }
  return 0;
}

Action declare_report(Args& args) {
  auto a = std::make_shared<ReportArgs>();
  args.positionals("run",
                   "run folders of `cambium hybridize`; several make one picture. Or a supernet",
                   &a->runs);
  args.option("teacher", "of a supernet: measures its presets beside this model", &a->teacher);
  args.option("preset",
              "with --teacher: the preset with this name alone; may be given several times",
              &a->presets);
  args.option("set", "with --teacher: evaluate.KEY=value or data.problems.KEY=value, as in plans",
              &a->set);
  args.option("seed", "with --teacher: of generated problems", &a->seed);
  a->device.declare(args);
  args.option("output,o", "folder of report.html, frontier.svg and frontier.csv (RUN otherwise)",
              &a->output);
  args.flag("png", "also frontier.png, drawn by rsvg-convert (Debian's librsvg2-bin)", &a->png);
  return [a] { return run_report(*a); };
}

}  // namespace

Command report_command() {
  return {"report",
          "draws a run's report page again, several runs in one picture, or a supernet's presets",
          "  cambium report out/demo\n"
          "  cambium report out/gdn out/mamba2 -o out/compared --png\n"
          "  cambium report SUPERNET --teacher TEACHER -o out/presets",
          declare_report};
}

}  // namespace cambium
