#include "base/error.h"
#include "model/families/families.h"

namespace cambium {

const std::vector<Family>& families() {
  static const std::vector<Family> table = [] {
    std::vector<Family> all;
    for (const auto& of_file :
         {dense_families, gemma_families, olmo_families, dense_variant_families, apriel_h_families,
          apriel2_families, mamba_hybrid_families, expert_families, minimax_m3_families,
          qwen_hybrid_families, latent_families, mistral3_families, gpt_oss_families,
          jamba_families, lfm2_families, olmo_hybrid_families, cambium_families}) {
      const std::vector<Family> some = of_file();
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }();
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
