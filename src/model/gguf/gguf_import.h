// From a GGUF file of llama.cpp's architectures (gguf_architecture.h has the table), in one file or
// split, to a folder in the Hugging Face layout: config.json, model.safetensors, tokenizer.json,
// tokenizer_config.json, generation_config.json, checksums.json.
//
// What changes on the way:
// - Tensors take the names of the family's checkpoints, are dequantised, and stored as bf16 or
// fp32.
// - Numbers stand where checkpoints have them: rotary pairs as halves (i, i + D/2) of a head,
//   experts each in a tensor of its own, decays as logarithms, norms that count from one.
// - `rope_freqs.weight` (what llama.cpp divides each rotary frequency by) becomes the llama3
//   parameters of `rope_scaling` that give the same divisors.
// - The tokenizer becomes tokenizer.json: byte-level BPE with the expressions that its
//   pre-tokeniser's name stands for, or SentencePiece pieces, whose scores become ranks of merges.
//
// Anything that cannot be carried over exactly is an Error: another architecture, a tensor of
// another shape or that nobody asked for, a key that may change what the model computes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cambium {

struct GgufImportOptions {
  bool float32 = false;  ///< store fp32 instead of bf16
  bool replace = false;  ///< the folder may exist; it gives way when everything is written
  uint64_t max_shard_bytes = uint64_t{5} << 30;
  /// Called with bytes written and bytes to write.
  std::function<void(uint64_t done, uint64_t total)> progress = {};
  /// Called with the still temporary folder when its weights and tokenizer are complete: the place
  /// to add the golden prompt (add_golden in weights.h). An exception leaves nothing behind.
  std::function<void(const std::string& folder)> finish = {};
};

struct GgufImportSummary {
  int64_t layers = 0;
  int64_t parameters = 0;
  uint64_t bytes = 0;                 ///< of tensors written
  std::vector<std::string> notes;     ///< what the user should know, one sentence each
  std::vector<std::string> warnings;  ///< likewise, of what the folder cannot do
};

/// Writes `folder`, whole or not at all.
GgufImportSummary import_gguf(const std::string& gguf_path, const std::string& folder,
                              const GgufImportOptions& options = {});

}  // namespace cambium
