// The losses that keep a router's experts in use: a warp for a token.
#include "ops/cuda.cuh"
#include "ops/experts/experts_kernels.h"

namespace cambium::cuda {
namespace {

constexpr int kWarpsOfTokens = 4;

/// What both losses of a warp's token are made of, in every lane.
template <class T>
struct TokenLoss {
  float log_sum;   // of the exp(logits)
  float sum;       // of the scores
  float weighted;  // of score * count

  __device__ TokenLoss(const RouterLosses<T>& a, const T* logits) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int experts = static_cast<int>(a.lists.experts);
    float largest = load(logits);
    for (int e = lane; e < experts; e += 32) {
      largest = fmaxf(largest, load(logits + e));
    }
    largest = warp_max(largest);
    float exps = 0.0F;
    for (int e = lane; e < experts; e += 32) {
      exps += expf(load(logits + e) - largest);
    }
    log_sum = largest + logf(warp_sum(exps));
    sum = 0.0F;
    weighted = 0.0F;
    for (int e = lane; e < experts; e += 32) {
      const float s = score(a, load(logits + e));
      sum += s;
      weighted += s * a.count(e);
    }
    sum = warp_sum(sum);
    weighted = warp_sum(weighted);
  }

  __device__ float softmax(float logit) const { return expf(logit - log_sum); }
  __device__ float score(const RouterLosses<T>& a, float logit) const {
    return a.score == RouterScore::kSigmoid ? sigmoid(logit) : softmax(logit);
  }
};

__device__ int64_t token_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsOfTokens + threadIdx.x / 32;
}

template <class T>
__global__ void __launch_bounds__(kWarpsOfTokens * 32) losses_of_tokens(RouterLosses<T> a) {
  const int64_t t = token_of_warp();
  if (t >= a.lists.tokens) {
    return;
  }
  const TokenLoss<T> loss(a, a.logits.row(t));
  if (threadIdx.x % 32 == 0) {
    a.losses.row(0)[t] = a.share() * loss.weighted / loss.sum;
    a.losses.row(1)[t] = loss.log_sum * loss.log_sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kWarpsOfTokens * 32) losses_grad(RouterLosses<T> a) {
  const int64_t t = token_of_warp();
  if (t >= a.lists.tokens) {
    return;
  }
  const T* logits = a.logits.row(t);
  const TokenLoss<T> loss(a, logits);
  const float mean = loss.weighted / loss.sum;
  const float balance = a.losses.grad_row(0)[t] * a.share() / loss.sum;
  const float z = a.losses.grad_row(1)[t] * 2.0F * loss.log_sum;
  const bool is_sigmoid = a.score == RouterScore::kSigmoid;
  const int experts = static_cast<int>(a.lists.experts);
  T* dlogits = a.logits.grad_row(t);
  for (int e = static_cast<int>(threadIdx.x % 32); e < experts; e += 32) {
    const float logit = load(logits + e);
    const float s = loss.score(a, logit);
    const float slope = is_sigmoid ? s * (1.0F - s) : s;
    add_to(dlogits + e, balance * slope * (a.count(e) - mean) + z * loss.softmax(logit));
  }
}

template <class T>
void run_forward(const RouterLosses<T>& a, const Launch& on) {
  launch(on, "router_losses", losses_of_tokens<T>,
         static_cast<unsigned>(ceil_div(a.lists.tokens, kWarpsOfTokens)), kWarpsOfTokens * 32, 0,
         a);
}

template <class T>
void run_backward(const RouterLosses<T>& a, const Launch& on) {
  launch(on, "router_losses' gradient", losses_grad<T>,
         static_cast<unsigned>(ceil_div(a.lists.tokens, kWarpsOfTokens)), kWarpsOfTokens * 32, 0,
         a);
}

}  // namespace

void router_losses_forward(const RouterLosses<float>& a, const Launch& on) {
  run_forward(a, on);
}
void router_losses_forward(const RouterLosses<bf16>& a, const Launch& on) {
  run_forward(a, on);
}
void router_losses_backward(const RouterLosses<float>& a, const Launch& on) {
  run_backward(a, on);
}
void router_losses_backward(const RouterLosses<bf16>& a, const Launch& on) {
  run_backward(a, on);
}

}  // namespace cambium::cuda
