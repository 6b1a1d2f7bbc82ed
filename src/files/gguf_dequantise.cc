// The quantised blocks of GGUF, decoded one by one. A block holds 32 or 256 neighbouring elements
// of a row with one or two fp16 scales; the layouts are defined by
// https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
#include <array>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/float16.h"
#include "base/float4.h"
#include "files/gguf.h"

namespace cambium {
namespace {

using Byte = uint8_t;

float half_at(const Byte* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return f16_to_f32(bits);
}

uint32_t word_at(const Byte* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

void decode_f32(const Byte* block, float* out) {
  std::memcpy(out, block, sizeof(float));
}

void decode_f16(const Byte* block, float* out) {
  *out = half_at(block);
}

void decode_bf16(const Byte* block, float* out) {
  uint16_t bits;
  std::memcpy(&bits, block, sizeof bits);
  *out = bf16_to_f32(bits);
}

/// d (fp16), 32 signed bytes: x = d q.
void decode_q8_0(const Byte* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) {
    out[i] = d * static_cast<float>(static_cast<int8_t>(block[2 + i]));
  }
}

/// 32 values of 4 bits, or 5 when kHigh: d, [m], [32 high bits], 16 bytes of low halves. The low
/// nibbles are the first 16 elements, the high nibbles the others. With a minimum x = d q + m,
/// without one q is centred: x = d (q - 8), or d (q - 16).
template <bool kHigh, bool kMinimum>
void decode_nibbles(const Byte* block, float* out) {
  const float d = half_at(block);
  const float m = kMinimum ? half_at(block + 2) : 0.0F;
  const Byte* p = block + (kMinimum ? 4 : 2);
  const uint32_t high = kHigh ? word_at(p) : 0;
  if (kHigh) {
    p += 4;
  }
  constexpr int kCentre = kMinimum ? 0 : (kHigh ? 16 : 8);
  for (int i = 0; i < 16; ++i) {
    const auto low_bit = static_cast<int>((high >> i) & 1U);
    const auto high_bit = static_cast<int>((high >> (i + 16)) & 1U);
    out[i] = static_cast<float>((p[i] & 15) + 16 * low_bit - kCentre) * d + m;
    out[i + 16] = static_cast<float>((p[i] >> 4) + 16 * high_bit - kCentre) * d + m;
  }
}

/// The 12 bytes of Q4_K and Q5_K that hold eight 6-bit scales and eight 6-bit minima: the first
/// four of each in the low bits of bytes 0-3 and 4-7, the last four as nibbles in bytes 8-11 with
/// their upper two bits in the top of the former.
void scale_and_minimum(const Byte* p, int group, int* scale, int* minimum) {
  if (group < 4) {
    *scale = p[group] & 63;
    *minimum = p[group + 4] & 63;
  } else {
    *scale = (p[group + 4] & 15) | ((p[group - 4] >> 6) << 4);
    *minimum = (p[group + 4] >> 4) | ((p[group] >> 6) << 4);
  }
}

/// 256 values of 4 bits, or 5 when kHigh, in 8 groups of 32: d, dmin (fp16), 12 bytes of scales and
/// minima, [32 bytes of high bits: bit g of byte i belongs to element i of group g], 128 bytes of
/// nibbles (each 32 bytes: low nibbles one group, high nibbles the next). x = d s q - dmin m.
template <bool kHigh>
void decode_k_nibbles(const Byte* block, float* out) {
  const float d = half_at(block);
  const float dmin = half_at(block + 2);
  const Byte* scales = block + 4;
  const Byte* high = block + 16;
  const Byte* nibbles = block + (kHigh ? 48 : 16);
  for (int group = 0; group < 8; ++group) {
    int scale = 0;
    int minimum = 0;
    scale_and_minimum(scales, group, &scale, &minimum);
    const float step = d * static_cast<float>(scale);
    const float base = dmin * static_cast<float>(minimum);
    const Byte* p = nibbles + group / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      int q = group % 2 == 0 ? p[i] & 15 : p[i] >> 4;
      if (kHigh) {
        q += ((high[i] >> group) & 1) * 16;
      }
      out[group * 32 + i] = step * static_cast<float>(q) - base;
    }
  }
}

/// 256 values of 6 bits in 16 groups of 16: 128 bytes of low nibbles, 64 bytes of upper bit pairs,
/// 16 signed scales, d (fp16). x = d s (q - 32).
void decode_q6_k(const Byte* block, float* out) {
  const float d = half_at(block + 208);
  for (int half = 0; half < 2; ++half) {
    const Byte* low = block + half * 64;
    const Byte* high = block + 128 + half * 32;
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int i = 0; i < 32; ++i) {
        const Byte byte = low[(quarter % 2) * 32 + i];
        const int nibble = quarter < 2 ? byte & 15 : byte >> 4;
        const int q = (nibble | ((high[i] >> (2 * quarter)) & 3) << 4) - 32;
        const int at = half * 128 + quarter * 32 + i;
        const auto scale = static_cast<int8_t>(block[192 + at / 16]);
        out[at] = d * static_cast<float>(scale) * static_cast<float>(q);
      }
    }
  }
}

/// 256 values of 2 bits in 16 groups of 16: 16 bytes (low nibble the scale, high the minimum), 64
/// bytes of four 2-bit planes each 32 wide, d, dmin (fp16). x = d s q - dmin m.
void decode_q2_k(const Byte* block, float* out) {
  const float d = half_at(block + 80);
  const float dmin = half_at(block + 82);
  for (int i = 0; i < 256; ++i) {
    const Byte scale = block[i / 16];
    const Byte byte = block[16 + i / 128 * 32 + i % 32];
    const int q = (byte >> (2 * (i % 128 / 32))) & 3;
    out[i] = d * static_cast<float>(scale & 15) * static_cast<float>(q) -
             dmin * static_cast<float>(scale >> 4);
  }
}

/// 256 values of 3 bits in 16 groups of 16: 32 bytes of high bits (bit b of byte i: element i of
/// the b-th 32), 64 bytes of 2-bit planes as in Q2_K, 12 bytes of sixteen 6-bit scales, d (fp16).
/// The scales' low nibbles fill bytes 0-7 (low, then high halves), their upper pairs bytes 8-11.
/// x = d (s - 32) (q - 4).
void decode_q3_k(const Byte* block, float* out) {
  const float d = half_at(block + 108);
  const Byte* scales = block + 96;
  for (int i = 0; i < 256; ++i) {
    const int group = i / 16;
    const int low = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
    const int scale = low | (((scales[8 + group % 4] >> (2 * (group / 4))) & 3) << 4);
    const Byte byte = block[32 + i / 128 * 32 + i % 32];
    const int high = (block[i % 32] >> (i / 32)) & 1;
    const int q = (((byte >> (2 * (i % 128 / 32))) & 3) | (high << 2)) - 4;
    out[i] = d * static_cast<float>(scale - 32) * static_cast<float>(q);
  }
}

/// d (fp32), 256 signed bytes, sums that only products need.
void decode_q8_k(const Byte* block, float* out) {
  float d = 0.0F;
  std::memcpy(&d, block, sizeof d);
  for (int i = 0; i < 256; ++i) {
    out[i] = d * static_cast<float>(static_cast<int8_t>(block[4 + i]));
  }
}

/// The 16 unevenly spaced levels of the IQ4 kinds.
constexpr std::array<int8_t, 16> kIq4Levels = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};

/// 16 bytes of nibbles to 32 levels times `step`: low nibbles the first half.
void decode_iq4_levels(const Byte* nibbles, float step, float* out) {
  for (int i = 0; i < 16; ++i) {
    out[i] = step * static_cast<float>(kIq4Levels[nibbles[i] & 15]);
    out[i + 16] = step * static_cast<float>(kIq4Levels[nibbles[i] >> 4]);
  }
}

/// d (fp16), 16 bytes of nibbles.
void decode_iq4_nl(const Byte* block, float* out) {
  decode_iq4_levels(block + 2, half_at(block), out);
}

/// d (fp16), upper two bits of eight scales (16 bits), their low nibbles (4 bytes), 128 bytes of
/// nibbles in groups of 32. x = d (s - 32) level.
void decode_iq4_xs(const Byte* block, float* out) {
  const float d = half_at(block);
  const int high = block[2] | (block[3] << 8);
  for (int group = 0; group < 8; ++group) {
    const int low = (block[4 + group / 2] >> (4 * (group % 2))) & 15;
    const int scale = low | (((high >> (2 * group)) & 3) << 4);
    decode_iq4_levels(block + 8 + group * 16, d * static_cast<float>(scale - 32), out + group * 32);
  }
}

/// OCP's MXFP4: an exponent (E8M0), 16 bytes of nibbles. x = 2^(e - 127) level.
void decode_mxfp4(const Byte* block, float* out) {
  const float step = std::ldexp(1.0F, static_cast<int>(block[0]) - 127);
  for (int i = 0; i < 16; ++i) {
    const auto pair = static_cast<unsigned>(block[1 + i]);
    out[i] = step * e2m1_to_f32(pair);
    out[i + 16] = step * e2m1_to_f32(pair >> 4U);
  }
}

using Decode = void (*)(const Byte* block, float* out);

Decode decoder(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return decode_f32;
    case GgufType::kF16:
      return decode_f16;
    case GgufType::kBF16:
      return decode_bf16;
    case GgufType::kQ8_0:
      return decode_q8_0;
    case GgufType::kQ4_0:
      return decode_nibbles<false, false>;
    case GgufType::kQ4_1:
      return decode_nibbles<false, true>;
    case GgufType::kQ5_0:
      return decode_nibbles<true, false>;
    case GgufType::kQ5_1:
      return decode_nibbles<true, true>;
    case GgufType::kQ4_K:
      return decode_k_nibbles<false>;
    case GgufType::kQ5_K:
      return decode_k_nibbles<true>;
    case GgufType::kQ6_K:
      return decode_q6_k;
    case GgufType::kQ2_K:
      return decode_q2_k;
    case GgufType::kQ3_K:
      return decode_q3_k;
    case GgufType::kQ8_K:
      return decode_q8_k;
    case GgufType::kIQ4_NL:
      return decode_iq4_nl;
    case GgufType::kIQ4_XS:
      return decode_iq4_xs;
    case GgufType::kMXFP4:
      return decode_mxfp4;
  }
  return nullptr;
}

}  // namespace

void dequantise_rows(const GgufTensor& tensor, int64_t first, int64_t count, std::span<float> out) {
  const GgufBlock& block = gguf_block(tensor.type);
  const Decode decode = decoder(tensor.type);
  CAMBIUM_CHECK(decode != nullptr);
  CAMBIUM_CHECK(first >= 0 && count >= 0 && first + count <= tensor.rows());
  CAMBIUM_CHECK(static_cast<int64_t>(out.size()) == count * tensor.columns());
  const int64_t blocks_per_row = tensor.columns() / block.elements;
  const Byte* p = reinterpret_cast<const Byte*>(tensor.data) +
                  static_cast<size_t>(first * blocks_per_row) * block.bytes;
  float* to = out.data();
  for (int64_t i = 0; i < count * blocks_per_row; ++i) {
    decode(p, to);
    p += block.bytes;
    to += block.elements;
  }
}

}  // namespace cambium
