// Routed experts: each token goes through the `top` of E feed-forwards that a router picks, and
// what they give is added with the router's weights (Shazeer et al. 2017, arXiv 1701.06538; Fedus
// et al. 2021, arXiv 2101.03961). The steps are operations of their own:
//
//   routing = route(logits of the router)
//   rows    = dispatch(x)                 each token once for every expert it goes to, by expert
//   hidden  = experts_matmul(rows, up)    each row with the matrix of its expert
//   y       = combine(experts_matmul(hidden, down))
//
// The number of rows is T * top whatever the router says, so nothing waits for the device and a
// step's memory is known before it. Sums are taken in a fixed order; a token's result does not
// depend on the tokens beside it.
#pragma once

#include "ops/experts/experts_lists.h"
#include "tensor/context.h"

namespace cambium {

struct Routing {
  Tensor weight;  // (T, top) of the type of sums: of a slot
  ExpertLists lists;
};

/// logits (T, E); choice_bias (E) of the type of sums, or undefined, has no gradient. Gradients go
/// to the logits through the weights; the choice is a constant.
Routing route(Context& ctx, const Tensor& logits, const Tensor& choice_bias,
              const RouterConfig& config);

/// What keeps a router's experts in use while it is trained -> (2, T) of the type of sums. Means
/// over the tokens are the losses of the call:
///   row 0   E / (top T) * the sum over e of n_e q_te: Switch's balancing loss (Fedus et al. 2021,
///           equations 4 to 6; of several experts a token as in DeepSeek-V3, arXiv 2412.19437,
///           equations 17 to 20), 1 where all experts get as much
///   row 1   (log of the sum over e of exp(logit_te))^2: the z-loss (Zoph et al. 2022, arXiv
///           2202.08906, equation 5)
/// n_e is the number of tokens that chose expert e, a constant; q_t the token's scores, divided by
/// their sum where they are sigmoids. Gradients go to the logits.
Tensor router_losses(Context& ctx, const Tensor& logits, const Routing& routing, RouterScore score);

/// x (T, C) -> (T * top, C): row r is the token of its slot.
Tensor dispatch(Context& ctx, const Tensor& x, const Routing& routing);

/// y row = weight[e] x row + bias[e] for the rows of each expert e.   x (T * top, K), weight (E, N,
/// K) contiguous of x's sums or BF16 (then without a gradient, as matmul's), bias (E, N) of the
/// type of sums or undefined -> (T * top, N).
Tensor experts_matmul(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                      const Routing& routing);

/// What a gated feed-forward has inside, swiglu or with a limit above 0 clamped_swiglu of
/// ops/activation/activation.h, from the tokens in one kernel: x (T, K), gate and up as the
/// weights, their biases as those of experts_matmul, both or neither -> (T * top, N). Without
/// gradients.
Tensor experts_hidden(Context& ctx, const Tensor& x, const Tensor& gate, const Tensor& gate_bias,
                      const Tensor& up, const Tensor& up_bias, float limit, const Routing& routing);
/// Whether that is there: a forward call alone, on CUDA in bf16, widths of whole accesses.
bool experts_hidden_serves(const Context& ctx, const Tensor& x, const Tensor& gate,
                           const Tensor& up);

/// y (T * top, C) -> (T, C): the sum over a token's slots, in their order, of weight * y row.
Tensor combine(Context& ctx, const Tensor& y, const Routing& routing);
/// The same and what other layers give, added (T, C), by itself or times sigmoid(gate), gate (T, 1)
/// or undefined. Without gradients.
Tensor combine_with(Context& ctx, const Tensor& y, const Routing& routing, const Tensor& added,
                    const Tensor& gate);
/// Whether that is one kernel: a forward call alone, on CUDA.
bool combine_with_serves(const Context& ctx, const Tensor& y);

}  // namespace cambium
