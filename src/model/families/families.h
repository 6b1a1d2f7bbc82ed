// The families of this build, one file each; model/spec.cc holds their table.
#pragma once

#include "model/spec.h"

namespace cambium {

Family llama_family();
Family mistral_family();
Family ministral_family();
Family qwen2_family();
Family qwen3_family();
Family apriel_h_family();
/// Our own layout: any mixer in any layer.
Family cambium_family();

}  // namespace cambium
