// Vectors of floats for the CPU kernels: the compiler's own vector type at the width of the
// instruction set the file is compiled for. Only *_cpu.cc files may include this header, and they
// include nothing else that has inline functions of external linkage (no standard containers), so
// that no code compiled for one instruction set can be linked into another's path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/float8.h"
#if defined(__AVX2__)
#include <immintrin.h>  // masked loads and stores
#endif

#ifndef CAMBIUM_ISA
#error "base/simd.h is for *_cpu.cc files, which the build compiles once per instruction set"
#endif

namespace cambium::CAMBIUM_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));

static inline vf vload(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void vstore(float* p, vf v) {
  std::memcpy(p, &v, sizeof v);
}
/// The first n lanes (0 <= n <= kLanes); the others are zero, their memory is not touched.
static inline vf vload_part(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << n) - 1U), p);
#elif defined(__AVX2__)
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(lane < static_cast<int32_t>(n)));
#else
  vf v = {};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
#endif
}
static inline void vstore_part(float* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1U << n) - 1U), v);
#elif defined(__AVX2__)
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(lane < static_cast<int32_t>(n)), v);
#else
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}
/// min(n, kLanes) lanes, for loops that end with a part of a vector.
static inline vf vload_upto(const float* p, int64_t n) {
  return n >= kLanes ? vload(p) : vload_part(p, n);
}
static inline void vstore_upto(float* p, vf v, int64_t n) {
  n >= kLanes ? vstore(p, v) : vstore_part(p, v, n);
}
static inline vf vset(float x) {
  return x - vf{};
}
/// a b + c, rounded once where the instruction set has that: for sums of which two kernels must
/// give the same bits. `+` of a `*` may become it too, as the compiler likes: by Clang not where a
/// sanitizer's check stands between the two.
static inline vf vfma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
/// Loads of bf16, widened to float (exact).
static inline vf vload(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu wide = __builtin_convertvector(h, vu) << 16;
  return reinterpret_cast<vf>(wide);
}
/// Loads of fp8 (exact), but for its NaN: its bits, moved to where floats have them, stand for
/// 2^-120 of it.
static inline vf vload(const f8e4m3* p) {
  vb b;
  std::memcpy(&b, p, sizeof b);
  const vu wide = __builtin_convertvector(b, vu);
  const vu moved = ((wide & 0x7fU) << 20) | ((wide & 0x80U) << 24);
  return reinterpret_cast<vf>(moved) * 0x1p120F;
}
/// Rounded to the nearest bf16, ties to even. Of NaN those whose low half is 0.
static inline vf vround_to_bf16(vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  return reinterpret_cast<vf>((bits + 0x7fffU + ((bits >> 16) & 1U)) & 0xffff0000U);
}
static inline vf vload_part(const bf16* p, int64_t n) {
  vh h = {};
  std::memcpy(&h, p, static_cast<size_t>(n) * sizeof(bf16));
  const vu wide = __builtin_convertvector(h, vu) << 16;
  return reinterpret_cast<vf>(wide);
}
static inline vf vload_upto(const bf16* p, int64_t n) {
  return n >= kLanes ? vload(p) : vload_part(p, n);
}
/// Transposes a square of kLanes x kLanes floats in registers. Squares of 4 x 4 first, inside the
/// 128-bit quarters of each vector, then the quarters among themselves.
static inline void transpose_square(vf (&r)[kLanes]) {
  for (int i = 0; i < kLanes; i += 4) {
#if defined(__AVX512F__)
#define CAMBIUM_QUARTERS(a, b, i0, i1, i2, i3)                                                    \
  __builtin_shufflevector(a, b, i0, i1, i2, i3, (i0) + 4, (i1) + 4, (i2) + 4, (i3) + 4, (i0) + 8, \
                          (i1) + 8, (i2) + 8, (i3) + 8, (i0) + 12, (i1) + 12, (i2) + 12,          \
                          (i3) + 12)
#elif defined(__AVX2__)
#define CAMBIUM_QUARTERS(a, b, i0, i1, i2, i3) \
  __builtin_shufflevector(a, b, i0, i1, i2, i3, (i0) + 4, (i1) + 4, (i2) + 4, (i3) + 4)
#else
#define CAMBIUM_QUARTERS(a, b, i0, i1, i2, i3) __builtin_shufflevector(a, b, i0, i1, i2, i3)
#endif
    const vf a = CAMBIUM_QUARTERS(r[i], r[i + 1], 0, kLanes, 1, kLanes + 1);
    const vf b = CAMBIUM_QUARTERS(r[i], r[i + 1], 2, kLanes + 2, 3, kLanes + 3);
    const vf c = CAMBIUM_QUARTERS(r[i + 2], r[i + 3], 0, kLanes, 1, kLanes + 1);
    const vf d = CAMBIUM_QUARTERS(r[i + 2], r[i + 3], 2, kLanes + 2, 3, kLanes + 3);
    r[i] = CAMBIUM_QUARTERS(a, c, 0, 1, kLanes, kLanes + 1);
    r[i + 1] = CAMBIUM_QUARTERS(a, c, 2, 3, kLanes + 2, kLanes + 3);
    r[i + 2] = CAMBIUM_QUARTERS(b, d, 0, 1, kLanes, kLanes + 1);
    r[i + 3] = CAMBIUM_QUARTERS(b, d, 2, 3, kLanes + 2, kLanes + 3);
#undef CAMBIUM_QUARTERS
  }
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
#define CAMBIUM_PICK(a, b, q0, q1)                                                                \
  __builtin_shufflevector(a, b, 4 * (q0), 4 * (q0) + 1, 4 * (q0) + 2, 4 * (q0) + 3, 4 * (q1),     \
                          4 * (q1) + 1, 4 * (q1) + 2, 4 * (q1) + 3, 16 + 4 * (q0),                \
                          16 + 4 * (q0) + 1, 16 + 4 * (q0) + 2, 16 + 4 * (q0) + 3, 16 + 4 * (q1), \
                          16 + 4 * (q1) + 1, 16 + 4 * (q1) + 2, 16 + 4 * (q1) + 3)
    const vf a = CAMBIUM_PICK(r[i], r[i + 4], 0, 1);
    const vf b = CAMBIUM_PICK(r[i], r[i + 4], 2, 3);
    const vf c = CAMBIUM_PICK(r[i + 8], r[i + 12], 0, 1);
    const vf d = CAMBIUM_PICK(r[i + 8], r[i + 12], 2, 3);
    r[i] = CAMBIUM_PICK(a, c, 0, 2);
    r[i + 4] = CAMBIUM_PICK(a, c, 1, 3);
    r[i + 8] = CAMBIUM_PICK(b, d, 0, 2);
    r[i + 12] = CAMBIUM_PICK(b, d, 1, 3);
#undef CAMBIUM_PICK
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 4; ++i) {
    const vf a = r[i];
    const vf b = r[i + 4];
    r[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#endif
}
/// Of two equal or unordered numbers the second: vmin(limit, x) and vmax(limit, x) keep x's NaN.
static inline vf vmax(vf a, vf b) {
  return a > b ? a : b;
}
static inline vf vmin(vf a, vf b) {
  return a < b ? a : b;
}
static inline float vsum(vf v) {
  float lanes[kLanes];
  vstore(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] += lanes[i + width];
    }
  }
  return lanes[0];
}
static inline float vreduce_max(vf v) {
  float lanes[kLanes];
  vstore(lanes, v);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) {
    m = lanes[i] > m ? lanes[i] : m;
  }
  return m;
}

/// exp(x) as 2^n p(r) with |r| <= ln2 / 2; relative error below 1.5e-7. 0 below -87.7, infinity
/// above 88.37 (a little early), NaN for NaN.
static inline vf vexp(vf x) {
  // Past either limit the exponent bits below become those of 0 or infinity.
  const vf clamped = vmin(vset(89.0F), vmax(vset(-88.0F), x));
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
  const vf magic = vset(12582912.0F);
  const vf n = (clamped * 1.44269504088896341F + magic) - magic;
  vf r = clamped - n * 0.693145751953125F;  // ln2 in two parts: n times the first is exact
  r = r - n * 1.42860682030941723e-6F;
  // 1 + r + r^2 q(r), q fitted at Chebyshev points: 1e-8 before rounding.
  vf p = vset(0.00139264004798F);
  p = p * r + 0.00836335268256F;
  p = p * r + 0.0416665533108F;
  p = p * r + 0.166665759439F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  // Of NaN the conversion gives any integer; p carries the NaN.
  const vi exponent = __builtin_convertvector(n, vi) + 127;
  return p * reinterpret_cast<vf>(exponent << 23);
}
static inline vf vsigmoid(vf x) {
  return 1.0F / (1.0F + vexp(-x));
}
static inline vf vsilu(vf x) {
  return x * vsigmoid(x);
}
/// d silu(x) / dx; NaN at the infinities.
static inline vf vsilu_grad(vf x) {
  const vf s = vsigmoid(x);
  return s * (1.0F + x * (1.0F - s));
}
/// Relative error below 3e-7; NaN stays NaN.
static inline vf vtanh(vf x) {
  const vf a = vmax(-x, x);
  const vf z = x * x;
  // tanh x = x + x^3 q(x^2) up to 0.625 (Cephes, tanhf).
  vf q = vset(-5.70498872745e-3F);
  q = q * z + 2.06390887954e-2F;
  q = q * z - 5.37397155531e-2F;
  q = q * z + 1.33314422036e-1F;
  q = q * z - 3.33332819422e-1F;
  const vf far = 1.0F - 2.0F / (1.0F + vexp(2.0F * a));
  const vf signed_far = x < vset(0.0F) ? -far : far;
  return a < vset(0.625F) ? x + x * z * q : signed_far;
}
/// Natural logarithm of a positive normal float; relative error below 2e-7. NaN for NaN; what other
/// numbers give is not defined.
static inline vf vlog(vf x) {
  const vi bits = reinterpret_cast<vi>(x);
  const vf m1 = reinterpret_cast<vf>((bits & 0x007fffff) | 0x3f800000);
  const vi big = m1 > vset(1.41421356F);  // -1 where true
  const vf m = big ? m1 * 0.5F : m1;
  const vf e = __builtin_convertvector((bits >> 23) - 127 - big, vf);
  const vf s = (m - 1.0F) / (m + 1.0F);  // log m = 2 atanh(s), |s| <= 0.172
  const vf s2 = s * s;
  vf p = vset(2.0F / 9.0F);
  p = p * s2 + 2.0F / 7.0F;
  p = p * s2 + 2.0F / 5.0F;
  p = p * s2 + 2.0F / 3.0F;
  p = p * s2 + 2.0F;
  const vf result = e * 0.693147180559945309F + s * p;
  return x == x ? result : x;
}
/// log(1 + exp(x)); x itself above 20, as torch and the published kernels do.
static inline vf vsoftplus(vf x) {
  const vf e = vexp(vmin(vset(20.0F), x));
  // log1p: log(1+e) - correction for the rounding of 1+e.
  const vf u = 1.0F + e;
  const vf log1p = u == vset(1.0F) ? e : vlog(u) * (e / (u - 1.0F));
  return x > vset(20.0F) ? x : log1p;
}

}  // namespace cambium::CAMBIUM_ISA
