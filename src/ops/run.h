// run(): computes with the form of a kernel that the tensors' device and type ask for.
#pragma once

#include "base/error.h"
#include "ops/kernel.h"
#include "ops/op_timer.h"
#include "tensor/context.h"

namespace cambium {

enum class KernelForm { kReference, kCpu, kCuda };

/// Calls f.operator()<T, form>() for the form that computes `like`: on its device, in its type.
/// F64 is computed by the definition, in double precision; so is F32 where the context says
/// `reference`. A type or device without kernels is an Error.
template <class F>
auto pick_form(const Context& ctx, const Tensor& like, const char* kernel, const F& f) {
  if (like.device.kind == Device::kCuda) {
    if constexpr (kCudaBuild) {
      if (like.dtype == Dtype::kBF16) {
        return f.template operator()<bf16, KernelForm::kCuda>();
      }
      expect(like.dtype == Dtype::kF32, "[{}] cuda computes f32 and bf16, got {}", kernel, like);
      return f.template operator()<float, KernelForm::kCuda>();
    } else {
      fail("[{}] this build has no CUDA kernels; move the model to the cpu", kernel);
    }
  }
  if (like.dtype == Dtype::kF64) {
    return f.template operator()<double, KernelForm::kReference>();
  }
  expect(like.dtype == Dtype::kF32, "[{}] the cpu computes f32 and f64, got {}", kernel, like);
  return ctx.reference ? f.template operator()<float, KernelForm::kReference>()
                       : f.template operator()<float, KernelForm::kCpu>();
}

/// Error: what a CUDA kernel's launch said (cuda_launch.h), and what the kernel was called with.
[[noreturn]] void cuda_failed(const char* kernel, const Tensor& like, const Error& error);

/// Runs Kernel on the device of `like` in its type; nothing on the meta device.
/// make.operator()<T>(more...) builds the arguments for elements of T.
template <class Kernel, class Make, class... More>
void run(const Context& ctx, const Tensor& like, const Make& make, const More&... more) {
  if (like.device.kind == Device::kMeta) {
    return;
  }
  pick_form(ctx, like, Kernel::kName, [&]<class T, KernelForm kForm>() {
    const auto args = make.template operator()<T>(more...);
    const OpCall call{Kernel::kName, typeid(args), &args, compute_stream(ctx.device())};
    if (ctx.timer != nullptr) {
      ctx.timer->begin(call);
    }
    if constexpr (kForm == KernelForm::kReference) {
      Kernel::reference(args);
    } else {
      const ArenaScope scope(*ctx.arena);
      if constexpr (kForm == KernelForm::kCpu) {
        Kernel::cpu(args, *ctx.arena);
      } else {
        try {
          Kernel::cuda(args, Launch{compute_stream(ctx.device()), ctx.arena, ctx.recorder,
                                    ctx.batch_invariant});
        } catch (const Error& error) {
          cuda_failed(Kernel::kName, like, error);
        }
      }
    }
    if (ctx.timer != nullptr) {
      ctx.timer->end(call);
    }
  });
}

/// Memory for what the forward kernel leaves its backward kernel, if the call is recorded; else
/// null.
template <class Kernel, class Make, class... More>
void* keep(const Context& ctx, bool recorded, const Tensor& like, const Make& make,
           const More&... more) {
  if (!recorded) {
    return nullptr;
  }
  return ctx.arena->allocate(
      pick_form(ctx, like, Kernel::kName, [&]<class T, KernelForm kForm>() -> int64_t {
        const auto args = make.template operator()<T>(more...);
        if constexpr (kForm == KernelForm::kReference) {
          return Kernel::reference_keeps(args);
        } else if constexpr (kForm == KernelForm::kCpu) {
          return Kernel::cpu_keeps(args);
        } else {
          return Kernel::cuda_keeps(args);
        }
      }));
}

}  // namespace cambium
