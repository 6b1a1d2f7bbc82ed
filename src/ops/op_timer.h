// OpTimer: who wants to know of every kernel that run() calls, and so measures the operations of a
// model's own steps where they stand. A context has none but while it is asked for one.
#pragma once

#include <typeinfo>

struct CUstream_st;

namespace cambium {

/// A call of a kernel. `args` is its argument struct (X_kernels.h) and lives as long as the call.
struct OpCall {
  const char* kernel;  // lives as long as the program
  const std::type_info& type;
  const void* args;
  CUstream_st* stream;

  /// The arguments, if they are of this type; else null.
  template <class Args>
  const Args* as() const {
    return type == typeid(Args) ? static_cast<const Args*>(args) : nullptr;
  }
};

/// begin() before a kernel is called and end() after it has returned, on a device: has queued its
/// work. Calls do not overlap.
class OpTimer {
 public:
  OpTimer() = default;
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;
  virtual ~OpTimer() = default;
  virtual void begin(const OpCall& call) = 0;
  virtual void end(const OpCall& call) = 0;
};

}  // namespace cambium
