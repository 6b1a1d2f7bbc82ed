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

/// What a CUDA kernel's host function gets beside its arguments: its stream, and memory of the
/// device that it may use until the work it queues is done. (A .cu file cannot include the headers
/// of tensors: nvcc does not compile fmt.)
struct Launch {
  CUstream_st* stream = nullptr;
  Arena* arena = nullptr;

  void* scratch(int64_t bytes) const;
};

}  // namespace cambium

/// Declares the kernel `name` over the argument struct template Args<T>.
#define CAMBIUM_KERNEL(name, Args)        \
  CAMBIUM_DECLARE_ISAS(name, Args<float>) \
  CAMBIUM_KERNEL_FORMS(name, Args, {      \
    static_cast<void>(arena);             \
    CAMBIUM_CALL_ISA(name, args)          \
  })

/// The same for a kernel whose work on the CPU is planned first, by name::cpu in X_cpu_plan.cc,
/// which is compiled once and calls kernels declared with CAMBIUM_CPU_KERNEL. Memory it takes from
/// the arena is released after the call.
#define CAMBIUM_PLANNED_KERNEL(name, Args) CAMBIUM_KERNEL_FORMS(name, Args, ;)

#define CAMBIUM_KERNEL_FORMS(name, Args, ...)                                             \
  namespace cuda {                                                                        \
  void name(const Args<float>& args, const Launch& launch);                               \
  void name(const Args<bf16>& args, const Launch& launch);                                \
  }                                                                                       \
  struct name {                                                                           \
    static constexpr const char* kName = #name;                                           \
    template <class T>                                                                    \
    static void reference(const Args<T>& args);                                           \
    static void cpu(const Args<float>& args, Arena& arena) __VA_ARGS__ template <class T> \
    static void cuda(const Args<T>& args, const Launch& launch) {                         \
      ::cambium::cuda::name(args, launch);                                                \
    }                                                                                     \
  };
