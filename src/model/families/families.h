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
Family jamba_family();
Family lfm2_family();
Family olmo_hybrid_family();
/// Latent attention before routed experts (latent.cc).
Family deepseek_family();
Family deepseek_v32_family();
Family kimi_k2_family();
Family kimi_linear_family();
Family bailing_hybrid_family();
/// Described by their config.json: their units or tensors are not all built yet.
Family granite_hybrid_family();
Family nemotron_h_family();
Family falcon_h1_family();
Family minimax_m1_family();
Family qwen3_next_family();
/// Why models of this model_type are known and not read; empty for all others.
std::string why_refused(const std::string& model_type);
/// Our own layout: any mixer in any layer.
Family cambium_family();

}  // namespace cambium
