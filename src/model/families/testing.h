// Configurations that the tests of families read.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "base/file.h"
#include "base/test_folder.h"
#include "model/model.h"

namespace cambium::testing {

using Json = nlohmann::ordered_json;

/// A small decoder of attention and SwiGLU.
inline Json tiny(const char* type, int layers = 3) {
  return {{"model_type", type},
          {"vocab_size", 30},
          {"hidden_size", 16},
          {"intermediate_size", 24},
          {"num_hidden_layers", layers},
          {"num_attention_heads", 2},
          {"head_dim", 8},
          {"rms_norm_eps", 1e-5},
          {"max_position_embeddings", 256}};
}

/// The spec of a folder with this config.json and nothing else.
inline ModelSpec read(const std::string& text) {
  const TestFolder folder;
  write_file_atomically(folder.at("config.json"), text);
  return read_spec(folder.path());
}

inline ModelSpec read(const Json& config) {
  return read(config.dump());
}

/// That of a configuration alone, which may describe a model whose weights could not be read.
inline ModelSpec read_alone(const Json& config) {
  const TestFolder folder;
  write_file_atomically(folder.at("model.json"), config.dump());
  return read_spec(folder.at("model.json"));
}

}  // namespace cambium::testing
