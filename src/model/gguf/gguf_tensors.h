// Which tensors of a GGUF file hold which of our parameters, and how their numbers stand in them:
// the rows of the table of architectures, for reading and writing.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <utility>

#include "model/gguf/gguf_architecture.h"

namespace cambium {

/// The pieces of the file's tensors that are a parameter. Shapes are the file's.
StoredForm gguf_form(const GgufArchitecture& row, const ModelSpec& spec,
                     const ParametersByName& parameters, const std::string& ours);

/// The key and the layer that a form's "KEY#LAYER" stands for in place of a tensor; nothing of
/// others' names.
std::optional<std::pair<std::string, int64_t>> gguf_number(const std::string& tensor);

/// Our numbers to the file's, in place.
void to_gguf_values(const GgufArchitecture& row, const std::string& tensor,
                    std::span<float> values);
/// The file's numbers to ours. Error where one has none: "tensor ...".
void from_gguf_values(const GgufArchitecture& row, const std::string& tensor,
                      std::span<float> values);

/// Multiplies the rows of a parameter's values.
void multiply_rows(const GgufFactors& factors, const std::string& ours, const Parameter& parameter,
                   std::span<float> values);

}  // namespace cambium
