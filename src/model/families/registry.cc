#include "base/error.h"
#include "model/families/families.h"

namespace cambium {

const std::vector<Family>& families() {
  static const std::vector<Family> table = {llama_family(),          mistral_family(),
                                            ministral_family(),      qwen2_family(),
                                            qwen3_family(),          gemma2_family(),
                                            gemma3_family(),         olmo2_family(),
                                            olmo3_family(),          phi3_family(),
                                            granite_family(),        smollm3_family(),
                                            apertus_family(),        apriel_h_family(),
                                            bamba_family(),          granite_hybrid_family(),
                                            nemotron_h_family(),     falcon_h1_family(),
                                            minimax_m1_family(),     qwen3_next_family(),
                                            deepseek_family(),       kimi_linear_family(),
                                            qwen3_5_family(),        qwen3_5_text_family(),
                                            qwen3_5_moe_family(),    qwen3_5_moe_text_family(),
                                            ministral3_family(),     mistral3_family(),
                                            gpt_oss_family(),        mixtral_family(),
                                            qwen3_moe_family(),      jamba_family(),
                                            lfm2_family(),           olmo_hybrid_family(),
                                            minimax_family(),        minimax_m2_family(),
                                            deepseek_v32_family(),   kimi_k2_family(),
                                            bailing_hybrid_family(), cambium_family()};
  return table;
}

std::string why_refused(const std::string& model_type) {
  if (model_type == "zamba" || model_type == "zamba2") {
    return "one transformer block serves several layers, reads the word embeddings beside the "
           "residual stream, and what it gives enters the norm of a mixer alone; a layer here has "
           "parameters of its own and reads the residual stream";
  }
  return {};
}

const Family& find_family(const std::string& name) {
  for (const Family& family : families()) {
    if (name == family.name) {
      return family;
    }
  }
  fail("unknown model family '{}'", name);
}

}  // namespace cambium
