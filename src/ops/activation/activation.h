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

/// (up + 1) gate sigmoid(1.702 gate) with gate at most `limit` and up within +-limit: the inside of
/// gpt-oss's experts. No gradient passes where a limit acts.
Tensor clamped_swiglu(Context& ctx, const Tensor& gate, const Tensor& up, float limit);

/// xIELU (Huang & Schlag 2024, arXiv 2411.13010), with p = softplus(alpha_p) and n = beta +
/// softplus(alpha_n): p x^2 + beta x for x > 0, else n (expm1(min(x, eps)) - x) + beta x. alpha_p,
/// alpha_n: (1), of the type of sums.
Tensor xielu(Context& ctx, const Tensor& x, const Tensor& alpha_p, const Tensor& alpha_n,
             float beta, float eps);

/// x = cap tanh(x / cap) in place, x contiguous: logits that stay below cap (Gemma 2). Without a
/// tape; soft_cap_grad() turns the gradient of a capped y (in place) into that of what was capped.
void soft_cap(const Context& ctx, const Tensor& x, float cap);
void soft_cap_grad(const Context& ctx, const Tensor& grad, const Tensor& y, float cap);

}  // namespace cambium
