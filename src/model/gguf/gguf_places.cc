#include "model/gguf/gguf_places.h"

#include <utility>

#include "base/error.h"

namespace cambium {

std::vector<GgufPlace> gguf_places(const GgufLlamaConfig& c) {
  std::vector<GgufPlace> plan = {
      {"token_embd.weight", "model.embed_tokens.weight", {c.vocabulary, c.hidden}}};
  const int64_t q = c.heads * c.head_dim;
  const int64_t kv = c.kv_heads * c.head_dim;
  const int64_t q_pairs = c.neighbouring_pairs ? c.heads : 0;
  const int64_t k_pairs = c.neighbouring_pairs ? c.kv_heads : 0;
  for (int64_t layer = 0; layer < c.layers; ++layer) {
    const auto add = [&](const char* from, const char* to, std::vector<int64_t> shape,
                         int64_t rotary_heads = 0, const char* what = "weight") {
      plan.push_back({fmt::format("blk.{}.{}.{}", layer, from, what),
                      fmt::format("model.layers.{}.{}.{}", layer, to, what), std::move(shape),
                      rotary_heads});
    };
    add("attn_norm", "input_layernorm", {c.hidden});
    add("attn_q", "self_attn.q_proj", {q, c.hidden}, q_pairs);
    add("attn_k", "self_attn.k_proj", {kv, c.hidden}, k_pairs);
    add("attn_v", "self_attn.v_proj", {kv, c.hidden});
    add("attn_output", "self_attn.o_proj", {c.hidden, q});
    add("ffn_norm", "post_attention_layernorm", {c.hidden});
    add("ffn_gate", "mlp.gate_proj", {c.intermediate, c.hidden});
    add("ffn_up", "mlp.up_proj", {c.intermediate, c.hidden});
    add("ffn_down", "mlp.down_proj", {c.hidden, c.intermediate});
    if (c.qkv_bias) {
      add("attn_q", "self_attn.q_proj", {q}, q_pairs, "bias");
      add("attn_k", "self_attn.k_proj", {kv}, k_pairs, "bias");
      add("attn_v", "self_attn.v_proj", {kv}, 0, "bias");
    }
    if (c.output_bias) {
      add("attn_output", "self_attn.o_proj", {c.hidden}, 0, "bias");
    }
    if (c.mlp_bias) {
      add("ffn_gate", "mlp.gate_proj", {c.intermediate}, 0, "bias");
      add("ffn_up", "mlp.up_proj", {c.intermediate}, 0, "bias");
      add("ffn_down", "mlp.down_proj", {c.hidden}, 0, "bias");
    }
    if (c.qk_norm) {
      add("attn_q_norm", "self_attn.q_norm", {c.head_dim});
      add("attn_k_norm", "self_attn.k_norm", {c.head_dim});
    }
  }
  plan.push_back({"output_norm.weight", "model.norm.weight", {c.hidden}});
  if (!c.tied) {
    plan.push_back({"output.weight", "lm_head.weight", {c.vocabulary, c.hidden}});
  }
  return plan;
}

int64_t gguf_row(int64_t row, int64_t rows, int64_t rotary_heads) {
  if (rotary_heads == 0) {
    return row;
  }
  const int64_t head_dim = rows / rotary_heads;
  const int64_t head = row / head_dim;
  const int64_t channel = row % head_dim;
  const int64_t half = channel / (head_dim / 2);
  return head * head_dim + 2 * (channel % (head_dim / 2)) + half;
}

}  // namespace cambium
