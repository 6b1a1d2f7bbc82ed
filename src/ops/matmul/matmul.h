// Products with weights, stored as checkpoints store them: one row per output.
#pragma once

#include <array>
#include <span>

#include "tensor/context.h"

namespace cambium {

/// y = x weight^T + bias.   x (T, K) row-contiguous, weight (N, K) contiguous, bias (N) or none
/// -> (T, N). x is F32 or F64; weight has x's dtype, or is BF16 with x F32 (products accumulate in
/// fp32; no gradient for a BF16 weight). Backward: dx += dy weight, dweight += dy^T x, dbias += sum
/// dy. Results depend neither on the number of threads nor on the other rows of x: on one
/// instruction set a token gets the same bits in any batch (on CUDA where the context is
/// batch_invariant).
Tensor matmul(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias = {});

/// matmul whose result has the type of sums, unrounded: of x BF16 (with weights as matmul's) it is
/// F32, else the same as matmul. Its gradient is rounded to x's type for the products of the
/// backward step.
Tensor matmul_unrounded(Context& ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& bias = {});

/// matmul for its backward step alone, which does not read y: y is not computed.
Tensor matmul_unread(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& bias = {});

/// A weight (N, K) and its bias (N) or none.
struct Affine {
  Tensor weight;
  Tensor bias;
};

/// to[i] = x of[i].weight^T + of[i].bias for up to eight products of one x: the bits of as many
/// calls of matmul, computed as one piece of work. The weights need neither lie together nor be of
/// one type. Their steps of the backward pass are recorded in this order.
void matmul_each(Context& ctx, const Tensor& x, std::span<const Affine> of, std::span<Tensor> to);
template <size_t kCount>
std::array<Tensor, kCount> matmul_each(Context& ctx, const Tensor& x,
                                       const std::array<Affine, kCount>& of) {
  std::array<Tensor, kCount> to;
  matmul_each(ctx, x, std::span<const Affine>(of), std::span<Tensor>(to));
  return to;
}

/// matmul into memory of the caller's, without a tape: out (T, N) row-contiguous; with
/// `accumulate` added to what it holds. For operations that fuse a product (the loss with the
/// output head).
void matmul_into(const Context& ctx, const Tensor& out, const Tensor& x, const Tensor& weight,
                 bool accumulate = false);
/// out (T, K) (+)= dy (T, N) weight (N, K)
void matmul_grad_input(const Context& ctx, const Tensor& out, const Tensor& dy,
                       const Tensor& weight, bool accumulate);
/// out (N, K) (+)= dy (T, N)^T x (T, K)
void matmul_grad_weight(const Context& ctx, const Tensor& out, const Tensor& dy, const Tensor& x,
                        bool accumulate);

/// out[b] = x[b] weight[b]^T for each of B pairs of matrices, without a tape.   x (B, T, K), weight
/// (B, N, K) -> out (B, T, N), contiguous and of one type. With `turned` weight is (B, K, N), and
/// out[b] = x[b] weight[b].
void matmul_batch_into(const Context& ctx, const Tensor& out, const Tensor& x, const Tensor& weight,
                       bool turned = false);

}  // namespace cambium
