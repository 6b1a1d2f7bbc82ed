#include <cstdio>

#include "base/checksum.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/problem_source.h"
#include "hybrid/scoring.h"
#include "train/stored_logits.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct LogitsArgs {
  std::string teacher, output, data;
  std::vector<std::string> set;
  int64_t top_k = 32, documents = 0, sequence = 1024, seed = 1;
  DeviceOption device;
};

int run(const LogitsArgs& a) {
  PlanTable table = PlanTable::parse("", "--set");
  table.set_all(a.set);
  const ProblemSpec problems = read_problem_spec(table.table("problems"));
  table.expect_all_used();
  const StopAnywhere stop(fmt::format(
      "what is stored so far is kept in {}.part; the same command goes on with it", a.output));
  const LoadedModel teacher = load_model(a.teacher, load_on(a.device.device()));
  const Tokenizer tokenizer = load_tokenizer(a.teacher, teacher.model->spec().vocab);
  const std::shared_ptr<DocumentSource> source =
      a.data.empty()
          ? problem_source(tokenizer, problems, Split::kTrain, static_cast<uint64_t>(a.seed))
          : load_jsonl(a.data, tokenizer);
  StoredLogitsInfo info;
  info.top_k = a.top_k;
  info.documents = a.documents;
  info.max_tokens = a.sequence;
  info.tokenizer = checksum_text(tokenizer.fingerprint());
  info.teacher = model_digest(*teacher.model);
  info.teacher_name = a.teacher;
  info = write_stored_logits(a.output, *teacher.model, *source, info);
  fmt::print("{} documents, {} tokens, {} bytes each, in {}\n", info.documents, info.rows,
             stored_row_bytes(info.top_k, info.vocabulary), a.output);
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<LogitsArgs>();
  args.positional("teacher", "checkpoint folder", &a->teacher);
  args.option("output,o", "file to write", &a->output, true);
  args.option("data,d", "documents, JSON lines (generated problems otherwise)", &a->data);
  args.option("top-k", "tokens kept of each distribution, beside what all others come to",
              &a->top_k, {1});
  args.option("documents", "the first so many (0 = all of --data)", &a->documents);
  args.option("sequence", "tokens of a document at most, as in training", &a->sequence, {1});
  args.option("seed", "of generated problems: the run's own", &a->seed);
  args.option("set", "problems.KEY=value, as in plans", &a->set);
  a->device.declare(args);
  return [a] { return run(*a); };
}

}  // namespace

Command logits_command() {
  return {"logits",
          "stores a teacher's logits, for distill without the teacher; stopped, the same command "
          "goes on where it was",
          "  cambium logits TEACHER -o text.logits -d text.jsonl --top-k 32\n"
          "  cambium distill HYBRID --logits text.logits -o out/heal --data text.jsonl",
          declare};
}

}  // namespace cambium
