#include "hybrid/phase_logits.h"

#include "base/checksum.h"
#include "base/signals.h"
#include "hybrid/scoring.h"
#include "text/tokenizer.h"

namespace cambium {

std::unique_ptr<StoredLogits> phase_logits(const Phase& phase, Model& teacher,
                                           const std::filesystem::path& teacher_dir,
                                           const DocumentSource& data, const Tokenizer& tokenizer) {
  const LogitsPlan& plan = phase.logits;
  StoredLogitsInfo info;
  info.top_k = plan.top_k;
  info.documents = plan.documents;
  info.max_tokens = phase.config.sequence_length;
  info.tokenizer = checksum_text(tokenizer.fingerprint());
  info.teacher = model_digest(teacher);
  info.teacher_name = teacher_dir.string();
  if (!std::filesystem::exists(plan.file)) {
    const StopAnywhere stop(fmt::format("the logits stored so far are kept in {}.part", plan.file));
    write_stored_logits(plan.file, teacher, data, info);
  }
  auto stored = std::make_unique<StoredLogits>(plan.file);
  stored->expect_data(data.fingerprint());
  stored->expect_tokenizer(info.tokenizer);
  stored->expect_teacher(info.teacher);
  const StoredLogitsInfo& there = stored->info();
  const int64_t documents = documents_stored(data, plan.documents);
  expect(there.top_k == plan.top_k && there.max_tokens >= info.max_tokens &&
             there.documents >= documents,
         "{} has {} tokens of each distribution, of {} documents of up to {} tokens; the plan asks "
         "for {}, of {} of up to {}: remove it, and it is made anew",
         plan.file, there.top_k, there.documents, there.max_tokens, plan.top_k, documents,
         info.max_tokens);
  return stored;
}

}  // namespace cambium
