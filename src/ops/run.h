// run(): computes with the form of a kernel that the tensors' device and type ask for.
#pragma once

#include "ops/kernel.h"
#include "tensor/context.h"

namespace cambium {

/// Runs Kernel on the device of `like` in its type. make.operator()<T>(more...) builds the
/// arguments for elements of T. F64 is computed by the definition, in double precision; so is F32
/// where the context says `reference`. A type or device without kernels is an Error.
template <class Kernel, class Make, class... More>
void run(const Context& ctx, const Tensor& like, const Make& make, const More&... more) {
  if (like.device.kind == Device::kCuda) {
    if constexpr (kCudaBuild) {
      const ArenaScope scope(*ctx.arena);
      const Launch launch{ctx.stream, ctx.arena};
      if (like.dtype == Dtype::kBF16) {
        return Kernel::cuda(make.template operator()<bf16>(more...), launch);
      }
      expect(like.dtype == Dtype::kF32, "[{}] cuda computes f32 and bf16, got {}", Kernel::kName,
             like.describe());
      return Kernel::cuda(make.template operator()<float>(more...), launch);
    } else {
      fail("[{}] this build has no CUDA kernels; move the model to the cpu", Kernel::kName);
    }
  }
  if (like.dtype == Dtype::kF64) {
    return Kernel::reference(make.template operator()<double>(more...));
  }
  expect(like.dtype == Dtype::kF32, "[{}] the cpu computes f32 and f64, got {}", Kernel::kName,
         like.describe());
  if (ctx.reference) {
    return Kernel::reference(make.template operator()<float>(more...));
  }
  const ArenaScope scope(*ctx.arena);
  Kernel::cpu(make.template operator()<float>(more...), *ctx.arena);
}

}  // namespace cambium
