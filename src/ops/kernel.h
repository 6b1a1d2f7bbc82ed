// The one dispatch: a kernel is declared once and run() picks the form that computes.
//
//   CAMBIUM_KERNEL(rms_norm_forward, RmsNorm)                            X_kernels.h
//   template <class T>
//   void rms_norm_forward::reference(const RmsNorm<T>& a) {...}          X_ref.h: the definition
//   void rms_norm_forward(const RmsNorm<float>& a) {...}                 X_cpu.cc, in CAMBIUM_ISA
//   void rms_norm_forward(const RmsNorm<float>& a, const Launch&) {...}  X_cuda.cu, in cuda;
//   void rms_norm_forward(const RmsNorm<bf16>& a, const Launch&) {...}     a build with CUDA only
//
// A kernel that a build needs and nobody wrote is a link error. docs/adding-an-operation.md walks
// through one operation.
#pragma once

#include "base/cpu.h"
#include "tensor/dtype.h"

struct CUstream_st;

namespace cambium {

class Arena;
class WorkRecorder;

/// What a CUDA kernel's host function gets beside its arguments: its stream, and memory of the
/// device that it may use until the work it queues is done. (A .cu file cannot include the headers
/// of tensors: nvcc does not compile fmt.)
struct Launch {
  CUstream_st* stream = nullptr;
  Arena* arena = nullptr;
  WorkRecorder* recorder = nullptr;  // tensor/work_recorder.h
  bool batch_invariant = false;      // as Context's

  void* scratch(int64_t bytes) const;
};

}  // namespace cambium

/// Declares the kernel `name` over the argument struct template Args<T>.
#define CAMBIUM_KERNEL(name, Args)                                                    \
  CAMBIUM_DECLARE_ISAS(name, Args<float>)                                             \
  CAMBIUM_DECLARE_CUDA(name, Args)                                                    \
  struct name {                                                                       \
    CAMBIUM_KERNEL_FORMS(name, Args)                                                  \
    static void cpu(const Args<float>& args, Arena&) { CAMBIUM_CALL_ISA(name, args) } \
  };

/// The same for a kernel whose work on the CPU is planned first: name::cpu stands in X_cpu_plan.cc,
/// which is compiled once and calls kernels declared with CAMBIUM_CPU_KERNEL. Memory it takes from
/// the arena is released after the call.
#define CAMBIUM_PLANNED_KERNEL(name, Args)                  \
  CAMBIUM_DECLARE_CUDA(name, Args)                          \
  struct name {                                             \
    CAMBIUM_KERNEL_FORMS(name, Args)                        \
    static void cpu(const Args<float>& args, Arena& arena); \
  };

/// A planned kernel that leaves something to its backward kernel: each form says how many bytes
/// (keep() in ops/run.h takes them), and finds them in args.kept, null where nothing is recorded.
#define CAMBIUM_KEEPING_KERNEL(name, Args)                  \
  CAMBIUM_DECLARE_CUDA(name, Args)                          \
  namespace cuda {                                          \
  int64_t name##_keeps(const Args<float>& args);            \
  int64_t name##_keeps(const Args<bf16>& args);             \
  }                                                         \
  struct name {                                             \
    CAMBIUM_KERNEL_FORMS(name, Args)                        \
    static void cpu(const Args<float>& args, Arena& arena); \
    template <class T>                                      \
    static int64_t reference_keeps(const Args<T>& args);    \
    static int64_t cpu_keeps(const Args<float>& args);      \
    template <class T>                                      \
    static int64_t cuda_keeps(const Args<T>& args) {        \
      return ::cambium::cuda::name##_keeps(args);           \
    }                                                       \
  };

#define CAMBIUM_DECLARE_CUDA(name, Args)                    \
  namespace cuda {                                          \
  void name(const Args<float>& args, const Launch& launch); \
  void name(const Args<bf16>& args, const Launch& launch);  \
  }

#define CAMBIUM_KERNEL_FORMS(name, Args)                        \
  static constexpr const char* kName = #name;                   \
  template <class T>                                            \
  static void reference(const Args<T>& args);                   \
  template <class T>                                            \
  static void cuda(const Args<T>& args, const Launch& launch) { \
    ::cambium::cuda::name(args, launch);                        \
  }
