#include "base/error.h"
#include "model/families/families.h"

namespace cambium {

const std::vector<Family>& families() {
  static const std::vector<Family> table = {
      llama_family(),       mistral_family(),          ministral_family(),  qwen2_family(),
      qwen3_family(),       apriel_h_family(),         bamba_family(),      granite_hybrid_family(),
      nemotron_h_family(),  falcon_h1_family(),        minimax_m1_family(), qwen3_next_family(),
      deepseek_family(),    kimi_linear_family(),      qwen3_5_family(),    qwen3_5_text_family(),
      qwen3_5_moe_family(), qwen3_5_moe_text_family(), ministral3_family(), mistral3_family(),
      gpt_oss_family(),     cambium_family()};
  return table;
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
