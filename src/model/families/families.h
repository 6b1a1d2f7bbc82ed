// The families of this build; registry.cc holds their table.
#pragma once

#include "model/spec.h"

namespace cambium {

Family llama_family();
Family mistral_family();
Family ministral_family();
Family qwen2_family();
Family qwen3_family();
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
/// Described by their config.json: their units or tensors are not all built yet.
Family granite_hybrid_family();
Family nemotron_h_family();
Family falcon_h1_family();
Family minimax_m1_family();
Family deepseek_family();
Family kimi_linear_family();
/// Our own layout: any mixer in any layer.
Family cambium_family();

}  // namespace cambium
