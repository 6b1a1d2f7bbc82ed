// A small GGUF file, and a fixture that imports it.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/test_folder.h"
#include "files/gguf_builder.h"
#include "model/gguf/gguf_import.h"

namespace cambium::testing {

inline constexpr uint64_t kVocabulary = 9;
inline constexpr uint64_t kHidden = 8;
inline constexpr uint64_t kFeedForward = 12;

/// A model of one layer: two query heads of four channels, one key head.
struct Tiny {
  std::string architecture = "llama";
  std::string tokenizer = "gpt2";
  std::string pre = "smollm";
  std::vector<std::string> tokens{"<|end|>", "a", "b", "ab", "Ġ", "1", "Ġab", "<x>", "é"};
  std::vector<int32_t> types{3, 1, 1, 1, 1, 1, 1, 4, 1};
  std::vector<std::string> merges{"a b", "Ġ ab"};
  uint32_t layers = 1;
  uint32_t bos = 0;
  bool add_bos = false;
  bool says_eos = true;
  bool tied = true;
  bool says_theta = true, says_kv_heads = true;
  std::vector<float> rope_divisors;
  std::string chat_template = "{{ messages[0]['content'] }}";
  std::string leave_out;                             // a tensor
  std::function<void(GgufBuilder&)> more = nullptr;  // more keys or tensors

  std::string file() const {
    GgufBuilder b;
    b.text("general.architecture", architecture);
    const std::string prefix = architecture + ".";
    b.u32(prefix + "block_count", layers);
    b.u32(prefix + "context_length", 64);
    b.u32(prefix + "embedding_length", kHidden);
    b.u32(prefix + "feed_forward_length", kFeedForward);
    b.u32(prefix + "attention.head_count", 2);
    if (says_kv_heads) {
      b.u32(prefix + "attention.head_count_kv", 1);
    }
    b.f32(prefix + "attention.layer_norm_rms_epsilon", 1e-5F);
    if (says_theta) {
      b.f32(prefix + "rope.freq_base", 500000.0F);
    }
    b.text("tokenizer.ggml.model", tokenizer);
    b.text("tokenizer.ggml.pre", pre);
    b.texts("tokenizer.ggml.tokens", tokens);
    b.i32s("tokenizer.ggml.token_type", types);
    b.texts("tokenizer.ggml.merges", merges);
    b.u32("tokenizer.ggml.bos_token_id", bos);
    if (says_eos) {
      b.u32("tokenizer.ggml.eos_token_id", 0);
    }
    b.flag("tokenizer.ggml.add_bos_token", add_bos);
    if (!chat_template.empty()) {
      b.text("tokenizer.chat_template", chat_template);
    }
    // Every element tells its row: 100 row + column, which bf16 also holds for small rows.
    const auto tensor = [&](const std::string& name, const std::vector<uint64_t>& shape) {
      if (name == leave_out) {
        return;
      }
      std::vector<float> values;
      const uint64_t rows = shape.size() == 2 ? shape[0] : 1;
      for (uint64_t row = 0; row < rows; ++row) {
        for (uint64_t column = 0; column < shape.back(); ++column) {
          values.push_back(static_cast<float>(100 * row + column));
        }
      }
      b.tensor_f32(name, shape, values);
    };
    tensor("token_embd.weight", {kVocabulary, kHidden});
    tensor("blk.0.attn_norm.weight", {kHidden});
    tensor("blk.0.attn_q.weight", {8, kHidden});
    tensor("blk.0.attn_k.weight", {4, kHidden});
    tensor("blk.0.attn_v.weight", {4, kHidden});
    tensor("blk.0.attn_output.weight", {kHidden, 8});
    tensor("blk.0.ffn_norm.weight", {kHidden});
    tensor("blk.0.ffn_gate.weight", {kFeedForward, kHidden});
    tensor("blk.0.ffn_up.weight", {kFeedForward, kHidden});
    tensor("blk.0.ffn_down.weight", {kHidden, kFeedForward});
    tensor("output_norm.weight", {kHidden});
    if (!tied) {
      tensor("output.weight", {kVocabulary, kHidden});
    }
    if (!rope_divisors.empty()) {
      b.tensor_f32("rope_freqs.weight", {rope_divisors.size()}, rope_divisors);
    }
    if (more) {
      more(b);
    }
    return b.file();
  }
};

class ImportTest : public ::testing::Test {
 protected:
  void write(const Tiny& tiny) { std::ofstream(gguf_, std::ios::binary) << tiny.file(); }
  GgufImportSummary import(const Tiny& tiny, const GgufImportOptions& options = {}) {
    write(tiny);
    return import_gguf(gguf_, out_, options);
  }
  nlohmann::json json(const std::string& name) const {
    return nlohmann::json::parse(read_text_file(out_ + "/" + name));
  }
  std::vector<std::string> names_here() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

  const TestFolder folder_;
  const std::string gguf_ = folder_.at("model.gguf");
  const std::string out_ = folder_.at("out");
};

}  // namespace cambium::testing
