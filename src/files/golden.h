// golden.safetensors: a short prompt and the logits that the model gave for it when its checkpoint
// was written. Whoever loads the checkpoint runs the prompt again and compares, which catches what
// strict loading cannot see: a wrong scale, a permuted head, a changed kernel.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace cambium {

struct Golden {
  std::vector<int64_t> tokens;  // (T)
  std::vector<float> logits;    // (T, vocabulary)
  int64_t vocabulary = 0;
  std::map<std::string, std::vector<float>> presets{};  // of a supernet, by name: their logits
};

/// Writes `folder`/golden.safetensors.
void write_golden(const std::string& folder, const Golden& golden);

/// Nothing when the folder has none; Error when it is damaged or its shapes do not agree.
std::optional<Golden> read_golden(const std::string& folder);

}  // namespace cambium
