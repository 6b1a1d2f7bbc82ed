// StepQueue: the steps of a model that serves, one after the other on its device. The host works
// out step n + 1 while the device does step n: each step has host memory of its own until the next
// but one begins, and the device's memory is used again at once, as its work is done in order.
#pragma once

#include <functional>
#include <memory>

#include "model/model.h"
#include "tensor/work_recorder.h"

namespace cambium {

class StepQueue {
 public:
  /// `table_entries`: page table entries of the largest step, which are what most of its uploads
  /// are; steps with more are queued all the same. `batch_invariant` as Context's.
  explicit StepQueue(const Model& model, int64_t table_entries = 0, bool batch_invariant = false);
  /// Waits for what was queued.
  ~StepQueue();
  StepQueue(const StepQueue&) = delete;
  StepQueue& operator=(const StepQueue&) = delete;

  /// Queues a step over `batch`: what `work` queues with the context it is given, then copies
  /// `bytes` of the device from `fetched` to `to`, which is pinned. `repeats`: see WorkRecorder.
  /// On the CPU the step is done when this returns.
  void run(Batch& batch, bool repeats, const std::function<void(Context& ctx)>& work,
           void* to = nullptr, const void* fetched = nullptr, int64_t bytes = 0);
  /// Waits until all steps are done but the newest `running`.
  void wait(int64_t running);

  /// Takes that much now: steps that need no more take nothing from the system. Before the first.
  void reserve(const WorkspaceBytes& bytes);
  /// The most that a step had in use at once.
  WorkspaceBytes peak_bytes() const;
  /// Graphs made and used.
  WorkRecorder::Counts counts() const;

 private:
  Arena& host();

  const Model& model_;
  Workspace workspace_;  // of all steps; its memory of the host, of every second one
  Arena other_host_;     // of those between
  std::unique_ptr<WorkRecorder> recorder_;
  bool batch_invariant_;
  int64_t steps_ = 0;
};

}  // namespace cambium
