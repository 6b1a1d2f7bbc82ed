// Losses fused with the output head. Logits exist only for one chunk of tokens at a time; the call
// computes the loss and, where asked, adds its gradient to the hidden states and the head at once.
#pragma once

#include <cstdint>
#include <span>

#include "tensor/context.h"

namespace cambium {

/// Weighted sum of token losses. p = teacher, q = student, each softmax(logits / temperature); the
/// KL terms are multiplied by temperature^2 so that their gradients keep their scale.
struct LossConfig {
  float cross_entropy = 0.0F;  // -log q[label] at temperature 1
  float forward_kl = 0.0F;     // sum_v p (log p - log q)
  float reverse_kl = 0.0F;     // sum_v q (log q - log p)
  float temperature = 1.0F;
  int64_t chunk_tokens = 0;  // tokens whose logits exist at once; 0 chooses by vocabulary
};

/// A teacher known by the k likeliest tokens of each row, likeliest first, and the rest together.
/// The KL terms are those of k + 1 outcomes, the tokens and the rest: at k = V the whole KL, else
/// that less what the shape of the rest would add.
struct StoredTeacher {
  int64_t k = 0;                         // 0 = there is none
  std::span<const int32_t> tokens = {};  // (T, k), of a row each once
  /// (T, k + 1): log-probabilities, the last that of all other tokens. A row's sum to one.
  std::span<const float> log_p = {};
};

struct LossInputs {
  Tensor hidden;               // (T, C) student's final hidden states
  Tensor head;                 // (V, C) student's output head
  Tensor teacher_hidden = {};  // (T, Ct), for the KL terms
  Tensor teacher_head = {};    // (V, Ct)
  StoredTeacher stored = {};   // in place of those; at temperature 1
  /// Where above 0, logits are cap tanh(logits / cap) (ops/activation).
  float logit_cap = 0.0F;
  float teacher_logit_cap = 0.0F;
  /// (T): the token each row should predict; a negative label leaves the row out of every term.
  std::span<const int32_t> labels = {};
  /// Every token's loss and gradient is multiplied by this: 1 / valid tokens of the global batch.
  double scale = 1.0;
};

/// Sums over the valid rows, not scaled. The KL values are those at the temperature, without its
/// square; agreement counts rows where student and teacher choose the same token; correct counts
/// rows whose largest student logit is the label.
struct LossSums {
  double cross_entropy = 0.0;
  double forward_kl = 0.0;
  double reverse_kl = 0.0;
  double total = 0.0;  // weighted, times temperature^2 where it applies; not scaled
  int64_t tokens = 0;
  int64_t agreement = 0;
  int64_t correct = 0;

  LossSums& operator+=(const LossSums& other);
};

/// Rows whose logits head_loss() holds at once unless told: about a million logits, and enough rows
/// for good products; on a GPU, which is waited for after each chunk, more, and whole tiles of its
/// products.
int64_t head_loss_rows(int64_t vocabulary, Device device);

/// Computes the sums; where hidden or head has a gradient, adds d(scale * total) to it. With a
/// teacher both KL sums are reported whatever their weights.
LossSums head_loss(Context& ctx, const LossInputs& inputs, const LossConfig& config);

/// Mixer-output alignment: sum over rows with labels >= 0 of ||out - target||_2 / sqrt(C) (the
/// norm, not its square) for `squared` false, of mean((out - target)^2) otherwise. Adds scale times
/// its gradient to out. Returns the sum, not scaled.   out, target (T, C); an empty `labels` takes
/// all rows.
double align_loss(Context& ctx, const Tensor& out, const Tensor& target,
                  std::span<const int32_t> labels, bool squared, double scale);

}  // namespace cambium
