// What a GGUF file and a ModelSpec say to each other, by a row of the table of architectures.
#pragma once

#include <filesystem>
#include <string>

#include "model/gguf/gguf_architecture.h"

namespace cambium {

struct GgufModel {
  const GgufArchitecture* row = nullptr;
  ModelSpec spec;
};

/// The model that a file holds. Error that names file and key where something is missing, damaged
/// or not understood.
GgufModel read_gguf_model(const Gguf& gguf);

/// What a file says of a model, and what its tensors' numbers are multiplied by besides.
struct GgufHeading {
  const GgufArchitecture* row = nullptr;
  ModelSpec spec;  ///< as the file's readers have it: of the row's family, factors folded
  GgufHead head;
  GgufFactors factors;
};

/// Error where no architecture computes the family.
GgufHeading write_gguf_heading(const ModelSpec& spec, const std::string& where);

/// Error unless the heading, beside tensors of these names and shapes, says all of its spec: it is
/// read back as an import would, and the first key of config.json that differs is named.
void expect_gguf_says_all(const GgufHeading& heading, std::vector<GgufTensor> tensors,
                          const std::string& where);

}  // namespace cambium
