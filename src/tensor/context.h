// Context: where an operation's results go and whether it is to be differentiated.
// Tape: the list of backward steps of the operations run since it was cleared.
//
// With a tape, an operation whose inputs have gradients gives its output one and records a closure
// that adds to the inputs' gradients. Without a tape the same call is inference.
#pragma once

#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor/arena.h"
#include "tensor/tensor.h"

namespace cambium {

class Tape {
 public:
  explicit Tape(Arena& arena) : arena_(arena) {}

  /// Appends a backward step. `step` is copied into the arena, so it holds views and numbers only.
  template <class Step>
  void record(Step step) {
    static_assert(std::is_trivially_destructible_v<Step>,
                  "a backward step lives in the arena: capture views and numbers, not owners");
    void* memory = arena_.allocate(sizeof(Step));
    steps_.push_back({new (memory) Step(std::move(step)),
                      [](void* closure) { (*static_cast<Step*>(closure))(); }});
  }

  /// Runs the steps from last to first and forgets them. The caller has set the gradient of the
  /// result. What backward steps allocate in the arena is released step by step.
  void backward();
  void clear() { steps_.clear(); }
  size_t size() const { return steps_.size(); }

 private:
  struct Entry {
    void* closure;
    void (*run)(void* closure);
  };
  Arena& arena_;
  std::vector<Entry> steps_;
};

struct Context {
  Arena* arena = nullptr;
  Tape* tape = nullptr;
  /// Computes with the naive definitions instead of the fast kernels (they are also what F64 uses).
  bool reference = false;

  /// Whether an operation on these inputs must record its backward step.
  template <class... Tensors>
  bool differentiate(const Tensors&... inputs) const {
    return tape != nullptr && (inputs.has_grad() || ...);
  }
  /// An uninitialised result; with a zeroed gradient if `with_grad`.
  Tensor result(Dtype dtype, std::span<const int64_t> shape, bool with_grad) const;
  Tensor result(Dtype dtype, std::initializer_list<int64_t> shape, bool with_grad) const {
    return result(dtype, std::span(shape.begin(), shape.size()), with_grad);
  }
  Tensor result_like(const Tensor& t, bool with_grad) const {
    return result(t.dtype, std::span(t.shape.data(), static_cast<size_t>(t.rank)), with_grad);
  }
  /// Whether the naive definition must compute `t`.
  bool use_reference(const Tensor& t) const { return reference || t.dtype == Dtype::kF64; }
};

/// Stops with a clear error where an operation has no kernel for the tensor's device.
void require_cpu(const char* operation, const Tensor& t);

}  // namespace cambium
