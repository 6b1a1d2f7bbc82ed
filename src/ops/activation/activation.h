// The functions inside feed-forwards, element by element. All inputs row-contiguous, of one shape.
#pragma once

#include <string>

#include "ops/activation/activation_kind.h"
#include "tensor/context.h"

namespace cambium {

/// "silu", "relu2", "gelu", "gelu_tanh".
const char* activation_name(ActivationKind kind);
/// Error that lists the kinds when there is none of this name.
ActivationKind find_activation(const std::string& name);

/// f(x)
Tensor activation(Context& ctx, const Tensor& x, ActivationKind kind);
/// f(gate) * up, the inside of a gated feed-forward (Shazeer 2020, arXiv 2002.05202).
Tensor gated_activation(Context& ctx, const Tensor& gate, const Tensor& up, ActivationKind kind);

/// xIELU (Huang & Schlag 2024, arXiv 2411.13010), with p = softplus(alpha_p) and n = beta +
/// softplus(alpha_n): p x^2 + beta x for x > 0, else n (expm1(min(x, eps)) - x) + beta x. alpha_p,
/// alpha_n: (1), of the type of sums.
Tensor xielu(Context& ctx, const Tensor& x, const Tensor& alpha_p, const Tensor& alpha_n,
             float beta, float eps);

}  // namespace cambium
