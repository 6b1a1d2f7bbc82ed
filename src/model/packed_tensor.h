// Weights that checkpoints hold in fewer bits, read as the numbers they stand for:
//
//   fp8     X of F8_E4M3 (rows, columns) and X_scale_inv, a factor for every block of 128 x 128
//           (DeepSeek-V3, Qwen3-FP8, MiniMax-M2; in spite of its name it multiplies)
//   MXFP4   X_blocks of U8 (..., columns / 32, 16), two e2m1 a byte, the lower half first, and
//           X_scales of U8, an exponent for 32 numbers (OCP Microscaling Formats 1.0; gpt-oss)
//   NVFP4   X of U8 (rows, columns / 2) with X_scale of F8_E4M3 for 16 numbers and X_scale_2, one
//           factor (ModelOpt); or X_packed with X_scale and a divisor X_global_scale
//           (compressed-tensors)
//
// Nothing is computed in these types: reading expands them.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "files/safetensors.h"

namespace cambium {

enum class Packing : uint8_t { kNone, kF8Blocks, kMxFp4, kNvFp4 };

/// A stored tensor, and what its numbers are multiplied by where it is packed.
struct PackedTensor {
  Packing packing = Packing::kNone;
  TensorEntry values;
  TensorEntry scales{};
  float factor = 1.0F;
  std::vector<int64_t> shape;      // of the numbers
  std::vector<std::string> parts;  // the file's tensors that it takes, `values` first

  bool is_packed() const { return packing != Packing::kNone; }
  /// Writes numbers [begin, begin + out.size()), counted over all axes.
  void unpack(int64_t begin, std::span<float> out) const;
};

/// The tensor of this name, plain or packed; nothing where the file has none. Error where a packed
/// one lacks its scales or they have another shape than its format says.
std::optional<PackedTensor> find_packed(const SafeTensors& file, const std::string& name);

/// Whether the tensor only belongs to quantised computing (scales of activations) and says nothing
/// of a weight.
bool is_activation_scale(std::string_view name);

}  // namespace cambium
