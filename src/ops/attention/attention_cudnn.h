// Attention by cuDNN: what attention_cudnn_plan_cuda.cc, the one file that knows the library,
// offers to the operation and to its tests and benchmark. Free of the library's headers.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <string>

#include "ops/attention/attention_kernels.h"

namespace cambium::cuda::attention {

/// What a plan is made for: causal attention in bf16 over `batch` segments. Strides are from token
/// to token, in elements; heads of a token lie together.
struct SdpaShape {
  bool backward;
  /// Segments have lengths of their own, up to `length`, and lie where SdpaTensors says; else they
  /// have `length` tokens each and follow each other.
  bool ragged;
  /// Queries are the last tokens of keys, which may be more: up to `key_length`. Else it is
  /// `length`.
  bool continues;
  bool stats;  // whether the statistics are written; backward they are read
  int64_t batch, length, key_length;
  int64_t heads, kv_heads, head_dim, value_dim;
  int64_t q_row, k_row, v_row;
  int64_t y_row;                   // of y and its gradient
  int64_t dq_row, dk_row, dv_row;  // backward only
  float scale;
  int64_t window;  // 0 = unbounded
  /// Backward, for measurements alone: sums in no fixed order.
  bool any_order = false;
  auto operator<=>(const SdpaShape&) const = default;  // NOLINT(modernize-use-nullptr)
};

/// Where segments lie in a tensor: element offsets of their first tokens.
using SdpaOffsets = const int32_t*;  // (batch + 1), of the device

struct SdpaTensors {
  const bf16* q;  // (.., H, D)
  const bf16* k;  // (.., Hkv, D)
  const bf16* v;  // (.., Hkv, Dv)
  bf16* y;        // (.., H, Dv): written forward, read backward
  /// (batch, H, length): log of the sum of exp(score), written forward if wanted, read backward.
  float* stats;
  // Backward only: the gradients of q, k and v are written, not added to.
  const bf16* dy = nullptr;
  bf16* dq = nullptr;
  bf16* dk = nullptr;
  bf16* dv = nullptr;
  // Where the shape is ragged.
  const int32_t* lengths = nullptr;      // (batch), of the device
  const int32_t* key_lengths = nullptr;  // (batch)
  SdpaOffsets q_at = nullptr, k_at = nullptr, v_at = nullptr, y_at = nullptr;
  SdpaOffsets dq_at = nullptr, dk_at = nullptr, dv_at = nullptr;
};

class SdpaPlan;

/// The plan for a shape on the current device: made when it is first asked for, which takes about
/// half a second, then remembered. Null where the library is missing, was not built in, is turned
/// off or does not serve the shape: cudnn_status() says why.
std::shared_ptr<const SdpaPlan> sdpa_plan(const SdpaShape& shape);
/// Bytes of the device that sdpa_run() works in, from an address as Launch::scratch gives it.
int64_t sdpa_workspace(const SdpaPlan& plan);
/// Queues the work. Two runs give the same bits.
void sdpa_run(const SdpaPlan& plan, const SdpaTensors& tensors, void* workspace, const Launch& on);

/// Whether there is a soft cap or a sink's score, which the plans here do not have.
template <class T>
bool bends_softmax(const Attention<T>& a) {
  return a.shape.softcap > 0.0F || a.sink_logits.defined();
}

/// The fewest tokens of a segment for which the library pays.
inline constexpr int64_t kFewestTokens = 256;
/// Whether the library serves the head dims and scale.
inline bool dims_suit(const AttentionShape& s) {
  const auto suits = [](int64_t dim) { return dim >= 64 && dim <= 256 && dim % 16 == 0; };
  return suits(s.head_dim) && suits(s.value_dim) && s.scale > 0.0F;
}
/// Whether heads lie together in every token.
inline bool heads_together(const View<bf16>& x) {
  return x.rows.inner == 1 || x.rows.inner_stride == x.channels;
}

/// Forward and backward by the library; false where it does not serve the call.
bool forward_by_cudnn(const Attention<bf16>& a, const Launch& on);
bool backward_by_cudnn(const Attention<bf16>& a, const Launch& on);

/// Over pages, forward for those segments that are long pieces of prompts, whose keys and values
/// are gathered (attention_prefill_cuda.cu). Returns the bytes of them that are gathered at most at
/// a time: segments for which is_long_piece() says so with that are done; 0 where none are.
int64_t prefill_by_cudnn(const Attention<bf16>& a, const Launch& on);
bool is_long_piece(const AttentionShape& shape, int64_t s, int64_t most_gathered);

/// For tests and benchmarks: calls that the library served so far, and turning it off and on again.
int64_t cudnn_calls();
void allow_cudnn(bool allowed);
/// For tests: the most bytes of keys and values that are gathered at a time; 0 = as usual.
void limit_gathered(int64_t bytes);
/// "cuDNN 9.19.0", with the reason of the last refusal if there was one; "no cuDNN: libcudnn.so.9
/// was not found".
std::string cudnn_status();

}  // namespace cambium::cuda::attention
