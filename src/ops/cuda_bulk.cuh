// Copies of whole ranges from global to shared memory in the background, and the barriers in shared
// memory that say when they are there (sm_90 and newer; PTX ISA, "cp.async.bulk" and "mbarrier").
// Addresses and sizes are multiples of 16 bytes. On older devices none of this may be called, but
// first_to_leave(): hosts ask launches_ahead().
#pragma once

#include <cstdint>

#include "ops/cuda_mma.cuh"

namespace cambium::cuda {

/// A barrier that `arrivals` arrivals, and the bytes announced to it, complete: in shared memory.
/// One thread calls; the others may use it after barriers_ready() and a barrier of the block.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
/// Makes the barriers that the calling thread initialised known to background copies.
__device__ __forceinline__ void barriers_ready() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
/// Waits until the phase of this parity (0 first) is complete.
__device__ __forceinline__ void await_phase(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

/// For accesses to what nobody reads again soon: it is the first to leave the L2.
__device__ __forceinline__ uint64_t first_to_leave() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 800
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

/// Four numbers by one access of such a policy; addresses are multiples of 16 bytes.
__device__ __forceinline__ void load_once(const float* from, uint64_t policy, float (&to)[4]) {
  asm volatile("ld.global.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "l"(from), "l"(policy));
}
__device__ __forceinline__ void store_once(float* to, uint64_t policy, const float (&from)[4]) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
               "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]), "l"(policy)
               : "memory");
}

/// Begins to copy to shared memory; the barrier learns of its bytes.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}
/// The same of what nobody reads again soon; the barrier learns of its bytes.
__device__ __forceinline__ void copy_bulk_once(void* to, const void* from, uint32_t bytes,
                                               uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)),
      "l"(first_to_leave())
      : "memory");
#endif
}

/// Begins to copy from shared memory, where fence.proxy.async published what is there.
__device__ __forceinline__ void copy_bulk_out(void* to, const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
#endif
}
/// Waits until the calling thread's copies have read their shared memory.
__device__ __forceinline__ void await_bulk_out() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

}  // namespace cambium::cuda
