// Blocks that run side by side and read each other's shared memory (clusters, sm_90 and newer; PTX
// ISA, "Cluster of CTAs"). On older devices kernels are launched with clusters of one block.
#pragma once

#include "ops/cuda.cuh"
#include "ops/cuda_mma.cuh"

namespace cambium::cuda {

/// Which block of its cluster this one is.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
/// Waits for all threads of the cluster; what they wrote to shared memory is there then.
template <int kBlocks>
__device__ __forceinline__ void meet_cluster() {
  if constexpr (kBlocks == 1) {
    __syncthreads();
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
#endif
  }
}
/// Where what stands at `p` in this block's shared memory stands in block `rank`'s.
__device__ __forceinline__ uint32_t address_in_block(const void* p, int rank) {
  uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(p)), "r"(rank));
#endif
  return address;
}
/// The number that stands at `p` in the shared memory of block `rank` of the cluster.
template <int kBlocks>
__device__ __forceinline__ int load_of_block(const int* p, int rank) {
  int value = *p;
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) {
    asm volatile("ld.shared::cluster.s32 %0, [%1];"
                 : "=r"(value)
                 : "r"(address_in_block(p, rank))
                 : "memory");
  }
#endif
  return value;
}
/// arrive() (ops/cuda_bulk.cuh) at the barrier of block `rank`, after what was read: what this
/// thread wrote is published to its own block alone.
__device__ __forceinline__ void arrive_in_block(const uint64_t* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_block(barrier, rank))
               : "memory");
#endif
}

/// launch_ahead() in clusters of `cluster` blocks along x, where that is more than one.
template <class... Params, class... Args>
void launch_clusters(const Launch& on, const char* operation, int cluster,
                     void (*kernel)(Params...), dim3 blocks, dim3 threads, size_t shared,
                     Args&&... args) {
  if (cluster == 1) {
    return launch_ahead(on, operation, kernel, blocks, threads, shared,
                        std::forward<Args>(args)...);
  }
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) {
    return;
  }
  if (only_compared<Params...>(on, kernel, blocks, threads, shared, Params(args)...)) {
    return;
  }
  allow_shared(operation, kernel, blocks, threads, shared);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check_launch(operation, {blocks.x, blocks.y, blocks.z}, {threads.x, threads.y, threads.z}, shared,
               cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...));
}

}  // namespace cambium::cuda
