// Weights from their files straight into the memory of a device: threads read pieces of the files
// into pinned memory and convert them, and copies of finished pieces are queued in the order of the
// files, whose checksum is worked out on the way. The host holds a few pieces, never the model.
#pragma once

#include <string>
#include <vector>

#include "files/safetensors.h"
#include "tensor/tensor.h"

namespace cambium {

/// A tensor of the file, or a part of one, and where its values go: contiguous, f32 or bf16.
struct WeightTarget {
  TensorEntry entry;
  Tensor to;
};

struct WeightStreamOptions {
  int64_t piece_bytes = int64_t{32} << 20;
  int readers = 0;  // threads; 0 = up to 8
  /// Compares the files with checksums.json beside them, as SafeTensors::open() would have.
  bool verify = true;
  std::string label = "loading";
};

/// Fills the targets, whose entries are of `file` and do not overlap. All are on `device`; when
/// this returns the copies have been made. stop_point() is asked between pieces.
void stream_weights(const SafeTensors& file, std::vector<WeightTarget> targets, Device device,
                    const WeightStreamOptions& options = {});

}  // namespace cambium
