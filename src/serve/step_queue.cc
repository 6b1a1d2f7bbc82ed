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
      arena_(model.device()),
      hosts_{Arena::for_host(model.device()), Arena::for_host(model.device())},
      recorder_(WorkRecorder::on(
          model.device(),
          std::min(kMostUploads,
                   kOtherUploads + 4 * table_entries * static_cast<int64_t>(sizeof(int32_t))))),
      batch_invariant_(batch_invariant) {}

StepQueue::~StepQueue() = default;

Arena& StepQueue::host() {
  return model_.device().kind == Device::kCpu ? arena_ : hosts_[static_cast<size_t>(steps_ % 2)];
}

void StepQueue::run(Batch& batch, bool repeats, const std::function<void(Context& ctx)>& work,
                    void* to, const void* fetched, int64_t bytes) {
  Context ctx{.arena = &arena_,
              .host = &host(),
              .activations = model_.activations(),
              .recorder = recorder_.get(),
              .batch_invariant = batch_invariant_};
  const auto begin = [&] {
    batch.forget_plans();
    const ArenaScope results(arena_);
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
  arena_.reserve(bytes.device);
  for (Arena& arena : hosts_) {
    arena.reserve(bytes.host);
  }
}

WorkspaceBytes StepQueue::peak_bytes() const {
  if (model_.device().kind == Device::kCpu) {
    return {arena_.peak_bytes(), 0};
  }
  return {arena_.peak_bytes(), std::max(hosts_[0].peak_bytes(), hosts_[1].peak_bytes())};
}

WorkRecorder::Counts StepQueue::counts() const {
  return recorder_ == nullptr ? WorkRecorder::Counts{} : recorder_->counts();
}

}  // namespace cambium
