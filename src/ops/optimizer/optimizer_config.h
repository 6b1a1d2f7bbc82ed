#pragma once

namespace cambium {

/// One update of AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019):
///   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  g the gradient times its scale
///   p -= rate (m^ / (sqrt(v^) + epsilon) + weight_decay p),  m^ = m m_correction, v^ likewise
struct AdamwConfig {
  float gradient_scale = 1.0F;
  float rate = 0.0F;
  float beta1 = 0.9F, beta2 = 0.95F;
  float m_correction = 1.0F, v_correction = 1.0F;  // 1 / (1 - beta^t)
  float epsilon = 1e-8F;
  float weight_decay = 0.0F;
};

/// One update of Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
/// 2024): Nesterov momentum m = momentum m + (1 - momentum) g, then the nearest half-orthogonal
/// matrix by five steps of the quintic Newton-Schulz iteration X <- a X + (b A + c A A) X with
/// A = X X^T; scaled so that an update's root mean square is that of AdamW (0.2), which lets both
/// share a rate.
struct MuonConfig {
  float gradient_scale = 1.0F;
  float rate = 0.0F;
  float momentum = 0.95F;
  float weight_decay = 0.0F;
};

}  // namespace cambium
