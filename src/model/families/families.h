// The families of this build, by the file that holds them; registry.cc joins them.
#pragma once

#include "model/spec.h"

namespace cambium {

std::vector<Family> dense_families();
std::vector<Family> gemma_families();
std::vector<Family> olmo_families();
std::vector<Family> dense_variant_families();
std::vector<Family> apriel_h_families();
/// Supernets of them too.
std::vector<Family> apriel2_families();
std::vector<Family> mamba_hybrid_families();
std::vector<Family> expert_families();
std::vector<Family> minimax_m3_families();
std::vector<Family> qwen_hybrid_families();
std::vector<Family> latent_families();
std::vector<Family> mistral3_families();
std::vector<Family> gpt_oss_families();
std::vector<Family> jamba_families();
std::vector<Family> lfm2_families();
std::vector<Family> olmo_hybrid_families();
/// Our own layout: any mixer in any layer.
std::vector<Family> cambium_families();

/// Why models of this model_type are known and not read; empty for all others.
std::string why_refused(const std::string& model_type);

}  // namespace cambium
