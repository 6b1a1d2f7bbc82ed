// Private to the operation on CUDA: tiles of bf16 in shared memory and products of them.
//
// An accumulator of 16 x 8 holds, in lane l, columns 2 (l % 4) and the next of rows l / 4 (c[0],
// c[1]) and l / 4 + 8 (c[2], c[3]). Two of them side by side, rounded, are the left operand of the
// next product: a state or what is written never leaves its warp between products.
#pragma once

#include "ops/cuda.cuh"
#include "ops/cuda_mma.cuh"

namespace cambium::cuda {

/// Left operand: rows [0, 16), columns [0, 16) of a tile at `p` with rows `stride` apart.
__device__ __forceinline__ void load_left(const bf16* p, int stride, uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(a, p + lane % 16 * stride + lane / 16 * 8);
}
/// The same of the transpose of rows [0, 16), columns [0, 16) at `p`.
__device__ __forceinline__ void load_left_transposed(const bf16* p, int stride, uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices_transposed(a, p + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
/// Right operands x' for two column tiles: x has rows n [0, 16) and columns k [0, 16). b[0], b[1]
/// are of n [0, 8), b[2], b[3] of the others.
__device__ __forceinline__ void load_right_of_rows(const bf16* p, int stride, uint32_t (&b)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(b, p + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
/// Right operands x for two column tiles: x has rows k [0, 16) and columns n [0, 16).
__device__ __forceinline__ void load_right(const bf16* p, int stride, uint32_t (&b)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices_transposed(b, p + lane % 16 * stride + lane / 16 * 8);
}

/// The transpose of a matrix of 8 x 8 16-bit numbers, of which lane l has row l / 4, columns
/// 2 (l % 4) and the next.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
/// c += a b in tf32: a (16, 8), b (8, 8), c (16, 8). Lane l has a at rows l / 4 and l / 4 + 8 of
/// column l % 4, then of column l % 4 + 4, and b at rows l % 4 and l % 4 + 4 of column l / 4.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cambium::cuda
