// report: the pages and pictures that show what runs gave.
#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "cli/commands.h"
#include "eval/report/png.h"
#include "eval/report/summary.h"

namespace cambium {
namespace {

struct ReportArgs {
  std::vector<std::string> runs;
  std::string output;
  bool png = false;
};

void draw_png(const std::filesystem::path& folder) {
  const std::filesystem::path svg = folder / "frontier.svg";
  expect(exists(svg), "report: --png: the run has no models measured yet, so there is no picture");
  write_png(svg, folder / "frontier.png");
  fmt::print("{}\n", (folder / "frontier.png").string());
}

int run_report(const ReportArgs& a) {
  std::vector<RunSummary> summaries;
  for (const std::string& run : a.runs) {
    summaries.push_back(read_summary(std::filesystem::path(run) / "summary.json"));
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
  args.positionals("run", "run folders of `cambium hybridize`; several make one picture", &a->runs);
  args.option("output,o", "folder of report.html, frontier.svg and frontier.csv (RUN otherwise)",
              &a->output);
  args.flag("png", "also frontier.png, drawn by rsvg-convert (Debian's librsvg2-bin)", &a->png);
  return [a] { return run_report(*a); };
}

}  // namespace

Command report_command() {
  return {"report", "draws a run's report page again, or several runs in one picture",
          "  cambium report out/demo\n"
          "  cambium report out/gdn out/mamba2 -o out/compared --png",
          declare_report};
}

}  // namespace cambium
