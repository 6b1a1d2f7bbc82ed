#include "serve/step_queue.h"

#include <algorithm>

namespace cambium {
namespace {

/// Of a step's uploads beside page tables: tokens, segments, angles, settings and lists of tiles.
constexpr int64_t kOtherUploads = int64_t{8} << 20;
constexpr int64_t kMostUploads = int64_t{128} << 20;

}  // namespace

StepQueue::StepQueue(const Model& model, int64_t table_entries, bool batch_invariant)
    : model_(model),
      workspace_(model.device()),
      other_host_(Arena::for_host(model.device())),
      recorder_(WorkRecorder::on(
          model.device(),
          std::min(kMostUploads,
                   kOtherUploads + 4 * table_entries * static_cast<int64_t>(sizeof(int32_t))))),
      batch_invariant_(batch_invariant) {}

StepQueue::~StepQueue() = default;

Arena& StepQueue::host() {
  const bool other = model_.device().kind != Device::kCpu && steps_ % 2 == 1;
  return other ? other_host_ : workspace_.host();
}

void StepQueue::run(Batch& batch, bool repeats, const std::function<void(Context& ctx)>& work,
                    void* to, const void* fetched, int64_t bytes) {
  Context ctx = context_for(model_, workspace_);
  ctx.host = &host();
  ctx.recorder = recorder_.get();
  ctx.batch_invariant = batch_invariant_;
  const auto begin = [&] {
    batch.forget_plans();
    const ArenaScope results(workspace_.arena());
    const ArenaScope shared(host());  // of the CPU the same arena: released twice to one mark
    work(ctx);
  };
  if (recorder_ == nullptr) {
    begin();
  } else {
    recorder_->step(repeats, begin, to, fetched, bytes);
  }
  ++steps_;
}

void StepQueue::wait(int64_t running) {
  if (recorder_ != nullptr) {
    recorder_->wait(running);
  }
}

void StepQueue::reserve(const WorkspaceBytes& bytes) {
  workspace_.reserve(bytes);
  if (model_.device().kind != Device::kCpu) {
    other_host_.reserve(bytes.host);
  }
}

WorkspaceBytes StepQueue::peak_bytes() const {
  WorkspaceBytes peak = workspace_.peak_bytes();
  peak.host = std::max(peak.host, other_host_.peak_bytes());
  return peak;
}

WorkRecorder::Counts StepQueue::counts() const {
  return recorder_ == nullptr ? WorkRecorder::Counts{} : recorder_->counts();
}

}  // namespace cambium
