// What a step of training takes of a machine, worked out from shapes: operations a token, and
// memory by kind.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "train/trainer.h"

namespace cambium {

/// Who is trained, by whom, where. What is frozen and the teacher's is held once.
struct TrainingShape {
  const ModelSpec* student = nullptr;
  const ModelSpec* teacher = nullptr;  // null = none
  /// Whether the parameter of the student is trained; null = none is.
  std::function<bool(const std::string& name)> trained = nullptr;
  /// Whether the student's frozen parameter is a view of the teacher's. Null = none is.
  std::function<bool(const std::string& name)> shared = nullptr;
  Dtype activations = Dtype::kF32;
  /// Whether matrices that are not trained are in bf16.
  bool bf16_matrices = false;
};

/// Floating point operations a token: two for each weight and position attended to in the forward
/// pass, as many for the gradients of the inputs from the first trained layer on, and for those of
/// the weights that are trained. What activation checkpointing computes again does not count, and
/// neither do the scans of recurrent mixers, which are few beside their projections.
double training_flops(const TrainConfig& config, const TrainingShape& shape);
/// The same for a forward pass over a sequence of so many tokens.
double forward_flops(const ModelSpec& spec, int64_t sequence);

struct MemoryItem {
  const char* kind;
  int64_t bytes = 0;
  bool host = false;  // pinned memory of the host, not the device's
};
/// By kind, in the order they are made. Activations are those of the sequence that is longest, by
/// what each unit's operations leave; they are an estimate, the rest is exact.
std::vector<MemoryItem> training_memory(const TrainConfig& config, const TrainingShape& shape);
/// Of the device.
int64_t total_bytes(const std::vector<MemoryItem>& items);
/// "30.1 GiB in all: teacher 2.3 GiB, trained weights 4.6 GiB, ...", without what takes none.
std::string memory_parts(const std::vector<MemoryItem>& items);

}  // namespace cambium
