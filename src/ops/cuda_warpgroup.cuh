// Products of warpgroups, 128 threads that begin at a multiple of 128 (wgmma of sm_90a; PTX ISA,
// "Asynchronous warpgroup level matrix operations"). Operands in shared memory are tiles of 64
// columns of bf16: rows of 128 bytes, whose pieces of 16 bytes are exchanged by the row's lowest
// three bits (swizzled()). Results are fp32: thread l of warp w of a warpgroup has rows
// 16 w + l / 4 and the eighth after it, of every eight columns 2 (l % 4) and the next.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/cuda_mma.cuh"

namespace cambium::cuda {

/// Whether this compilation is for a device that has them; hosts ask has_warpgroups().
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kWarpgroups = true;
#else
inline constexpr bool kWarpgroups = false;
#endif

/// Of a tile of 64 columns and as many rows.
inline constexpr int kTileColumns = 64;
inline constexpr int kTileSize = 64 * kTileColumns;
inline constexpr int kTileBytes = 2 * kTileSize;
/// Where the 16 bytes from column 8 p on lie, in row r of a tile.
__device__ __forceinline__ int swizzled(int r, int p) {
  return r * kTileColumns + (p ^ (r % 8)) * 8;
}

/// Describes tiles to products: of (n, k) with k together, or of (k, n) with n together, whose next
/// 64 columns lie `next` bytes away. Tiles begin at multiples of 1,024 bytes.
__device__ __forceinline__ uint64_t describe_tile(const void* p, uint32_t next = 1024) {
  return static_cast<uint64_t>((shared_address(p) & 0x3ffffU) >> 4) |
         static_cast<uint64_t>(next / 16) << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}

/// What is added to a description for the k-th sixteen columns of tiles of 64 rows side by side,
/// and for the k-th sixteen rows.
constexpr uint64_t of_columns(int k) {
  return static_cast<uint64_t>(k / 4 * kTileBytes + k % 4 * 32) / 16;
}
constexpr uint64_t of_rows(int k) {
  return static_cast<uint64_t>(k * 16 * kTileColumns * 2) / 16;
}

/// The compiler moves no use of the results across.
template <int kTiles>
__device__ __forceinline__ void pin(float (&x)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    asm volatile("" : "+f"(x[i / 4][i % 4]) : : "memory");
  }
}
template <int kTiles>
__device__ __forceinline__ void pin(float (&x)[kTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) {
    asm volatile("" : "+f"(x[i / 8][i / 4 % 2][i % 4]) : : "memory");
  }
}
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
/// Waits for those of all commits but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kLeft) : "memory");
}
/// What this thread wrote to shared memory is there for products, once others met it at a barrier.
__device__ __forceinline__ void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

/// Four 8 x 8 matrices of 16-bit numbers, turned: lane l gives the address of column l % 8 of
/// matrix l / 8 (stmatrix, sm_90).
__device__ __forceinline__ void store_matrices_transposed(void* column, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(column)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

/// Barriers of some of a block's threads: meet() waits until `threads` came to it, report() comes
/// and goes on. Number 0 is that of the block.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void report(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

/// Registers of each thread of the calling warpgroup from here on: more, or fewer.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// The registers of 8 to 128 sums of a thread, as operands and by their places.
#define CAMBIUM_FOUR(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
#define CAMBIUM_8(d) CAMBIUM_FOUR((d)[0]), CAMBIUM_FOUR((d)[1])
#define CAMBIUM_16(d) CAMBIUM_8(d), CAMBIUM_FOUR((d)[2]), CAMBIUM_FOUR((d)[3])
#define CAMBIUM_24(d) CAMBIUM_16(d), CAMBIUM_FOUR((d)[4]), CAMBIUM_FOUR((d)[5])
#define CAMBIUM_32(d) CAMBIUM_24(d), CAMBIUM_FOUR((d)[6]), CAMBIUM_FOUR((d)[7])
#define CAMBIUM_40(d) CAMBIUM_32(d), CAMBIUM_FOUR((d)[8]), CAMBIUM_FOUR((d)[9])
#define CAMBIUM_48(d) CAMBIUM_40(d), CAMBIUM_FOUR((d)[10]), CAMBIUM_FOUR((d)[11])
#define CAMBIUM_56(d) CAMBIUM_48(d), CAMBIUM_FOUR((d)[12]), CAMBIUM_FOUR((d)[13])
#define CAMBIUM_64(d) CAMBIUM_56(d), CAMBIUM_FOUR((d)[14]), CAMBIUM_FOUR((d)[15])
#define CAMBIUM_72(d) CAMBIUM_64(d), CAMBIUM_FOUR((d)[16]), CAMBIUM_FOUR((d)[17])
#define CAMBIUM_80(d) CAMBIUM_72(d), CAMBIUM_FOUR((d)[18]), CAMBIUM_FOUR((d)[19])
#define CAMBIUM_88(d) CAMBIUM_80(d), CAMBIUM_FOUR((d)[20]), CAMBIUM_FOUR((d)[21])
#define CAMBIUM_96(d) CAMBIUM_88(d), CAMBIUM_FOUR((d)[22]), CAMBIUM_FOUR((d)[23])
#define CAMBIUM_104(d) CAMBIUM_96(d), CAMBIUM_FOUR((d)[24]), CAMBIUM_FOUR((d)[25])
#define CAMBIUM_112(d) CAMBIUM_104(d), CAMBIUM_FOUR((d)[26]), CAMBIUM_FOUR((d)[27])
#define CAMBIUM_120(d) CAMBIUM_112(d), CAMBIUM_FOUR((d)[28]), CAMBIUM_FOUR((d)[29])
#define CAMBIUM_128(d) CAMBIUM_120(d), CAMBIUM_FOUR((d)[30]), CAMBIUM_FOUR((d)[31])
#define CAMBIUM_8_PLACES "%0, %1, %2, %3, %4, %5, %6, %7"
#define CAMBIUM_16_PLACES CAMBIUM_8_PLACES ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CAMBIUM_24_PLACES CAMBIUM_16_PLACES ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CAMBIUM_32_PLACES CAMBIUM_24_PLACES ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CAMBIUM_40_PLACES CAMBIUM_32_PLACES ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CAMBIUM_48_PLACES CAMBIUM_40_PLACES ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CAMBIUM_56_PLACES CAMBIUM_48_PLACES ", %48, %49, %50, %51, %52, %53, %54, %55"
#define CAMBIUM_64_PLACES CAMBIUM_56_PLACES ", %56, %57, %58, %59, %60, %61, %62, %63"
#define CAMBIUM_72_PLACES CAMBIUM_64_PLACES ", %64, %65, %66, %67, %68, %69, %70, %71"
#define CAMBIUM_80_PLACES CAMBIUM_72_PLACES ", %72, %73, %74, %75, %76, %77, %78, %79"
#define CAMBIUM_88_PLACES CAMBIUM_80_PLACES ", %80, %81, %82, %83, %84, %85, %86, %87"
#define CAMBIUM_96_PLACES CAMBIUM_88_PLACES ", %88, %89, %90, %91, %92, %93, %94, %95"
#define CAMBIUM_104_PLACES CAMBIUM_96_PLACES ", %96, %97, %98, %99, %100, %101, %102, %103"
#define CAMBIUM_112_PLACES CAMBIUM_104_PLACES ", %104, %105, %106, %107, %108, %109, %110, %111"
#define CAMBIUM_120_PLACES CAMBIUM_112_PLACES ", %112, %113, %114, %115, %116, %117, %118, %119"
#define CAMBIUM_128_PLACES CAMBIUM_120_PLACES ", %120, %121, %122, %123, %124, %125, %126, %127"

/// d (64, 64), four tiles of 16 columns from d on, += a b: a (64, 16) in registers, b (16, 64) in
/// shared memory with k together, or, turned, with n together.
template <bool kTurned>
__device__ __forceinline__ void multiply_async(float (*d)[2][4], const uint32_t (&a)[4],
                                               uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" CAMBIUM_32_PLACES
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
               : CAMBIUM_FOUR(d[0][0]), CAMBIUM_FOUR(d[0][1]), CAMBIUM_FOUR(d[1][0]),
                 CAMBIUM_FOUR(d[1][1]), CAMBIUM_FOUR(d[2][0]), CAMBIUM_FOUR(d[2][1]),
                 CAMBIUM_FOUR(d[3][0]), CAMBIUM_FOUR(d[3][1])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTurned ? 1 : 0));
}

/// d (64, 8 kTiles) += a b, or = a b: a (64, 16) in registers, b (16, 8 kTiles) in shared memory
/// with k together, or, turned, with n together.
template <bool kTurned, bool kAdd = true, int kTiles>
__device__ __forceinline__ void multiply_async(float (&d)[kTiles][4], const uint32_t (&a)[4],
                                               uint64_t b) {
  static_assert(kTiles == 8 || kTiles == 16 || kTiles == 32);
#define CAMBIUM_MULTIPLY(columns, sums, a0, a1, a2, a3, b_place, add, turned)             \
  if constexpr (8 * kTiles == columns) {                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns                             \
                 "k16.f32.bf16.bf16 {" CAMBIUM_##sums##_PLACES                            \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_place ", %" #add     \
                 ", 1, 1, %" #turned ";"                                                  \
                 : CAMBIUM_##sums(d)                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0), \
                   "n"(kTurned ? 1 : 0));                                                 \
  }
  CAMBIUM_MULTIPLY(64, 32, 32, 33, 34, 35, 36, 37, 38)
  CAMBIUM_MULTIPLY(128, 64, 64, 65, 66, 67, 68, 69, 70)
  CAMBIUM_MULTIPLY(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef CAMBIUM_MULTIPLY
}
/// d (64, 8 kTiles) += a b, or = a b: a (64, 16) and b (16, 8 kTiles) in shared memory. Turned, an
/// operand does not have k together: a has its rows together, b its columns.
template <bool kATurned = false, bool kBTurned = false, bool kAdd = true, int kTiles>
__device__ __forceinline__ void multiply_async(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  static_assert(kTiles % 2 == 0 && kTiles <= 32);
#define CAMBIUM_MULTIPLY(columns, sums, a_place, b_place, add, a_turned, b_turned)                 \
  if constexpr (8 * kTiles == columns) {                                                           \
    asm volatile(                                                                                  \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" CAMBIUM_##sums##_PLACES \
        "}, %" #a_place ", %" #b_place ", %" #add ", 1, 1, %" #a_turned ", %" #b_turned ";"        \
        : CAMBIUM_##sums(d)                                                                        \
        : "l"(a), "l"(b), "n"(kAdd ? 1 : 0), "n"(kATurned ? 1 : 0), "n"(kBTurned ? 1 : 0));        \
  }
  CAMBIUM_MULTIPLY(16, 8, 8, 9, 10, 11, 12)
  CAMBIUM_MULTIPLY(32, 16, 16, 17, 18, 19, 20)
  CAMBIUM_MULTIPLY(48, 24, 24, 25, 26, 27, 28)
  CAMBIUM_MULTIPLY(64, 32, 32, 33, 34, 35, 36)
  CAMBIUM_MULTIPLY(80, 40, 40, 41, 42, 43, 44)
  CAMBIUM_MULTIPLY(96, 48, 48, 49, 50, 51, 52)
  CAMBIUM_MULTIPLY(112, 56, 56, 57, 58, 59, 60)
  CAMBIUM_MULTIPLY(128, 64, 64, 65, 66, 67, 68)
  CAMBIUM_MULTIPLY(144, 72, 72, 73, 74, 75, 76)
  CAMBIUM_MULTIPLY(160, 80, 80, 81, 82, 83, 84)
  CAMBIUM_MULTIPLY(176, 88, 88, 89, 90, 91, 92)
  CAMBIUM_MULTIPLY(192, 96, 96, 97, 98, 99, 100)
  CAMBIUM_MULTIPLY(208, 104, 104, 105, 106, 107, 108)
  CAMBIUM_MULTIPLY(224, 112, 112, 113, 114, 115, 116)
  CAMBIUM_MULTIPLY(240, 120, 120, 121, 122, 123, 124)
  CAMBIUM_MULTIPLY(256, 128, 128, 129, 130, 131, 132)
#undef CAMBIUM_MULTIPLY
}

#undef CAMBIUM_128_PLACES
#undef CAMBIUM_120_PLACES
#undef CAMBIUM_112_PLACES
#undef CAMBIUM_104_PLACES
#undef CAMBIUM_96_PLACES
#undef CAMBIUM_88_PLACES
#undef CAMBIUM_80_PLACES
#undef CAMBIUM_72_PLACES
#undef CAMBIUM_64_PLACES
#undef CAMBIUM_56_PLACES
#undef CAMBIUM_48_PLACES
#undef CAMBIUM_40_PLACES
#undef CAMBIUM_32_PLACES
#undef CAMBIUM_24_PLACES
#undef CAMBIUM_16_PLACES
#undef CAMBIUM_8_PLACES
#undef CAMBIUM_128
#undef CAMBIUM_120
#undef CAMBIUM_112
#undef CAMBIUM_104
#undef CAMBIUM_96
#undef CAMBIUM_88
#undef CAMBIUM_80
#undef CAMBIUM_72
#undef CAMBIUM_64
#undef CAMBIUM_56
#undef CAMBIUM_48
#undef CAMBIUM_40
#undef CAMBIUM_32
#undef CAMBIUM_24
#undef CAMBIUM_16
#undef CAMBIUM_8
#undef CAMBIUM_FOUR

}  // namespace cambium::cuda
