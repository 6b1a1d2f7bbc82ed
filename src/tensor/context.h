// Context: where an operation's results go and whether it is to be differentiated.
// Tape: the list of backward steps of the operations run since it was cleared.
//
// With a tape, an operation whose inputs have gradients gives its output one and records a closure
// that adds to the inputs' gradients. Without a tape the same call is inference.
//
// A result's gradient starts fresh, not zeroed (GradientMemory): a backward step names the tensors
// whose gradients it reads or adds to, and those still fresh are made zero before it runs. A step
// that can set a gradient leaves it out of that list and asks Tensor::takes_grad().
#pragma once

#include <array>
#include <initializer_list>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor/arena.h"
#include "tensor/tensor.h"

namespace cambium {

class WorkRecorder;
class OpTimer;
struct Context;

class Tape {
 public:
  explicit Tape(Arena& arena) : arena_(arena) {}

  /// Appends a backward step, called with the context backward() is given, over the gradients of
  /// `touched`. `step` is copied into the arena, so it holds views and numbers only.
  template <class Step>
  void record(std::initializer_list<Tensor> touched, Step step) {
    static_assert(std::is_trivially_destructible_v<Step>,
                  "a backward step lives in the arena: capture views and numbers, not owners");
    const auto first = touched_.size();
    for (const Tensor& t : touched) {
      if (t.grad_memory != nullptr) {
        touched_.push_back(t.grad_memory);
      }
    }
    void* memory = arena_.allocate(sizeof(Step));
    steps_.push_back({new (memory) Step(std::move(step)),
                      [](void* closure, const Context& ctx) {
                        if constexpr (std::is_invocable_v<Step&, const Context&>) {
                          (*static_cast<Step*>(closure))(ctx);
                        } else {
                          (*static_cast<Step*>(closure))();
                        }
                      },
                      first});
  }

  /// Gives `t`, which has none yet, a fresh gradient in the memory `grad` of its size.
  void set_fresh_grad(Tensor& t, void* grad);

  /// Runs the steps from last to first and forgets them. The caller has set the gradient of the
  /// result. What backward steps allocate in the arena of `ctx` is released step by step.
  void backward(const Context& ctx);
  void clear() {
    steps_.clear();
    touched_.clear();
  }
  size_t size() const { return steps_.size(); }

 private:
  struct Entry {
    void* closure;
    void (*run)(void* closure, const Context& ctx);
    size_t first_touched;
  };
  Arena& arena_;
  std::vector<Entry> steps_;
  std::vector<GradientMemory*>
      touched_;  // of all steps, each from its first_touched to the next one's
};

/// Memory of the gradients of layers that follow one another. The backward pass is in one layer at
/// a time and writes the gradient of its input, a result of the layer before: so two layers beside
/// each other have memory of their own, and each has that of the layer two before it.
class GradientPool {
 public:
  /// What is taken from here on is of the next layer, which reads nothing of those before the last.
  void next_layer();
  /// Memory of a layer two before that is large enough and not taken again yet, else of the
  /// arena's.
  void* take(Arena& arena, int64_t bytes);

 private:
  struct Piece {
    void* data;
    int64_t bytes;
    bool taken;
  };
  std::array<std::vector<Piece>, 2> pieces_;  // of every other layer
  size_t turn_ = 0;
};

struct Context {
  /// The memory of results, on the device the tensors are on.
  Arena* arena = nullptr;
  Tape* tape = nullptr;
  /// Where gradients of results lie; null: in `arena`, each in memory of its own.
  GradientPool* gradients = nullptr;
  /// Memory of the host that the device reads and writes in place, released when the device is done
  /// with it; null: `arena`, on the CPU.
  Arena* host = nullptr;
  /// The type of activations, where the model begins; F64 wherever weights are.
  Dtype activations = Dtype::kF32;
  /// Computes with the naive definitions instead of the fast kernels (they are also what F64 uses).
  bool reference = false;
  /// Of steps that may be queued as a whole (tensor/work_recorder.h); null: each operation is
  /// queued when it is called.
  WorkRecorder* recorder = nullptr;
  /// A sequence's results have the same bits whatever else is in the call: no kernel is chosen, and
  /// no sum cut, by the rows or segments beside it. The kernels of the CPU need no telling; those
  /// of CUDA are slower so (docs/architecture.md). Forward calls only.
  bool batch_invariant = false;
  /// Told of every kernel that is called (ops/op_timer.h); null: nobody is.
  OpTimer* timer = nullptr;

  /// Whether an operation on these inputs must record its backward step.
  template <class... Tensors>
  bool differentiate(const Tensors&... inputs) const {
    return tape != nullptr && (inputs.has_grad() || ...);
  }
  /// An uninitialised result; with a fresh gradient if `with_grad`.
  Tensor result(Dtype dtype, std::span<const int64_t> shape, bool with_grad) const;
  Tensor result(Dtype dtype, std::initializer_list<int64_t> shape, bool with_grad) const {
    return result(dtype, std::span(shape.begin(), shape.size()), with_grad);
  }
  Tensor result_like(const Tensor& t, bool with_grad) const {
    return result(t.dtype, std::span(t.shape.data(), static_cast<size_t>(t.rank)), with_grad);
  }
  /// Adds a backward step to the tape: a function of the context that backward() runs with, which
  /// reads or adds to the gradients of `touched`.
  template <class Step>
  void record(std::initializer_list<Tensor> touched, Step step) const {
    tape->record(touched, std::move(step));
  }
  Arena& host_arena() const { return host != nullptr ? *host : *arena; }
  Device device() const { return arena->device(); }
  /// The elements where kernels find them: themselves on the CPU, else a copy on the device that
  /// lives as long as the results.
  template <class T>
  const T* to_device(std::span<const T> elements) const {
    return static_cast<const T*>(
        to_device(elements.data(), static_cast<int64_t>(elements.size_bytes())));
  }
  /// Uninitialised elements that kernels write and the host reads after synchronize(), or the host
  /// writes before it calls a kernel.
  template <class T>
  T* shared_scratch(int64_t count) const {
    return static_cast<T*>(host_arena().allocate(count * static_cast<int64_t>(sizeof(T))));
  }
  /// Waits until the device has done what was queued.
  void synchronize() const { wait_for(device()); }
  /// Uninitialised memory that lives as long as the results.
  template <class T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(arena->allocate(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  const void* to_device(const void* elements, int64_t bytes) const;
};

}  // namespace cambium
