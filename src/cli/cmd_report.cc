// report: the pages and pictures that show what runs gave.
#include "base/file.h"
#include "cli/commands.h"
#include "eval/report/summary.h"

namespace cambium {
namespace {

struct ReportArgs {
  std::string run, output;
};

int run_report(const ReportArgs& a) {
  const RunSummary summary = read_summary(std::filesystem::path(a.run) / "summary.json");
  const std::string folder = a.output.empty() ? a.run : a.output;
  make_folder(folder);
  write_report(summary, folder);
  fmt::print("{}/report.html\n", folder);
  return 0;
}

Action declare_report(Args& args) {
  auto a = std::make_shared<ReportArgs>();
  args.positional("run", "run folder of `cambium hybridize`", &a->run);
  args.option("output,o", "folder of report.html and frontier.svg (RUN otherwise)", &a->output);
  return [a] { return run_report(*a); };
}

}  // namespace

Command report_command() {
  return {"report", "draws a run's report page again from its summary.json",
          "  cambium report out/demo", declare_report};
}

}  // namespace cambium
