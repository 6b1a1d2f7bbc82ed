// Workspace: the memory that forward and training steps work in, on one device.
#pragma once

#include <exception>

#include "tensor/context.h"

namespace cambium {

/// What steps take: of the device, and of host memory that both see (on the CPU: of it too).
struct WorkspaceBytes {
  int64_t device = 0;
  int64_t host = 0;
};

class Workspace {
 public:
  explicit Workspace(Device device = {}) : arena_(device), host_(Arena::for_host(device)) {}

  Device device() const { return arena_.device(); }
  /// For results, on the device.
  Arena& arena() { return arena_; }
  /// For what the host and the device both see, and for tapes; on the CPU the same arena.
  Arena& host() { return device().kind == Device::kCpu ? arena_ : host_; }
  /// Takes that much now: steps that need no more take nothing from the system. Between steps.
  void reserve(const WorkspaceBytes& bytes) {
    arena_.reserve(bytes.device);
    host_.reserve(bytes.host);
  }
  /// The most that steps had in use at once.
  WorkspaceBytes peak_bytes() const { return {arena_.peak_bytes(), host_.peak_bytes()}; }
  Context context(Dtype activations = Dtype::kF32, Tape* tape = nullptr) {
    return {.arena = &arena_, .tape = tape, .host = &host(), .activations = activations};
  }

 private:
  Arena arena_;
  Arena host_;
};

/// Releases what a step took during its life, once the device is done with it.
class WorkspaceScope {
 public:
  explicit WorkspaceScope(Workspace& workspace)
      : workspace_(workspace), arena_(workspace.arena().mark()), host_(workspace.host().mark()) {}
  ~WorkspaceScope() {
    wait();
    workspace_.host().release(host_);
    workspace_.arena().release(arena_);
  }
  WorkspaceScope(const WorkspaceScope&) = delete;
  WorkspaceScope& operator=(const WorkspaceScope&) = delete;

 private:
  // What went wrong on the device is found by whoever asks it next; here nothing may be thrown.
  void wait() noexcept {
    try {
      wait_for(workspace_.device());
    } catch (const std::exception&) {
    }
  }

  Workspace& workspace_;
  Arena::Mark arena_;
  Arena::Mark host_;
};

}  // namespace cambium
