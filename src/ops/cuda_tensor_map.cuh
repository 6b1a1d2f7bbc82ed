// Copies of boxes of a tensor from global to shared memory in the background (sm_90 and newer; PTX
// ISA, "cp.async.bulk.tensor"; CUDA driver API, "Tensor Map Object Management"). A box's rows are
// 64 numbers of bf16, swizzled as products of warpgroups take them (ops/cuda_warpgroup.cuh); what
// of it lies outside of the tensor is zeros. Barriers are those of ops/cuda_bulk.cuh: one learns of
// all bytes of a box, those outside too.
#pragma once

#include <cuda.h>

#include "ops/cuda.cuh"
#include "ops/cuda_mma.cuh"

namespace cambium::cuda {

/// A tensor, the innermost dimension first.
template <int kRank>
struct BoxedTensor {
  const bf16* data;            // a multiple of 16 bytes
  uint64_t size[kRank];        // elements
  uint64_t stride[kRank - 1];  // elements of all dimensions but the first: multiples of 8
  uint32_t box[kRank];         // elements; the first: 64
};

/// What copies of the tensor's boxes take. False where the driver has none or the tensor has no
/// such description.
template <int kRank>
bool describe_boxes(const BoxedTensor<kRank>& tensor, CUtensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const bool known = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                        cudaEnableDefault, &found) == cudaSuccess;
    return known && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry)
                                                         : nullptr;
  }();
  if (encode == nullptr) {
    return false;
  }
  cuuint64_t size[kRank];
  cuuint64_t bytes[kRank];  // from one to the next of a dimension but the first
  cuuint32_t box[kRank];
  cuuint32_t every[kRank];
  for (int i = 0; i < kRank; ++i) {
    size[i] = tensor.size[i];
    bytes[i] = i + 1 < kRank ? tensor.stride[i] * sizeof(bf16) : 0;
    box[i] = tensor.box[i];
    every[i] = 1;
  }
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<bf16*>(tensor.data), size,
                bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/// A place in a ring of stages that copies fill, and the parity of how often it has been gone
/// around, as barriers count it.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    ++stage;
    if (stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Begins to copy the box whose first element is `at`.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, const int (&at)[3],
                                         uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared_address(barrier))
      : "memory");
#endif
}
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, const int (&at)[5],
                                         uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(to)),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]),
      "r"(shared_address(barrier))
      : "memory");
#endif
}
/// The same into the blocks of the cluster that `blocks` names by its bits, to the same place in
/// each; the barrier there learns of it.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, void* to, const CUtensorMap& map,
                                            const int (&at)[2], uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
#endif
}

}  // namespace cambium::cuda
