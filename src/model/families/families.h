// The families of this build; registry.cc holds their table.
#pragma once

#include "model/spec.h"

namespace cambium {

Family llama_family();
Family mistral_family();
Family ministral_family();
Family qwen2_family();
Family qwen3_family();
Family gemma2_family();
Family gemma3_family();
Family olmo2_family();
Family olmo3_family();
Family phi3_family();
Family granite_family();
Family smollm3_family();
Family apertus_family();
Family apriel_h_family();
Family bamba_family();
Family ministral3_family();
Family mistral3_family();
Family qwen3_next_family();
Family qwen3_5_family();
Family qwen3_5_text_family();
Family qwen3_5_moe_family();
Family qwen3_5_moe_text_family();
Family gpt_oss_family();
Family jamba_family();
Family lfm2_family();
Family olmo_hybrid_family();
Family deepseek_family();
Family deepseek_v32_family();
Family kimi_k2_family();
Family kimi_linear_family();
Family bailing_hybrid_family();
Family granite_hybrid_family();
Family nemotron_h_family();
Family falcon_h1_family();
Family mixtral_family();
Family qwen3_moe_family();
Family minimax_family();
Family minimax_m1_family();
Family minimax_m2_family();
/// Why models of this model_type are known and not read; empty for all others.
std::string why_refused(const std::string& model_type);
/// Our own layout: any mixer in any layer.
Family cambium_family();

}  // namespace cambium
