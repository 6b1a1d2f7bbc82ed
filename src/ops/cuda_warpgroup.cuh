// Products of a warpgroup, four warps that multiply together what lies in shared memory (compute
// capability 9.0 alone; PTX ISA, "wgmma"). A tile is 64 elements wide: rows of 128 bytes, whose
// pieces of 16 bytes are swizzled by the row, eight rows to 1,024 bytes, which its address is a
// multiple of. Accumulators are those of mma.m16n8k16 side by side, a warp having 16 of the rows.
#pragma once

#include <cstdint>

#include "ops/cuda_mma.cuh"
#include "tensor/dtype.h"

namespace cambium::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kByWarpgroup = true;
#else
inline constexpr bool kByWarpgroup = false;
#endif

/// Where an operand lies: its rows have the depth together, 64 deep; or, turned, rows of the depth
/// have 64 of its rows together, and the next 64 lie `next_block` bytes on.
__device__ __forceinline__ uint64_t describe_operand(const bf16* p, uint32_t next_block = 1024) {
  return static_cast<uint64_t>((shared_address(p) & 0x3ffffU) >> 4) |
         static_cast<uint64_t>(next_block / 16) << 16 | uint64_t{1024 / 16} << 32 |
         uint64_t{1} << 62;
}
/// What is added to the description for the next 16 of the depth.
template <bool kTurned>
inline constexpr uint64_t kNextDepth = (kTurned ? 16 * 128 : 32) / 16;

#define CAMBIUM_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CAMBIUM_SIXTEEN(i) \
  CAMBIUM_FOUR(i), CAMBIUM_FOUR((i) + 1), CAMBIUM_FOUR((i) + 2), CAMBIUM_FOUR((i) + 3)
/// d (64, 256) += a (64, 16) b (256, 16)^T, in the background.
template <bool kATurned, bool kBTurned>
__device__ __forceinline__ void multiply_async(float (&d)[32][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "
      "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
      "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, "
      "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, "
      "%93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
      "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "
      "%122, %123, %124, %125, %126, %127}, %128, %129, 1, 1, 1, %130, %131;"
      : CAMBIUM_SIXTEEN(0), CAMBIUM_SIXTEEN(4), CAMBIUM_SIXTEEN(8), CAMBIUM_SIXTEEN(12),
        CAMBIUM_SIXTEEN(16), CAMBIUM_SIXTEEN(20), CAMBIUM_SIXTEEN(24), CAMBIUM_SIXTEEN(28)
      : "l"(a), "l"(b), "n"(kATurned ? 1 : 0), "n"(kBTurned ? 1 : 0));
}
#undef CAMBIUM_SIXTEEN
#undef CAMBIUM_FOUR

/// The compiler moves no use of the accumulators across.
template <int kTiles>
__device__ __forceinline__ void pin_sums(float (&d)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    asm volatile("" : "+f"(d[i / 4][i % 4]) : : "memory");
  }
}
__device__ __forceinline__ void begin_async_products() {
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}
__device__ __forceinline__ void commit_async_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
/// Waits for this warpgroup's products but those of the last kLeft commits.
template <int kLeft>
__device__ __forceinline__ void wait_for_async_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kLeft) : "memory");
}
/// What this thread wrote to shared memory is there for products, once others met it at a barrier.
__device__ __forceinline__ void publish_to_async_products() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

}  // namespace cambium::cuda
