// From a checkpoint folder of the families llama, mistral, qwen2 and qwen3 to a GGUF file that
// llama.cpp runs: the reverse of gguf_import.h, by the same table of tensors.
//
// Matrices are written as f32, f16, bf16 or q8_0, norms and biases as f32. Anything that the file
// cannot say exactly is an Error: another family, sliding windows (llama.cpp ignores them in these
// architectures), scaled rotations it has no key for, a tokenizer other than byte-level BPE or
// whose way of cutting text has no name there.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "files/gguf.h"

namespace cambium {

struct GgufExportOptions {
  GgufType matrices = GgufType::kF16;
  /// tokenizer.ggml.pre, for a tokenizer whose cut of text has no name; empty = it must have one.
  std::string pre;
};

/// "f32", "f16", "bf16", "q8_0"; Error otherwise.
GgufType parse_gguf_type(const std::string& name);

/// Returns the bytes written.
uint64_t export_gguf(const std::filesystem::path& folder, const std::string& gguf_path,
                     const GgufExportOptions& options = {});

}  // namespace cambium
