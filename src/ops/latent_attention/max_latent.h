// The limit of latents, for callers and kernels alike.
#pragma once

#include <cstdint>

namespace cambium {

/// Most numbers of a latent and its rotated key together.
inline constexpr int64_t kMaxLatent = 1024;

}  // namespace cambium
