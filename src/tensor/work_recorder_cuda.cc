#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <vector>

#include "base/error.h"
#include "base/progress.h"
#include "tensor/arena.h"
#include "tensor/device_memory_queues.h"

namespace cambium {
namespace {

/// Graphs kept: of batches that come again. A graph of some hundred kernels takes about a megabyte.
constexpr size_t kMostGraphs = 64;
/// Steps remembered that came once.
constexpr size_t kMostSeen = 1024;
/// Uploads of one array are a power of two apart from here on, so that small changes of one array's
/// size do not move those after it.
constexpr int64_t kLeastUpload = 256;

void check(const char* what, cudaError_t status) {
  expect(status == cudaSuccess, "[cuda] {} failed: {}", what, cudaGetErrorString(status));
}

class CudaRecorder : public WorkRecorder {
 public:
  CudaRecorder(Device device, int64_t upload_bytes)
      : device_(device),
        stream_(compute_stream(device)),
        uploads_(Buffer::uninitialised(upload_bytes, device)) {
    for (Buffer& pinned : pinned_) {
      pinned = Buffer::pinned(upload_bytes, device);
    }
    for (cudaEvent_t& event : done_) {
      check("making an event", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
  }
  CudaRecorder(const CudaRecorder&) = delete;
  CudaRecorder& operator=(const CudaRecorder&) = delete;
  ~CudaRecorder() override {
    cudaStreamSynchronize(stream_);
    for (const Graph& graph : graphs_) {
      cudaGraphExecDestroy(graph.made);
    }
    for (cudaEvent_t event : done_) {
      cudaEventDestroy(event);
    }
  }

  void step(bool repeats, const std::function<void()>& work, void* to, const void* fetched,
            int64_t bytes) override {
    wait(1);
    try {
      if (!repeats || !graphs_wanted_ || !as_graph(work)) {
        begin(Mode::kQueue);
        work();
        ++counts_.queued;
      }
    } catch (...) {
      mode_ = Mode::kQueue;
      cudaStreamSynchronize(stream_);  // nothing of this step runs on when its memory goes
      throw;
    }
    mode_ = Mode::kQueue;
    if (bytes > 0) {
      check("fetching results", cudaMemcpyAsync(to, fetched, static_cast<size_t>(bytes),
                                                cudaMemcpyDeviceToHost, stream_));
    }
    check("marking a step", cudaEventRecord(done_[static_cast<size_t>(steps_ % 2)], stream_));
    ++steps_;
  }

  void wait(int64_t running) override {
    for (; waited_ < steps_ - running; ++waited_) {
      check("a step's work", cudaEventSynchronize(done_[static_cast<size_t>(waited_ % 2)]));
    }
  }

  void* upload(const void* bytes, int64_t count) override {
    int64_t room = kLeastUpload;
    while (room < count) {
      room *= 2;
    }
    if (used_ + room > uploads_.bytes()) {
      refused_ = true;
      return nullptr;
    }
    auto* pinned = static_cast<char*>(now().data()) + used_;
    auto* there = static_cast<char*>(uploads_.data()) + used_;
    used_ += room;
    std::memcpy(pinned, bytes, static_cast<size_t>(count));
    if (mode_ == Mode::kQueue) {
      copy_from_pinned(there, device_, pinned, count);
    }
    return there;
  }

 private:
  struct Graph {
    Digest digest;
    cudaGraphExec_t made = nullptr;
    int64_t last_used = 0;
  };

  const Buffer& now() const { return pinned_[static_cast<size_t>(steps_ % 2)]; }

  void begin(Mode mode) {
    mode_ = mode;
    refused_ = false;
    digest_ = {};
    used_ = 0;
    recorder_in_use() = mode == Mode::kQueue ? nullptr : this;
  }

  /// false: it was not queued.
  bool as_graph(const std::function<void()>& work) {
    const InUse scope;
    begin(Mode::kCompare);
    work();
    if (refused_) {
      return false;
    }
    const auto known = std::find_if(graphs_.begin(), graphs_.end(),
                                    [&](const Graph& graph) { return graph.digest == digest_; });
    if (known != graphs_.end()) {
      known->last_used = steps_;
      launch(known->made);
      ++counts_.launched;
      return true;
    }
    // What comes a second time is worth a graph.
    const auto before = std::find(seen_.begin(), seen_.end(), digest_);
    if (before == seen_.end()) {
      if (seen_.size() == kMostSeen) {
        seen_.erase(seen_.begin());
      }
      seen_.push_back(digest_);
      return false;
    }
    seen_.erase(before);
    return record(work);
  }

  bool record(const std::function<void()>& work) {
    cudaGraph_t recorded = nullptr;
    begin(Mode::kRecord);
    check("recording a step", cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed));
    try {
      work();
    } catch (...) {
      cudaStreamEndCapture(stream_, &recorded);
      cudaGraphDestroy(recorded);
      cudaGetLastError();
      throw;
    }
    cudaError_t status = cudaStreamEndCapture(stream_, &recorded);
    cudaGraphExec_t made = nullptr;
    if (status == cudaSuccess) {
      status = cudaGraphInstantiate(&made, recorded, 0);
      cudaGraphDestroy(recorded);
    }
    if (status != cudaSuccess || refused_) {
      // The work is right without a graph, and slower.
      say("steps on {} are queued kernel by kernel, which is slower for small models: {}",
          device_.describe(), refused_ ? "uploads are too large" : cudaGetErrorString(status));
      cudaGetLastError();
      graphs_wanted_ = false;
      return false;
    }
    if (graphs_.size() == kMostGraphs) {
      const auto oldest = std::min_element(
          graphs_.begin(), graphs_.end(),
          [](const Graph& a, const Graph& b) { return a.last_used < b.last_used; });
      cudaStreamSynchronize(stream_);
      cudaGraphExecDestroy(oldest->made);
      graphs_.erase(oldest);
    }
    graphs_.push_back({digest_, made, steps_});
    launch(made);
    ++counts_.made;
    return true;
  }

  void launch(cudaGraphExec_t graph) {
    copy_from_pinned(uploads_.data(), device_, now().data(), used_);
    check("launching a step", cudaGraphLaunch(graph, stream_));
  }

  /// While it lives copies and fills on this thread, which are not told of a recorder, refuse.
  struct InUse {
    InUse() = default;
    InUse(const InUse&) = delete;
    InUse& operator=(const InUse&) = delete;
    ~InUse() { recorder_in_use() = nullptr; }
  };

  Device device_;
  cudaStream_t stream_;
  Buffer uploads_;
  std::array<Buffer, 2> pinned_;  // of even and odd steps
  std::array<cudaEvent_t, 2> done_{};
  int64_t used_ = 0;  // of the uploads, by this step
  int64_t steps_ = 0;
  int64_t waited_ = 0;  // steps that are known to be done
  bool graphs_wanted_ = true;
  std::vector<Graph> graphs_;
  std::vector<Digest> seen_;
};

}  // namespace

WorkRecorder*& recorder_in_use() {
  thread_local WorkRecorder* recorder = nullptr;
  return recorder;
}

std::unique_ptr<WorkRecorder> cuda_recorder(Device device, int64_t upload_bytes) {
  return std::make_unique<CudaRecorder>(device, upload_bytes);
}

}  // namespace cambium
