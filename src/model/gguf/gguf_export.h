// From a checkpoint folder to a GGUF file that llama.cpp runs: the reverse of gguf_import.h, by the
// same rows of the table of architectures.
//
// Matrices are written as f32, f16, bf16 or q8_0, everything else as f32. Anything that the file
// cannot say exactly is an Error: a family that llama.cpp has no architecture for, sliding windows
// where it ignores them, scaled rotations it has no key for, a tokenizer other than byte-level BPE
// or whose way of cutting text has no name there. What the keys say is read back as an import would
// before anything is written.
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
