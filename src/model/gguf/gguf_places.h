// Which tensor of a GGUF file is which of a checkpoint in the Hugging Face layout, for reading and
// writing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/gguf/gguf_config.h"

namespace cambium {

struct GgufPlace {
  std::string gguf;
  std::string stored;  ///< in the checkpoint
  std::vector<int64_t> shape;
  int64_t rotary_heads = 0;  ///< above 0: rows are rotary pairs of this many heads
};

/// All tensors of a model, without those that are part of the configuration (rope_freqs.weight and
/// its like).
std::vector<GgufPlace> gguf_places(const GgufLlamaConfig& config);

/// The file's row of the checkpoint's row `row`: the file holds channel i of the first half at 2i
/// and of the second half at 2i + 1. The same row where rotary_heads is 0.
int64_t gguf_row(int64_t row, int64_t rows, int64_t rotary_heads);

}  // namespace cambium
